"""From prompts to ranked items, in both modes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gream_verl.decoding.beam_search import beam_search
from gream_verl.decoding.prefix_tree import PrefixTree
from gream_verl.evaluation.prompts import Prompt, batches
from gream_verl.files import InputError
from gream_verl.semantic_ids import ItemIndex

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def check_prompts(prompts: Sequence[Prompt], index: ItemIndex) -> None:
    """Check that the prompts speak of the items of ``index`` with the same SIDs.

    Raises:
        InputError: When a target is not in the index, or has another SID there.
    """
    for prompt in prompts:
        sid = index.text(prompt.target)
        if sid != prompt.truth:
            raise InputError(
                f"{index.source}: item {prompt.target!r} is {sid} but {prompt.truth} in the prompts, which were "
                "made with another index; make them anew with `gream data rl`"
            )


@dataclass(frozen=True)
class ItemRanker:
    """Ranks the items of an index by the log-probability of their SIDs after a prompt.

    Attributes:
        model: The language model, in evaluation mode.
        tree: The SIDs of all items, on the device of the model.
        items: Item ids, in the order of the index.
        beams: Beams a prompt; also the longest ranking.
        batch_size: Prompts a batch.
    """

    model: PreTrainedModel
    tree: PrefixTree
    items: Sequence[str]
    beams: int
    batch_size: int

    def rank(
        self, sequences: Sequence[Sequence[int]], dropped: Sequence[Iterable[str]]
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """Rank items for every prompt.

        Args:
            sequences: Token ids of each prompt.
            dropped: Items that must not be recommended, for each prompt; those without a SID are ignored.

        Yields:
            The place of the prompt, in the order in which batches finish, and its items with their scores, best first.
        """
        row_of = {item: row for row, item in enumerate(self.items)}
        rows = [sorted({row_of[item] for item in items if item in row_of}) for items in dropped]
        for places, ids, mask in batches(sequences, self.batch_size):
            exclude = _pad([rows[place] for place in places])
            ids, mask, exclude = (tensor.to(self.model.device) for tensor in (ids, mask, exclude))
            found, scores = beam_search(self.model, ids, mask, self.tree, self.beams, exclude)
            for place, best, values in zip(places, found.tolist(), scores.tolist(), strict=True):
                yield place, {self.items[row]: score for row, score in zip(best, values, strict=True) if row >= 0}


def _pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return ``rows`` as one int64 tensor [len(rows), longest], padded with -1."""
    padded = torch.full((len(rows), max(map(len, rows), default=0)), -1)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = torch.tensor(row, dtype=torch.long)
    return padded


def merge_rankings(rankings: Sequence[Mapping[str, float]], k: int) -> dict[str, float]:
    """Merge what several chains of one user recommend.

    The chains are samples, so the probability of an item is the mean over chains of its probability given each:
    the log-sum-exp of its scores, less the logarithm of the number of chains. An item that a chain did not find adds 0.

    Args:
        rankings: Item to log-probability, for each chain.
        k: How many items to keep.

    Returns:
        Item to log-probability, best first; equal scores in the order of first appearance.

    >>> merged = merge_rankings([{"a": -1.0, "b": -2.0}, {"b": -1.0}], k=2)
    >>> [(item, round(score, 3)) for item, score in merged.items()]
    [('b', -1.38), ('a', -1.693)]
    """
    scores: dict[str, list[float]] = {}
    for ranking in rankings:
        for item, score in ranking.items():
            scores.setdefault(item, []).append(score)
    merged = {item: float(np.logaddexp.reduce(found) - np.log(len(rankings))) for item, found in scores.items()}
    return dict(sorted(merged.items(), key=lambda pair: -pair[1])[:k])
