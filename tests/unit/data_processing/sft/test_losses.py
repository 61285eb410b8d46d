from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_processing.sft.losses import OrderError, Schedule, loss_by_task, smooth, task_shares

SIZES = {"batch": st.integers(1, 5), "accumulation": st.integers(1, 3)}


@settings(max_examples=60)
@given(rows=st.integers(1, 40), ranks=st.integers(1, 4), steps=st.integers(1, 30), **SIZES)
def test_a_schedule_is_that_of_accelerate_and_of_the_trainers_loop(rows, ranks, steps, batch, accumulation):
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler, SequentialSampler

    sampler = BatchSampler(SequentialSampler(range(rows)), batch, drop_last=False)
    shards = [BatchSamplerShard(sampler, ranks, rank) if ranks > 1 else sampler for rank in range(ranks)]
    expected = []
    while len(expected) < steps:  # epoch by epoch, as transformers' Trainer does
        turns = [[*chain(*turn)] for turn in zip(*shards, strict=True)]
        expected += [[*chain(*turns[at : at + accumulation])] for at in range(0, len(turns), accumulation)]
    schedule = Schedule.of(rows, steps, batch=batch, accumulation=accumulation, ranks=ranks)
    found = [part.tolist() for part in np.split(schedule.rows, schedule.ends[:-1])]
    assert [sorted(step) for step in found] == [sorted(step) for step in expected[:steps]]


@given(ranks=st.integers(1, 4), every=st.integers(1, 3), seed=st.integers(0, 99), **SIZES)
def test_the_ranks_follow_from_the_tokens_seen_and_another_order_is_told(ranks, every, seed, batch, accumulation):
    lengths = np.random.default_rng(seed).integers(20, 2000, 150)
    schedule = Schedule.of(150, 12, batch=batch, accumulation=accumulation, ranks=ranks)
    steps = np.arange(every, 13, every)
    seen = np.cumsum(lengths[schedule.rows])[schedule.ends[steps - 1] - 1]
    found = Schedule.find(lengths, steps, seen, batch=batch, accumulation=accumulation)
    assert found.ranks == ranks
    assert found.rows.tolist() == schedule.rows[: schedule.ends[steps[-1] - 1]].tolist()
    with pytest.raises(OrderError, match=rf"at step {steps[-1]} the trainer had seen"):
        Schedule.find(lengths, steps, seen + (steps == steps[-1]), batch=batch, accumulation=accumulation)
    with pytest.raises(OrderError, match=f"at step {every} the trainer had seen"):
        Schedule.find(lengths[::-1] + 1, steps, seen, batch=batch, accumulation=accumulation)


def test_padding_is_what_batches_of_unlike_rows_have_too_much():
    lengths = np.array([8, 4, 16, 16, 7])
    one = Schedule.of(5, 6, batch=2, accumulation=1, ranks=1)  # two epochs of 8 4 | 16 16 | 7
    assert one.padding(lengths, 2) == pytest.approx(1 - 51 / (16 + 32 + 8))
    two = Schedule.of(5, 2, batch=2, accumulation=1, ranks=2)  # 8 4 | 16 16 and 7 8 | 4 16
    assert two.padding(lengths, 2) == pytest.approx(1 - 79 / (16 + 32 + 16 + 32))


def run(seed: int, *, every: int, block: int, steps: int = 240):
    """A training of three tasks in blocks, the third of which comes late."""
    generator = np.random.default_rng(seed)
    rows = steps * 8
    kinds = np.repeat(generator.choice(2, rows // block), block)
    kinds[rows // 2 :: 3] = 2
    lengths = generator.integers(10, 200, rows)
    schedule = Schedule.of(rows, steps, batch=8, accumulation=1, ranks=1)
    logged = np.arange(every, steps + 1, every)
    return generator, kinds, lengths, schedule, logged, *task_shares(schedule, logged, kinds, lengths - 1, lengths, 3)


@given(seed=st.integers(0, 99), every=st.integers(1, 4), block=st.sampled_from([1, 4, 8]))
def test_logged_losses_are_the_shares_of_the_tasks_losses(seed, every, block):
    _, kinds, lengths, schedule, logged, shares, tokens = run(seed, every=every, block=block)
    of_task = np.array([1.0, 2.0, 5.0])
    parts = np.split(schedule.rows, schedule.ends[:-1])
    of_step = [((lengths[part] - 1) * of_task[kinds[part]]).sum() / lengths[part].sum() for part in parts]
    expected = [np.mean(of_step[step - every : step]) for step in logged]
    assert shares @ of_task == pytest.approx(expected)
    assert tokens.sum() == lengths[schedule.rows[: schedule.ends[logged[-1] - 1]]].sum()


@settings(max_examples=25)
@given(seed=st.integers(0, 99), block=st.sampled_from([1, 4, 8]))
def test_falling_losses_are_found_exactly_without_noise_and_within_their_errors_with_it(seed, block):
    generator, _, _, _, logged, shares, tokens = run(seed, every=1, block=block)
    truth = np.stack([3 - logged / 200, 2 + 0 * logged, 4 - logged / 100])
    plain = np.einsum("st,ts->s", shares, truth)
    for curve, line in zip(loss_by_task(logged, plain, shares, tokens), truth, strict=True):
        assert np.isfinite(curve.loss).any()
        assert curve.loss == pytest.approx(np.interp(curve.steps, logged, line), abs=1e-6, nan_ok=True)
    noisy = plain + generator.normal(0, 0.8, len(logged)) / np.sqrt(tokens)
    for curve, line in zip(loss_by_task(logged, noisy, shares, tokens), truth, strict=True):
        assert np.abs(curve.loss - np.interp(curve.steps, logged, line)) / curve.errors == pytest.approx(0, abs=5)
        assert (curve.errors < 0.2).all()


def test_standard_errors_cover_as_often_as_they_should():
    scores = []
    for seed in range(60):
        generator, _, _, _, logged, shares, tokens = run(seed, every=1, block=4)
        truth = np.array([3.0, 2.0, 4.0])
        losses = shares @ truth + generator.normal(0, 3, len(logged)) / np.sqrt(tokens)
        for curve, line in zip(loss_by_task(logged, losses, shares, tokens), truth, strict=True):
            scores += ((curve.loss - line) / curve.errors).tolist()
    assert 0.6 < (np.abs(scores) < 1).mean() < 0.75  # 0.68


def test_steep_falls_with_noise_that_shrinks_are_told_without_bias_and_with_honest_errors():
    off, scores, ends = [], [], []
    for seed in range(12):
        generator, _, _, _, logged, shares, tokens = run(seed, every=1, block=4, steps=300)
        height, rate = np.array([[2.0], [1.5], [1.0]]), np.array([[20.0], [15.0], [30.0]])
        truth = height + 5 * np.exp(-logged / rate)
        noise = generator.normal(0, 0.5 + 2 * np.exp(-logged / 50)) / np.sqrt(tokens)
        losses = np.einsum("st,ts->s", shares, truth) + noise
        for curve, line in zip(loss_by_task(logged, losses, shares, tokens), truth, strict=True):
            miss = curve.loss - np.interp(curve.steps, logged, line)
            off += miss[np.isfinite(miss)].tolist()
            scores += (miss / curve.errors)[np.isfinite(miss)].tolist()
            ends.append(miss[-1] / curve.errors[-1])
    assert np.mean(np.abs(off)) < 0.03
    assert 0.62 < (np.abs(scores) < 1).mean() < 0.76  # 0.68
    assert 0.5 < (np.abs(ends) < 1).mean() < 0.9


def test_steps_of_few_tokens_count_little():
    off, generator = [], np.random.default_rng(0)
    tokens = np.tile([1, 1, 1, 1000], 30)
    for _ in range(20):
        losses = 2 + generator.normal(0, 1, 120) / np.sqrt(tokens)
        (curve,) = loss_by_task(np.arange(1, 121), losses, np.ones((120, 1)), tokens)
        off.append(np.abs(curve.loss - 2).mean())
    assert np.mean(off) < 0.02  # of all steps alike it would be 0.08


def test_a_task_in_two_of_many_steps_is_told_too_vaguely_to_be_shown():
    generator, shares = np.random.default_rng(0), np.tile([1.0, 0.0], (60, 1))
    shares[[20, 40]] = [0.8, 0.2]
    losses = shares @ [2.0, 5.0] + generator.normal(0, 0.1, 60)
    told, vague = loss_by_task(np.arange(1, 61), losses, shares, np.full(60, 100))
    assert told.loss == pytest.approx(2, abs=0.1)
    assert vague.steps.tolist() == [21, 41]
    assert np.isnan(vague.loss).all()
    assert (vague.errors > 0.3).all()


def test_tasks_that_the_steps_cannot_tell_apart_have_no_loss():
    steps, generator = np.arange(1, 41), np.random.default_rng(0)
    alone = generator.random(40)
    shares = np.stack([alone, (1 - alone) / 2, (1 - alone) / 2], axis=1)
    found = loss_by_task(steps, shares @ [1.0, 2.0, 3.0], shares, np.full(40, 100))
    assert found[0].loss == pytest.approx(1)
    assert np.isnan(found[1].loss).all()
    assert np.isnan(found[2].loss).all()


def test_one_step_of_one_task_gives_its_loss_and_no_error():
    (curve,) = loss_by_task(np.array([5]), np.array([2.5]), np.ones((1, 1)), np.array([10]))
    assert curve.loss.tolist() == [2.5]
    assert np.isnan(curve.errors).all()


def test_a_task_without_rows_has_an_empty_curve():
    shares = np.tile([1.0, 0.0], (9, 1))
    _, empty = loss_by_task(np.arange(1, 10), np.full(9, 2.0), shares, np.full(9, 10))
    assert len(empty.loss) == 0


@pytest.mark.parametrize("count", [1, 39, 40, 407])
def test_smoothing_is_a_running_mean(count):
    values = np.random.default_rng(count).random(count)
    assert smooth(values, 10) == pytest.approx([values[max(at - 10, 0) : at + 11].mean() for at in range(count)])
