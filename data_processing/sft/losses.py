"""The training loss of each task, from what the trainer logs of all of them together.

LLaMA-Factory logs one loss a step, over rows of several tasks. But it trains rows in the order of the file, and logs
how many tokens it has seen, so that the rows of each step are known. Hugging Face's loss of a step is a sum over its
supervised tokens, hence linear in the losses of the tasks: least squares over the steps give those.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import block_diag

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

KNOTS = 24
"""Most points a curve may have."""
STIFFNESS = tuple(10.0 ** np.arange(4, -5, -1))
"""Weights of the bends of curves against the misfit of the losses; the data choose among these."""
CAUTION = 1.4
"""What a degree of freedom costs in that choice: with 1, few steps are followed into their noise (Kim and Gu 2004)."""
VAGUE = 0.1
"""Standard error, as a share of the mean loss, above which a point of a curve says too little to be shown."""


class OrderError(ValueError):
    """The trainer did not see the rows in the order of the file; the message says where that shows."""


@dataclass(frozen=True)
class Schedule:
    """Which rows a training has seen, in order.

    Attributes:
        rows: Row of the file at every place of the training, epoch after epoch, ``[places]``.
        ends: Place behind the last one of every optimizer step, ``[steps]``.
        ranks: Processes that trained, each on its own batches.
    """

    rows: Ints
    ends: Ints
    ranks: int

    @classmethod
    def of(cls, rows: int, steps: int, *, batch: int, accumulation: int, ranks: int) -> Schedule:
        """Return the schedule of Hugging Face's trainer without shuffling.

        Ranks take batches in turn. The last step of an epoch is shorter than the others; with several ranks its batches
        are filled up with the first rows of the epoch (accelerate's ``even_batches``).

        Args:
            rows: Rows of the file.
            steps: Optimizer steps.
            batch: Rows a rank takes at once.
            accumulation: Batches a rank takes in a step.
            ranks: Processes.
        """
        whole = -(-rows // (batch * ranks)) * batch * ranks
        epoch = np.resize(np.arange(rows), whole if ranks > 1 else rows)
        size = batch * accumulation * ranks
        ends = np.minimum(np.arange(size, len(epoch) + size, size), len(epoch))
        epochs = np.arange(-(-steps // len(ends)))
        all_ends = (ends + len(epoch) * epochs[:, None]).ravel()[:steps]
        return cls(np.tile(epoch, len(epochs))[: all_ends[-1]], all_ends, ranks)

    @classmethod
    def find(cls, lengths: Ints, steps: Ints, seen: Ints, *, batch: int, accumulation: int) -> Schedule:
        """Return the schedule by which the trainer saw as many tokens as it logged; the number of ranks follows.

        Args:
            lengths: Tokens of every row of the file, ``[rows]``.
            steps: The logged steps, ``[logged]``.
            seen: Tokens without padding that were seen up to each, ``[logged]``.
            batch: Rows a rank takes at once.
            accumulation: Batches a rank takes in a step.

        Raises:
            OrderError: When the rows in the order of the file do not make the logged numbers.
        """
        ranks, first = 0, 0
        while first < seen[0]:
            ranks += 1
            start = cls.of(len(lengths), int(steps[0]), batch=batch, accumulation=accumulation, ranks=ranks)
            first = int(lengths[start.rows].sum())
        schedule = cls.of(len(lengths), int(steps[-1]), batch=batch, accumulation=accumulation, ranks=max(ranks, 1))
        expected = np.cumsum(lengths[schedule.rows])[schedule.ends[steps - 1] - 1]
        if len(wrong := np.flatnonzero(expected != seen)):
            at = wrong[0]
            raise OrderError(
                f"at step {steps[at]} the trainer had seen {seen[at]:,} tokens, but the rows in the order of the file, "
                f"{batch} at a time, have {expected[at]:,}"
            )
        return schedule

    def padding(self, lengths: Ints, batch: int, multiple: int = 8) -> float:
        """Return the share of padding in what the model computes.

        Args:
            lengths: Tokens of every row of the file.
            batch: Rows of a batch, all of them padded to the longest.
            multiple: What LLaMA-Factory rounds the longest up to.
        """
        seen = lengths[self.rows]
        # An epoch is a whole number of batches, save that the last of a single process may be a shorter one.
        epoch = len(lengths) if self.ranks == 1 else len(seen)
        starts = np.concatenate([np.arange(at, min(at + epoch, len(seen)), batch) for at in range(0, len(seen), epoch)])
        sizes = np.diff(np.append(starts, len(seen)))
        longest = -(-np.maximum.reduceat(seen, starts) // multiple) * multiple
        return float(1 - seen.sum() / (longest * sizes).sum())


def task_shares(
    schedule: Schedule, steps: Ints, kinds: Ints, predicted: Ints, labels: Ints, tasks: int
) -> tuple[Floats, Floats]:
    """Return by how much the loss of each task counts in each logged loss: ``loss[i] = shares[i] @ loss_of_tasks``.

    Args:
        schedule: The rows of every step.
        steps: The logged steps; a logged loss is the mean over the steps since the one before, ``[logged]``.
        kinds: Task of every row of the file, from 0, ``[rows]``.
        predicted: Tokens of every row whose loss is summed up: supervised, and not the first of the row, ``[rows]``.
        labels: Tokens of every row by whose number the trainer divides: all supervised ones, ``[rows]``.
        tasks: How many tasks there are.

    Returns:
        The shares, ``[logged, tasks]``, and the supervised tokens behind every logged loss, ``[logged]``.
    """
    step = np.repeat(np.arange(len(schedule.ends)), np.diff(schedule.ends, prepend=0))
    cells = step * tasks + kinds[schedule.rows]
    sums = np.bincount(cells, predicted[schedule.rows], minlength=len(schedule.ends) * tasks).reshape(-1, tasks)
    totals = np.bincount(step, labels[schedule.rows])
    before = np.append(0, steps[:-1])
    shares = np.add.reduceat(sums / totals[:, None], before) / (steps - before)[:, None]
    return shares, np.add.reduceat(totals, before)


@dataclass(frozen=True)
class Curve:
    """The loss of one task along the training: lines between points.

    Attributes:
        steps: Steps of the points, ``[points]``.
        loss: Mean loss of a token, in nats; NaN where the steps cannot, or only vaguely, tell the task from others.
        errors: Standard errors; NaN when there are too few steps for any.
    """

    steps: Floats
    loss: Floats
    errors: Floats


def loss_by_task(steps: Ints, losses: Floats, shares: Floats, tokens: Floats) -> list[Curve]:
    """Return the loss of each task as lines between knots, fitted to the logged losses by penalised least squares.

    A task's knots lie where its rows do, closer at the beginning, where the loss falls fast. There are more of them
    than the noise allows: bends cost, how much is chosen by generalised cross-validation. The noise is larger at the
    beginning, too, so that the fit is made twice: the second time, steps count by the noise that the first one left.

    Args:
        steps: The logged steps, ascending, ``[logged]``.
        losses: Their losses, ``[logged]``.
        shares: What ``task_shares`` returns, ``[logged, tasks]``.
        tokens: Supervised tokens behind each loss, the first weights, ``[logged]``.

    Returns:
        One curve for each task.
    """
    knots = [_knots(steps[share > 0]) for share in shares.T]
    hats = [
        share[:, None] * np.stack([np.interp(steps, places, unit) for unit in np.eye(len(places))], axis=1)
        for share, places in zip(shares.T, knots, strict=True)
        if len(places)
    ]
    design, bends = np.concatenate(hats, axis=1), block_diag(*map(_bends, knots))
    values, _ = _fit(design, bends, losses, tokens)
    noise = smooth(tokens * (losses - design @ values) ** 2, max(len(steps) // 8, 10))
    values, errors = _fit(design, bends, losses, tokens / (noise + 1e-9))
    values[errors > VAGUE * np.average(losses, weights=tokens)] = np.nan
    bounds = np.cumsum([0, *map(len, knots)])
    return [
        Curve(places, values[start:end], errors[start:end])
        for places, start, end in zip(knots, bounds[:-1], bounds[1:], strict=True)
    ]


def _knots(held: Ints) -> Floats:
    """Return the knots of a task, from the first to the last of the steps that have rows of it."""
    count = min(KNOTS, max(2, len(held) // 2))
    return np.unique(np.quantile(held, np.linspace(0, 1, count) ** 2, method="nearest")) if len(held) else np.zeros(0)


def _bends(knots: Floats) -> Floats:
    """Return the matrix that makes of values at knots how far each lies from the line between its neighbours."""
    before, here, after = knots[:-2], knots[1:-1], knots[2:]
    weight = ((after - here) / (after - before))[:, None]
    units = np.eye(len(knots))
    return units[1:-1] - weight * units[:-2] - (1 - weight) * units[2:]


def _fit(design: Floats, bends: Floats, losses: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Return the values at the knots and their standard errors; infinite ones where a value is not determined.

    The errors are those of the posterior when bends are as the chosen stiffness has them, so that they hold the bias of
    the smoothing, too (Wahba 1983).
    """
    roots = np.sqrt(weights / weights.mean())
    design, losses = design * roots[:, None], losses * roots
    fits = []
    for stiffness in STIFFNESS:
        stacked = np.concatenate([design, np.sqrt(stiffness) * bends])
        scale = np.linalg.norm(stacked, axis=0)
        left, singular, right = np.linalg.svd(stacked / scale, full_matrices=False)
        kept = singular > 1e-8 * singular[0]
        left, singular, right = left[: len(losses), kept], singular[kept], right[kept]
        values = right.T @ (left.T @ losses / singular) / scale
        squares, used = float(((losses - design @ values) ** 2).sum()), float((left**2).sum())
        free, cautious = len(losses) - used, len(losses) - CAUTION * used
        noise = squares / free if free > 1e-6 else np.nan
        errors = np.sqrt(noise * ((right / singular[:, None]) ** 2).sum(0)) / scale
        errors[(right**2).sum(0) < 1 - 1e-6] = np.inf
        fits.append((squares / cautious**2 if cautious > 0 else np.inf, values, errors))
    return min(fits, key=lambda fit: fit[0])[1:]


def smooth(values: Floats, width: int) -> Floats:
    """Return running means over ``width`` values to either side."""
    sums = np.cumsum(np.append(0, values))
    places = np.arange(len(values))
    start, end = np.maximum(places - width, 0), np.minimum(places + width + 1, len(values))
    return (sums[end] - sums[start]) / (end - start)
