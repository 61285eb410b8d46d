"""The order in which SFT rows are trained: alignment first, reasoning ramped in, in blocks of one task.

The alignment rows fall in three equal parts. Over parts 1 and 2 the rate of reasoning rows rises linearly from nothing
to 1.5 times the overall rate, and stays there over part 3: half of the reasoning rows lie in parts 1 and 2, half in
part 3, and none are left over for a block at the end (arXiv 2510.20815, section 3.3; the authors' code leaves 47%).

What is placed are blocks of rows of one task, the size of a batch: rows of one task have like lengths, and a batch of
like lengths has little padding to compute.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

RAMP = 2 / 3
"""Share of the alignment rows over which the rate rises."""

Rows = npt.NDArray[np.uint32]
"""Row numbers, in half the memory of int64: there may be many."""
FloatArray = npt.NDArray[np.float64]


def curriculum_order(alignment: Sequence[int], reasoning: int, *, seed: int, block: int = 1) -> Rows:
    """Return the order of all rows.

    Args:
        alignment: Number of rows of each alignment task; their rows come first, one task after the other.
        reasoning: Number of reasoning rows; they are the rows after those.
        seed: Shuffles the rows of every task, and the blocks, and spreads the reasoning blocks.
        block: Rows of one task that stay together. What is left of all tasks, less than a block of each, comes last.

    Returns:
        Row numbers, ``[sum(alignment) + reasoning]``, every row once.
    """
    generator = np.random.default_rng(seed)
    parts = [_shuffled_blocks(size, start, block, generator) for size, start in _spans([*alignment, reasoning])]
    whole = np.concatenate([blocks for blocks, _ in parts[:-1]] or [np.zeros((0, block), np.uint32)])
    whole, thoughts = generator.permutation(whole), parts[-1][0]
    strata = (np.arange(len(thoughts)) + generator.random(len(thoughts))) / max(len(thoughts), 1)
    places = np.concatenate([(np.arange(len(whole)) + 0.5) / max(len(whole), 1), ramp_quantile(strata)])
    ordered = np.concatenate([whole, thoughts])[np.argsort(places, kind="stable")]
    return np.concatenate([ordered.ravel(), generator.permutation(np.concatenate([left for _, left in parts]))])


def ramp_quantile(share: FloatArray) -> FloatArray:
    """Return the place in the alignment rows (0 to 1) before which ``share`` of the reasoning rows come.

    The inverse of the integral of the rate: ``1.5 x / RAMP`` up to ``RAMP``, then 1.5.
    """
    return np.where(share < 0.5, RAMP * np.sqrt(2 * share), RAMP + (share - 0.5) / 1.5)


def expected_shares(alignment: int, reasoning: int, points: int = 200) -> tuple[FloatArray, FloatArray]:
    """Return the share of reasoning rows that the ramp means at places of the file.

    Args:
        alignment: Number of alignment rows.
        reasoning: Number of reasoning rows.
        points: Number of places.

    Returns:
        Places in rows of the file, and the share at each, ``[points]``.
    """
    place = np.linspace(0, 1, points)
    before = np.where(place < RAMP, 0.75 * place**2 / RAMP, 0.5 + 1.5 * (place - RAMP))
    rate = 1.5 * np.minimum(place / RAMP, 1) * reasoning
    return place * alignment + before * reasoning, rate / np.maximum(alignment + rate, 1)


def _spans(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return size and first row of every task."""
    return list(zip(sizes, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))


def _shuffled_blocks(size: int, start: int, block: int, generator: np.random.Generator) -> tuple[Rows, Rows]:
    """Shuffle the rows of one task; return its whole blocks ``[blocks, block]`` and the rows left over."""
    rows = generator.permutation(np.arange(start, start + size, dtype=np.uint32))
    whole = size - size % block
    return rows[:whole].reshape(-1, block), rows[whole:]
