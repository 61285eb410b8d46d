"""Batches of token sequences: padded on the left, and halved when memory runs out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor

from gream_verl.core.errors import InputError

Extra = TypeVar("Extra")
Batch = Sequence[tuple[Sequence[int], Extra]]
Result = TypeVar("Result")
logger = logging.getLogger(__name__)
SIGNS = ("can't allocate memory", "out of memory", "ALLOC_FAILED")  # in the errors of an accelerator and the machine


def pad_left(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Return ``input_ids`` and ``attention_mask``, int64 [sequences, longest], with the padding on the left."""
    length = max(map(len, sequences))
    ids = torch.tensor([[0] * (length - len(sequence)) + list(sequence) for sequence in sequences])
    mask = torch.tensor([[0] * (length - len(sequence)) + [1] * len(sequence) for sequence in sequences])
    return ids, mask


class HalvedBatches(Generic[Extra, Result]):
    """Do ``work`` on batches of ``size`` sequences; on out-of-memory halve the size for good, and do the batch again.

    ``work`` takes (token ids, extra) pairs and returns a result for each. ``kept`` names the cost of one in messages.
    """

    def __init__(self, work: Callable[[Batch[Extra]], Sequence[Result]], size: int, kept: str) -> None:
        self.work, self.size, self.kept = work, size, kept

    def __call__(self, items: Batch[Extra]) -> list[Result]:
        """Return the result of every item, in their order; refuse one that does not fit into memory alone."""
        # The longest first: memory runs out in the first batch or never.
        order = sorted(range(len(items)), key=lambda row: -len(items[row][0]))
        results: dict[int, Result] = {}
        while len(results) < len(items):
            rows = order[len(results) : len(results) + self.size]
            try:
                results.update(zip(rows, self.work([items[row] for row in rows]), strict=True))
                continue
            except (RuntimeError, MemoryError) as error:
                if not isinstance(error, MemoryError) and not any(sign in str(error) for sign in SIGNS):
                    raise
                if len(rows) == 1:
                    raise InputError(f"no memory for one sequence with {self.kept}; use fewer") from error
                self.size = len(rows) // 2
                logger.warning("out of memory: batches of %d from now on, %s as before", self.size, self.kept)
            torch.cuda.empty_cache()  # here, because the error, which holds the memory, is gone
        return [results[row] for row in range(len(items))]
