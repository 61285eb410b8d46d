from __future__ import annotations

import doctest
import itertools
import random
from typing import Any

import pytest
import torch
import verl  # noqa: F401  loads the plugin
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from gream_verl.core.errors import InputError
from gream_verl.core.options import checked_options
from gream_verl.plugin import group_filter
from gream_verl.plugin.group_filter import BoundedGroupFilter, GroupFilterOptions, refill

BATCH = 4
RESPONSES = 3


class Queue:
    """An in-memory stand-in for TransferQueue, and for the trainer that generates at once."""

    def __init__(self, uniform: Any, failed: Any) -> None:
        self.failed = failed  # (number of the group) -> whether it has no response
        self.uniform = uniform  # (number of the group) -> whether its responses are all alike
        self.tags: dict[str, dict[str, Any]] = {}
        self.values: dict[str, float] = {}
        self.generated = 0
        self.numbers = itertools.count()

    def generate(self, prompts: int) -> None:
        for number in itertools.islice(self.numbers, prompts):
            self.generated += 1
            uid = f"u{number:04d}"
            failed = self.failed(number)
            self.tags[uid] = {"is_prompt": True, "status": "failure" if failed else "finished", "global_steps": 1}
            if failed:
                continue
            for session in range(RESPONSES):
                key = f"{uid}_{session}_0"
                self.tags[key] = {"seq_len": 7}
                self.values[key] = 0.0 if self.uniform(number) else float(session)

    def kv_list(self, *_: Any) -> dict[str, dict[str, Any]]:
        return {"train": self.tags}

    def kv_batch_get(self, keys: list[str], select_fields: list[str], **_: Any) -> dict[str, list[Any]]:
        if select_fields == ["rm_scores"]:
            return {"rm_scores": [torch.tensor([0.0, self.values[key]]) for key in keys]}
        return {"extra_fields": [{"reward_extra_info": {"match": self.values[key]}} for key in keys]}

    def kv_clear(self, partition_id: str, keys: list[str]) -> None:
        for key in keys:
            self.tags.pop(key, None)


class SlowQueue(Queue):
    """Its groups end one at a time, one at each look."""

    def generate(self, prompts: int) -> None:
        known = set(self.tags)
        super().generate(prompts)
        for key in self.tags.keys() - known:
            if "status" in self.tags[key]:
                self.tags[key] |= {"status": "running", "ends": self.tags[key]["status"]}

    def kv_list(self, *_: Any) -> dict[str, dict[str, Any]]:
        for tag in self.tags.values():
            if tag.get("status") == "running":
                tag["status"] = tag.pop("ends")
                break
        return super().kv_list()


@pytest.fixture
def sampler(monkeypatch):
    def make(
        uniform: Any, failed: Any = lambda _: False, kind: type[Queue] = Queue, **options: Any
    ) -> tuple[BoundedGroupFilter, Queue]:
        from verl.trainer.ppo.v1 import replay_buffer

        queue = kind(uniform, failed)
        monkeypatch.setattr(replay_buffer, "tq", queue)
        monkeypatch.setattr(group_filter, "tq", queue)
        kwargs: dict[str, Any] = {
            "metric": "match",
            "train_batch_size": BATCH,
            "max_num_gen_batches": 3,
            "poll_interval": 1e-4,
        }
        built = BoundedGroupFilter(
            trainer_mode="sync",
            trainer_config={},
            max_off_policy_threshold=8,
            max_off_policy_strategy="drop",
            sampler_kwargs=kwargs | options,
            refill_fn=queue.generate,
        )
        queue.generate(options.get("train_batch_size", BATCH))
        return built, queue

    return make


def groups_of(batch: Any) -> set[str]:
    return {key.split("_")[0] for key in batch.keys}


@pytest.mark.timeout(20)
def test_it_ends_when_every_group_is_uniform(sampler):
    built, queue = sampler(lambda number: True)
    batch, metrics = built.sample(1, "train", BATCH)
    assert queue.generated == 3 * BATCH
    assert len(groups_of(batch)) == BATCH
    assert len(batch.keys) == BATCH * RESPONSES
    assert metrics["training/filter_groups/uniform_kept"] == BATCH
    assert metrics["training/filter_groups/evicted_samples"] == 2 * BATCH
    assert metrics["training/filter_groups/eviction_rate"] == pytest.approx(2 / 3)


@pytest.mark.timeout(20)
def test_the_budget_starts_again_each_step(sampler):
    built, queue = sampler(lambda number: True)
    built.sample(1, "train", BATCH)
    queue.tags.clear()
    queue.generate(BATCH)
    batch, _ = built.sample(2, "train", BATCH)
    assert queue.generated == 6 * BATCH
    assert len(groups_of(batch)) == BATCH


@pytest.mark.timeout(20)
@pytest.mark.parametrize("metric", ["match", None])
def test_failed_groups_are_replaced_outside_the_budget(sampler, metric):
    built, queue = sampler(lambda _: False, lambda number: number in (1, 2), metric=metric, max_num_gen_batches=1)
    batch, metrics = built.sample(1, "train", BATCH)
    assert queue.generated == BATCH + 2
    assert groups_of(batch) == {"u0000", "u0003", "u0004", "u0005"}
    assert metrics["training/rollout_failure/evicted_samples"] == 2


@pytest.mark.timeout(20)
@pytest.mark.parametrize("metric", ["match", None])
def test_a_dead_engine_stops_the_training_with_what_to_do(sampler, metric):
    built, queue = sampler(lambda _: False, lambda number: number > 1, metric=metric)
    with pytest.raises(RuntimeError, match=r"\d groups of step 1 failed.*goes on from its last checkpoint"):
        built.sample(1, "train", BATCH)
    assert queue.generated <= 4 * BATCH


@pytest.mark.timeout(20)
def test_the_count_of_failures_starts_again_each_step(sampler):
    built, queue = sampler(lambda _: False, lambda number: number % 4 == 1)
    for step in (1, 2, 3):
        assert len(groups_of(built.sample(step, "train", BATCH)[0])) == BATCH
        queue.tags.clear()
        queue.generate(BATCH)


@pytest.mark.timeout(20)
def test_one_batch_means_no_second_generation(sampler):
    built, queue = sampler(lambda number: number % 2 == 0, max_num_gen_batches=1)
    batch, metrics = built.sample(1, "train", BATCH)
    assert queue.generated == BATCH
    assert len(groups_of(batch)) == BATCH
    assert metrics["training/filter_groups/uniform_kept"] == BATCH / 2


@pytest.mark.timeout(20)
def test_groups_that_teach_are_enough_without_a_refill(sampler):
    built, queue = sampler(lambda number: False)
    batch, metrics = built.sample(1, "train", BATCH)
    assert queue.generated == BATCH
    assert groups_of(batch) == {f"u{number:04d}" for number in range(BATCH)}
    assert metrics["training/filter_groups/uniform_kept"] == 0


@pytest.mark.timeout(20)
def test_uniform_groups_are_replaced_while_the_budget_lasts(sampler):
    built, queue = sampler(lambda number: number < BATCH)
    batch, metrics = built.sample(1, "train", BATCH)
    assert groups_of(batch).isdisjoint({f"u{number:04d}" for number in range(BATCH)})
    assert metrics["training/filter_groups/uniform_kept"] == 0
    assert queue.generated <= 3 * BATCH


@pytest.mark.timeout(20)
def test_without_a_metric_nothing_is_filtered(sampler):
    built, queue = sampler(lambda number: True, metric=None)
    batch, _ = built.sample(1, "train", BATCH)
    assert queue.generated == BATCH
    assert len(groups_of(batch)) == BATCH


@pytest.mark.timeout(20)
def test_it_stops_with_a_remedy_when_asked_to(sampler):
    built, _ = sampler(lambda number: number != 0, when_exhausted="raise")
    with pytest.raises(InputError, match=r"only 1 of 4 groups differ.*max_num_gen_batches"):
        built.sample(1, "train", BATCH)


@pytest.mark.timeout(20)
def test_rows_come_in_the_order_of_the_data_whatever_finished_first(sampler):
    @settings(max_examples=20)
    @given(st.permutations(range(BATCH * RESPONSES)))
    def check(finished: list[int]) -> None:
        built, queue = sampler(lambda number: False)
        rows = [key for key in queue.tags if "_" in key]
        queue.tags = {key: tag for key, tag in queue.tags.items() if key not in rows} | {
            rows[number]: {"seq_len": number} for number in finished
        }
        batch, _ = built.sample(1, "train", BATCH)
        assert batch.keys == rows
        assert [tag["seq_len"] for tag in batch.tags] == list(range(BATCH * RESPONSES))

    check()


def test_sessions_are_in_the_order_of_numbers(sampler):
    built, _ = sampler(lambda number: False)
    built.prompt_global_steps["train"] = {"u1": 1, "u0": 1}
    keys = ["u0_10_0", "u1_2_1", "u0_9_0", "u2_0_0", "u1_2_0"]
    batch = built._materialize_batch("train", ["u0", "u1"], {key: {} for key in keys})
    assert batch.keys == ["u1_2_0", "u1_2_1", "u0_9_0", "u0_10_0"]


def test_whatever_is_uniform_it_ends_with_a_full_batch_and_teaching_groups_first(sampler):
    @settings(max_examples=20)
    @given(
        st.lists(st.booleans(), min_size=64, max_size=64),
        st.integers(1, 4),
        st.integers(1, 3),
        st.sets(st.integers(0, 20), max_size=BATCH // 2),
        st.sampled_from([Queue, SlowQueue]),
    )
    def check(uniform: list[bool], batches: int, inflight: int, failed: set[int], kind: type[Queue]) -> None:
        built, queue = sampler(
            lambda number: uniform[number],
            lambda number: number in failed,
            kind,
            max_num_gen_batches=batches,
            max_inflight_gen_batches=inflight,
            poll_interval=1e-5,
        )
        batch, metrics = built.sample(1, "train", BATCH)
        chosen = groups_of(batch)
        numbers = range(queue.generated)
        teaching = {f"u{number:04d}" for number in numbers if not uniform[number] and number not in failed}
        assert len(chosen) == BATCH
        assert queue.generated <= batches * BATCH + len(failed & set(numbers))
        assert len(chosen & teaching) == min(BATCH, len(teaching))
        assert metrics["training/filter_groups/uniform_kept"] == BATCH - min(BATCH, len(teaching))

    check()


def test_docstring_examples():
    assert doctest.testmod(group_filter).failed == 0


@pytest.mark.timeout(60)
@pytest.mark.parametrize("pass_rate", [0.3, 0.6])
def test_a_step_generates_little_more_than_the_pass_rate_asks_for(sampler, pass_rate):
    size, generated = 64, 0
    for seed in range(3):
        draw = random.Random(seed)
        uniform = [draw.random() >= pass_rate for _ in range(9 * size)]
        options = {"train_batch_size": size, "max_num_gen_batches": 9, "max_inflight_gen_batches": 9}
        built, queue = sampler(uniform.__getitem__, kind=SlowQueue, **options)
        assert built.sample(1, "train", size)[1]["training/filter_groups/uniform_kept"] == 0
        generated += queue.generated / 3
    assert size / pass_rate * 0.8 < generated < size / pass_rate * 1.25  # verl's rule: 1.7 and 1.5 times


@given(st.integers(1, 300), st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
def test_a_refill_never_leaves_too_few_groups_in_flight(batch_size, inflight, passed, uniform):
    missing = batch_size - passed
    wanted = refill(batch_size, inflight, passed, passed + uniform)
    assert wanted + inflight >= missing
    assert wanted <= max(0, missing * (1.1 + 5 * uniform / batch_size) + 1)
    assert wanted <= refill(batch_size, inflight, passed, passed + uniform + 1)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"metric": "match", "train_batch_size": 4, "max_num_gen_batches": 0}, "max_num_gen_batches"),
        ({"metric": "match", "train_batch_size": 4}, "max_num_gen_batches"),
        ({"metric": "match", "train_batch_size": 4, "max_num_gen_batches": 2, "polls": 1}, "polls"),
    ],
)
def test_wrong_options_are_named(options, key):
    with pytest.raises(InputError, match=rf"{group_filter.OPTIONS}\.{key}"):
        checked_options(GroupFilterOptions, group_filter.OPTIONS, options)


def test_other_trainer_modes_are_refused():
    with pytest.raises(InputError, match="works with 'sync' only"):
        BoundedGroupFilter(trainer_mode="colocate_async", sampler_kwargs={}, refill_fn=None)


@pytest.mark.timeout(20)
def test_the_learning_signal_of_a_batch_is_logged(sampler):
    built, _ = sampler(lambda number: number % 2, bgae=OmegaConf.create({"k": 2, "success": 2.0}))
    _, metrics = built.sample(1, "train", BATCH)
    evicted = metrics["training/filter_groups/evicted_samples"]
    assert metrics["training/filter_groups/eviction_rate"] == evicted / (evicted + BATCH) > 0
    assert metrics["bgae/groups_without_hit"] == 0
    assert metrics["bgae/groups_without_advantage"] == 0
    assert metrics["bgae/hits_mean"] == 1
    assert metrics["bgae/bonus_abs_mean"] > 0


@pytest.mark.timeout(20)
def test_hits_are_not_counted_in_expected_rewards(sampler):
    built, _ = sampler(lambda number: number % 2, bgae=OmegaConf.create({"expected": True}))
    _, metrics = built.sample(1, "train", BATCH)
    assert not any(name.startswith("bgae/") for name in metrics)
