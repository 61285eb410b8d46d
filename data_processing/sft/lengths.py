"""Lengths of SFT rows in tokens, and histories short enough that a trainer cuts no row.

What a trainer cuts off is the end, which holds the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_processing.sft.fields import LENGTH, Specs
from data_processing.sft.row_lengths import turn_counter
from data_processing.sft.tasks import Renderer, Row
from data_processing.sft.texts import Ints


@dataclass(frozen=True)
class LengthLimit:
    """How long a row may be.

    Attributes:
        count_tokens: Returns the tokens of whole rows, chat template included.
        longest: The trainer's limit, ``cutoff_len``.
    """

    count_tokens: Callable[[Sequence[Row]], Sequence[int]]
    longest: int

    def fit(self, renderer: Renderer, kinds: Ints, specs: Specs) -> Ints:
        """Shorten histories, in ``specs``, item by item from the oldest, until rows fit or one item is left.

        A chain of a language model speaks of the history it was written for, so that one stays whole.

        Args:
            renderer: Turns specs to rows.
            kinds: Number of the task of every row.
            specs: The rows.

        Returns:
            int32, the tokens of every row, ``[rows]``.
        """
        tokens = np.array(self.count_tokens(renderer.rows(kinds, specs)), np.int32)
        fixed = renderer.history_fixed[kinds]
        while len(long := np.flatnonzero((tokens > self.longest) & (specs[:, LENGTH] > 1) & ~fixed)):
            specs[long, LENGTH] -= 1
            tokens[long] = self.count_tokens(renderer.rows(kinds[long], specs[long]))
        return tokens


def token_counter(tokenizer: Any) -> Callable[[Sequence[Row]], list[int]]:
    """Return a function that counts the tokens of rows as the trainer does, with the tokenizer's chat template.

    Raises:
        InputError: When the tokenizer is not a fast one, or has no chat template.
    """
    count_turns = turn_counter(tokenizer)
    return lambda rows: count_turns(rows).sum(1).tolist()


def length_table(tokens: Ints, shortened: int, left_out: int) -> dict[str, float]:
    """Return the spread of the lengths of rows, and how many of them were shortened and others left out.

    Args:
        tokens: Tokens of every row.
        shortened: How many rows lost the oldest part of their history.
        left_out: How many rows did not fit.
    """
    quantiles = np.quantile(tokens, [0.5, 0.95, 1]) if len(tokens) else np.zeros(3)
    return {
        **dict(zip(("median", "95%", "longest"), quantiles.tolist(), strict=True)),
        "shortened": shortened,
        "left out": left_out,
    }
