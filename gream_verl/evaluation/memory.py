"""What to do when memory runs out: fewer at a time, never less for each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

import torch

from gream_verl.core.errors import InputError

Item = TypeVar("Item")
Result = TypeVar("Result")
logger = logging.getLogger(__name__)


class HalvedBatches(Generic[Item, Result]):
    """Does work in batches. Where memory runs out, the batch size is halved, for good, and the work is done again.

    Args:
        work: Does a batch.
        size: How many items a batch has.
        kept: What every item keeps, for messages, such as ``30 beams``.
        remedy: What to do when memory does not hold a single item.

    Attributes:
        size: How many items a batch has now.
    """

    def __init__(self, work: Callable[[Sequence[Item]], Result], size: int, kept: str, remedy: str) -> None:
        self.size = size
        self._work = work
        self._kept = kept
        self._remedy = remedy

    def __call__(self, items: Sequence[Item]) -> Iterator[tuple[Sequence[Item], Result]]:
        """Yield every batch and its result, in the order of ``items``.

        Raises:
            InputError: When there is not memory enough for a single item.
        """
        start = 0
        while start < len(items):
            batch = items[start : start + self.size]
            done = self._attempt(batch)
            if done:
                yield batch, done[0]
                start += len(batch)
            else:  # here the error is gone, which held the memory
                torch.cuda.empty_cache()

    def _attempt(self, batch: Sequence[Item]) -> tuple[Result] | None:
        try:
            return (self._work(batch),)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if len(batch) == 1:
                raise InputError(f"no memory for a batch of one with {self._kept}; {self._remedy}") from error
            self.size = len(batch) // 2
            logger.warning("out of memory: batches of %d from now on, %s as before", self.size, self._kept)
            return None


def out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out, an accelerator's or the machine's."""
    signs = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)
