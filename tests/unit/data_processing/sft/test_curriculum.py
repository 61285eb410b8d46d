from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_processing.sft.curriculum import RAMP, curriculum_order, expected_shares, ramp_quantile

sizes = st.integers(0, 400)


@settings(max_examples=25)
@given(st.lists(sizes, max_size=4), sizes, st.integers(0, 2**32), st.integers(1, 50))
def test_every_row_is_there_once_and_the_order_is_the_seeds(
    alignment: list[int], reasoning: int, seed: int, block: int
) -> None:
    order = curriculum_order(alignment, reasoning, seed=seed, block=block)
    assert sorted(order.tolist()) == list(range(sum(alignment) + reasoning))
    assert np.array_equal(order, curriculum_order(alignment, reasoning, seed=seed, block=block))


@settings(max_examples=25)
@given(st.lists(sizes, min_size=1, max_size=4), sizes, st.integers(1, 50))
def test_blocks_hold_one_task_and_leftovers_come_last(alignment: list[int], reasoning: int, block: int) -> None:
    order = curriculum_order(alignment, reasoning, seed=0, block=block)
    tasks = np.searchsorted(np.cumsum([*alignment, reasoning]), order, side="right")
    whole = sum(size // block for size in [*alignment, reasoning])
    blocks = tasks[: whole * block].reshape(whole, block)
    assert (blocks == blocks[:, :1]).all()


def test_another_seed_gives_another_order() -> None:
    assert not np.array_equal(curriculum_order([100], 50, seed=0), curriculum_order([100], 50, seed=1))


@pytest.mark.parametrize(("alignment", "reasoning"), [(9000, 3000), (20000, 6000), (3000, 6000), (5000, 100)])
def test_the_rate_rises_linearly_over_two_parts_and_then_stays(alignment: int, reasoning: int) -> None:
    order = curriculum_order([alignment // 2, alignment // 2], reasoning, seed=3)
    rows_before = np.cumsum(order < alignment)[order >= alignment] / alignment
    rates = np.histogram(rows_before, bins=12, range=(0, 1))[0] * 12 / reasoning
    middles = (np.arange(12) + 0.5) / 12
    expected = 1.5 * np.minimum(middles / RAMP, 1)
    assert np.abs(rates - expected).max() < 0.02 + 24 / reasoning
    shares = [part.mean() for part in np.array_split(order >= alignment, 12)]
    assert np.diff(shares).min() > -0.02


def test_half_of_the_reasoning_rows_come_in_the_last_part_and_none_as_a_block_at_the_end() -> None:
    order = curriculum_order([9000], 3000, seed=0)
    before = np.cumsum(order < 9000)[order >= 9000]
    assert abs((before > 6000).mean() - 0.5) < 0.002
    runs = np.diff(np.flatnonzero(np.diff(np.r_[0, order >= 9000, 0])))[::2]
    assert runs.max() <= 6


def test_both_kinds_are_shuffled_among_themselves() -> None:
    order = curriculum_order([2000], 2000, seed=0)
    for kind in (order[order < 2000], order[order >= 2000]):
        assert abs(np.corrcoef(kind, np.arange(2000))[0, 1]) < 0.1


@settings(max_examples=25)
@given(st.floats(0, 1))
def test_the_quantile_inverts_the_integral_of_the_rate(share: float) -> None:
    place = ramp_quantile(np.array([share]))[0]
    integral = 0.75 * place**2 / RAMP if place <= RAMP else 0.5 + 1.5 * (place - RAMP)
    assert integral == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize(("alignment", "reasoning"), [(9000, 3000), (3000, 6000), (5000, 0), (0, 50)])
def test_the_expected_shares_are_those_of_the_file(alignment: int, reasoning: int) -> None:
    places, shares = expected_shares(alignment, reasoning, points=3001)
    assert places[-1] == pytest.approx(alignment + reasoning)
    assert ((shares[1:] + shares[:-1]) / 2 * np.diff(places)).sum() == pytest.approx(reasoning, rel=0.01)
    written = curriculum_order([alignment], reasoning, seed=0) >= alignment
    parts = np.array_split(written, 10)
    middles = np.cumsum([len(part) for part in parts]) - [len(part) / 2 for part in parts]
    assert np.abs(np.interp(middles, places, shares) - [part.mean() for part in parts]).max() < 0.05
