"""Dynamic sampling that ends (``trainer.v1.sampler.custom_sampler.name=BoundedGroupFilter``).

A group whose responses all have the same value of the filter metric teaches nothing. verl evicts it and generates
another prompt, ignores ``algorithm.filter_groups.max_num_gen_batches`` (verl/trainer/ppo/v1/trainer_base.py:208), and
so generates forever when every group is uniform. Here a training step generates at most that many batches of prompts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from typing import Any, Literal

import numpy as np
import torch
import transfer_queue as tq
from pydantic import BaseModel, ConfigDict, Field
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer

from gream_verl.core.errors import InputError
from gream_verl.core.options import checked_options
from gream_verl.plugin.bgae import BgaeOptions, group_statistics
from gream_verl.plugin.watchdog import Watchdog

OPTIONS = "trainer.v1.sampler.sampler_kwargs"
RESTART = "Start the run again: it goes on from its last checkpoint"
HANGS = f"If steps take that long, validation and checkpoint included, raise {OPTIONS}.step_timeout. Else: {RESTART}"


class GroupFilterOptions(BaseModel):
    """Options below ``trainer.v1.sampler.sampler_kwargs``; the recipes copy some of them from other nodes.

    Attributes:
        metric: Key of ``reward_extra_info`` to compare within a group, or ``reward``; None for no filter.
        train_batch_size: Prompts of a training step.
        max_num_gen_batches: Batches of ``train_batch_size`` prompts that a training step may generate.
        max_inflight_gen_batches: Batches that may be generated at the same time.
        max_failed_share: Share of ``train_batch_size`` that may fail in a step, without any response, and be replaced.
        when_exhausted: ``fill`` the batch up with uniform groups, which have no advantage, or ``raise`` an error.
        bgae: Options of the advantage estimator, to log the learning signal of sampled rewards (``bgae/...``). None
            logs nothing, as a reward model that shares the actor's GPUs needs, because its rewards come too late.
        step_timeout: Seconds from one batch to the next, validation and checkpoint included, after which the training
            hangs and is ended; None for never.
        poll_interval: Seconds between two looks at the queue; verl's own 2 s are longer than a step of a small model.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str | None
    train_batch_size: int = Field(ge=1)
    max_num_gen_batches: int = Field(ge=1)
    max_inflight_gen_batches: int = Field(default=1, ge=1)
    max_failed_share: float = Field(default=0.5, ge=0)
    when_exhausted: Literal["fill", "raise"] = "fill"
    bgae: BgaeOptions | None = None
    step_timeout: float | None = Field(default=None, gt=0)
    poll_interval: float = Field(default=0.2, gt=0)


def refill(batch_size: int, inflight: int, passed: int, seen: int) -> int:
    """Return the number of prompts to generate, besides those in flight, until ``batch_size`` groups pass the filter.

    The groups that are missing, over the pass rate of the step so far, and a tenth more. The rate starts at 1, with
    the weight of a quarter of a batch, so that the first uniform groups do not ask for many prompts.

    >>> refill(256, inflight=200, passed=16, seen=56)
    196
    """
    guess = batch_size / 4
    rate = (passed + guess) / (seen + guess)
    return max(0, math.ceil(1.1 * (batch_size - passed) / rate) - inflight)


class BoundedGroupFilter(ReplayBuffer):
    """verl's synchronous sampler with a budget of prompts per step.

    1. A uniform group is evicted while the other groups and the budget can fill a batch.
    2. Refills stop at what the pass rate of the step asks for; verl's two prompts for each evicted group are too many.
    3. Groups that failed are replaced, whatever the budget. Too many of them stop the training; verl would train
       without them, and wait for a dead rollout engine forever.
    4. A batch takes groups that teach something first, and uniform ones only when the budget is spent.
    """

    def __init__(self, *, trainer_mode: str, sampler_kwargs: Mapping[str, Any], refill_fn: Any, **kwargs: Any) -> None:
        if trainer_mode != "sync":
            raise InputError(
                f"trainer.v1.trainer_mode={trainer_mode}: BoundedGroupFilter works with 'sync' only; "
                "set trainer.v1.sampler.custom_sampler.path and name to null"
            )
        self.options = checked_options(GroupFilterOptions, OPTIONS, sampler_kwargs)
        timeout = self.options.step_timeout
        self._watchdog = Watchdog(timeout, f"gream-verl: no new batch for {timeout} s. {HANGS}") if timeout else None
        self._budget = self._wanted = 0
        self._generate = refill_fn
        super().__init__(
            trainer_mode=trainer_mode,
            sampler_kwargs=sampler_kwargs,
            refill_fn=self._generate_within_budget,
            poll_interval=self.options.poll_interval,
            filter_groups_metric=self.options.metric,
            train_batch_size=self.options.train_batch_size,
            gen_batch_size=1,  # verl fetches single prompts when filter_groups is on (trainer_base.py:733)
            max_inflight_gen_batches=self.options.max_inflight_gen_batches,
            sync_refill_failed_groups=True,
            **kwargs,
        )

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict]:
        """Wait for a batch and return it, with metrics; see ``ReplayBuffer.sample``."""
        if self._watchdog is not None:
            self._watchdog.feed()
        # The trainer has already asked for one batch.
        self._budget = (self.options.max_num_gen_batches - 1) * self.options.train_batch_size
        self._uniform_kept = self._failed = self._evicted = 0
        batch, metrics = super().sample(global_steps, partition_id, batch_size)
        if partition_id == "val":
            return batch, metrics
        if self.options.metric is not None:
            metrics["training/filter_groups/uniform_kept"] = self._uniform_kept
            evicted = metrics.get("training/filter_groups/evicted_samples", 0)
            metrics["training/filter_groups/eviction_rate"] = evicted / (evicted + batch_size)
        if self.options.bgae is not None and not self.options.bgae.expected:
            data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["rm_scores"])
            rewards = torch.stack([scores.sum() for scores in data["rm_scores"]])
            groups = torch.from_numpy(np.unique([key.split("_")[0] for key in batch.keys], return_inverse=True)[1])
            statistics = group_statistics(rewards, groups, self.options.bgae)
            metrics |= {f"bgae/{name}": value for name, value in statistics.items()}
        return batch, metrics

    def _first(self, partition_id: str, uids: set[str], count: int) -> list[str]:
        """Return the first ``count`` of ``uids`` in the order of the data."""
        return list(islice((uid for uid in self.prompt_global_steps[partition_id] if uid in uids), count))

    def _generate_within_budget(self, prompts: int) -> None:
        prompts = min(prompts, self._budget, self._wanted)
        if prompts > 0:
            self._budget -= prompts
            self._generate(prompts)

    def _terminal_eviction_reasons(self, global_steps: int, partition_id: str) -> tuple[set, set, set, Counter]:
        stale, uniform, failed, _ = super()._terminal_eviction_reasons(global_steps, partition_id)
        self._failed += len(failed)
        self._budget += len(failed)
        if self._failed > self.options.max_failed_share * self.options.train_batch_size:
            raise RuntimeError(
                f"{self._failed} groups of step {global_steps} failed, more than {OPTIONS}.max_failed_share="
                f"{self.options.max_failed_share} of a batch; the messages above say why. {RESTART}"
            )
        # Evict only as many uniform groups as the others and the budget can replace.
        inflight = len(self.pending_keys[partition_id]) + len(self.running_keys[partition_id])
        ended = len(self.finished_keys[partition_id]) + len(self.failure_keys[partition_id]) - len(failed)
        spare = max(0, inflight + ended + self._budget - self.options.train_batch_size)
        evicted = set(self._first(partition_id, uniform, spare))
        passed = ended - len(uniform)
        self._wanted = refill(self.options.train_batch_size, inflight, passed, ended + self._evicted)
        self._evicted += len(evicted)
        values = self._dapo_classification_cache[partition_id]
        return stale, evicted, failed, Counter(values[uid] for uid in evicted)

    def _materialize_batch(
        self, partition_id: str, selected_prompt_uids: list[str], partition_snapshot: dict[str, dict]
    ) -> KVBatchMeta:
        """Return the batch in the order of the data; verl's snapshot has the responses in the order they finished.

        verl cuts mini-batches from consecutive rows, so its order puts the short responses of all groups first. Here a
        mini-batch holds whole groups. With several ranks, verl deals the rows out by length and keeps their order
        within a rank (trainer_base.py:1608): a group then lies on several ranks, in one mini-batch or two neighbours.
        """
        number = {uid: number for number, uid in enumerate(self.prompt_global_steps[partition_id])}
        chosen, rows = set(selected_prompt_uids), []
        for key in partition_snapshot:
            uid, session, output = key.split("_")
            if uid in chosen:
                rows.append((number[uid], int(session), int(output), key))
        in_order = {key: partition_snapshot[key] for *_, key in sorted(rows)}
        return super()._materialize_batch(partition_id, selected_prompt_uids, in_order)

    def _select_prompt_uids(
        self, partition_id: str, sampleable_keys: set[str], batch_size: int
    ) -> tuple[list[str], dict[str, dict], dict[str, int]]:
        uniform = self._dapo_filtered_keys(partition_id)[0] & sampleable_keys
        kept = set(self._first(partition_id, sampleable_keys - uniform, batch_size))
        missing = batch_size - len(kept)
        if not uniform or not missing:
            return super()._select_prompt_uids(partition_id, kept, batch_size)
        if self.options.when_exhausted == "raise":
            raise InputError(
                f"algorithm.filter_groups: only {len(kept)} of {batch_size} groups differ in {self.options.metric!r} "
                f"after {self.options.max_num_gen_batches} batches; raise max_num_gen_batches"
            )
        self._uniform_kept = missing
        kept.update(self._first(partition_id, uniform, missing))
        return super()._select_prompt_uids(partition_id, kept, batch_size)
