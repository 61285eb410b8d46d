"""The order in which SFT rows are trained: alignment first, reasoning ramped in, in blocks of one task.

The alignment rows fall in three equal parts. Over parts 1 and 2 the rate of reasoning rows rises linearly from nothing
to 1.5 times the overall rate, and stays there over part 3: half of the reasoning rows lie in parts 1 and 2, half in
part 3, and none are left over for a block at the end (arXiv 2510.20815, section 3.3; the authors' code leaves 47%).
Rows of one task have like lengths: in blocks of the size of a batch they need little padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gream_verl.core.files import atomic_path

RAMP = 2 / 3
"""Share of the alignment rows over which the rate rises."""
FloatArray = npt.NDArray[np.float64]


def curriculum_order(alignment: Sequence[int], reasoning: int, *, seed: int, block: int = 1) -> npt.NDArray[np.uint32]:
    """Return the order of all rows: their numbers, ``[sum(alignment) + reasoning]``.

    Args:
        alignment: Number of rows of each alignment task; their rows come first, one task after the other.
        reasoning: Number of reasoning rows; they are the rows after those.
        seed: Shuffles the rows of every task, and the blocks, and spreads the reasoning blocks.
        block: Rows of one task that stay together. The rest of all tasks, less than a block of each, comes last.
    """
    generator = np.random.default_rng(seed)
    # 1. Shuffle the rows of each task and cut them into whole blocks.
    sizes = [*alignment, reasoning]
    blocks, rest = [], []
    for size, start in zip(sizes, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True):
        rows = generator.permutation(np.arange(start, start + size, dtype=np.uint32))
        whole = size - size % block
        blocks.append(rows[:whole].reshape(-1, block))
        rest.append(rows[whole:])
    # 2. Shuffle the alignment blocks, and place them evenly between 0 and 1.
    aligned = generator.permutation(np.concatenate(blocks[:-1] or [np.zeros((0, block), np.uint32)]))
    thoughts = blocks[-1]
    # 3. Place the reasoning blocks by the ramp, one in each of as many equal shares of the rate's integral.
    strata = (np.arange(len(thoughts)) + generator.random(len(thoughts))) / max(len(thoughts), 1)
    places = np.concatenate([(np.arange(len(aligned)) + 0.5) / max(len(aligned), 1), ramp_quantile(strata)])
    ordered = np.concatenate([aligned, thoughts])[np.argsort(places, kind="stable")]
    return np.concatenate([ordered.ravel(), generator.permutation(np.concatenate(rest))])


def ramp_quantile(share: FloatArray) -> FloatArray:
    """Return the place in the alignment rows (0 to 1) before which ``share`` of the reasoning rows come."""
    # The inverse of the integral of the rate: 1.5 x / RAMP up to RAMP, then 1.5.
    return np.where(share < 0.5, RAMP * np.sqrt(2 * share), RAMP + (share - 0.5) / 1.5)


def expected_shares(alignment: int, reasoning: int, points: int = 200) -> tuple[FloatArray, FloatArray]:
    """Return row numbers of the file, ``[points]``, and the share of reasoning rows that the ramp means at each."""
    place = np.linspace(0, 1, points)
    before = np.where(place < RAMP, 0.75 * place**2 / RAMP, 0.5 + 1.5 * (place - RAMP))
    rate = 1.5 * np.minimum(place / RAMP, 1) * reasoning
    return place * alignment + before * reasoning, rate / np.maximum(alignment + rate, 1)


def draw_curriculum(path: Path, reasoning: npt.NDArray[np.bool_]) -> None:
    """Draw the share of reasoning rows along the file, ``[rows]``, to a ``.png``; same rows, same bytes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    bins = np.array_split(reasoning, min(60, len(reasoning)))
    middles = np.cumsum([len(part) for part in bins]) - [len(part) / 2 for part in bins]
    axes.bar(middles, [part.mean() for part in bins], width=len(bins[0]), color="tab:blue", label="as written")
    places, shares = expected_shares(int((~reasoning).sum()), int(reasoning.sum()))
    axes.plot(places, shares, color="tab:orange", label="the ramp")
    axes.set(xlabel="row of the file", ylabel="share of reasoning rows", ylim=(0, 1), title="Curriculum")
    axes.legend(loc="upper left")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png", metadata={"Software": None})
