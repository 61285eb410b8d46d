"""Dynamic sampling that ends (``trainer.v1.sampler.custom_sampler.name=BoundedGroupFilter``).

A group whose responses all have the same value of the filter metric teaches nothing. verl evicts it and generates
another prompt, ignores ``algorithm.filter_groups.max_num_gen_batches`` (verl/trainer/ppo/v1/trainer_base.py:208), and
so generates forever when every group is uniform. Here a training step generates at most that many batches of prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
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

EvictionReasons = tuple[set[str], set[str], set[str], Counter]


class GroupFilterOptions(BaseModel):
    """What may stand under ``trainer.v1.sampler.sampler_kwargs``; the recipes fill in what other nodes say.

    Attributes:
        metric: Key of ``reward_extra_info`` to compare within a group, ``reward`` for the reward itself; None for no
            filter.
        train_batch_size: Prompts a training step uses.
        max_num_gen_batches: Batches of ``train_batch_size`` prompts a training step may generate.
        max_inflight_gen_batches: Batches that may be generated at the same time; no limit with ``reproducible``.
        max_failed_share: Share of ``train_batch_size`` that may fail in a step: groups without any response, because
            the rollout engine or the reward raised. They are replaced; more of them stop the training.
        when_exhausted: ``fill``: the last uniform groups fill the batch up; they have no advantage, so the step learns
            from the groups there are. ``raise``: stop the training.
        bgae: Options of the advantage estimator, to log what a batch has to teach (``bgae/...``); None logs nothing.
            Needs rewards at sampling time, so None with a reward model that shares the actor's GPUs.
        reproducible: Decide only when all groups at hand are finished, and in the order of the data, so that the same
            responses always lead to the same batches; costs generation time, because stragglers hold up refills.
        step_timeout: Seconds from one call for a batch to the next, validation and checkpoints included, after which
            the training is ended because it hangs; None for never.
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
    reproducible: bool = False
    step_timeout: float | None = Field(default=None, gt=0)
    poll_interval: float = Field(default=0.2, gt=0)


def read_options(sampler_kwargs: Mapping[str, Any]) -> GroupFilterOptions:
    """Return the checked options.

    Raises:
        InputError: When a key is missing, unknown or has a wrong value; the message names it.
    """
    return checked_options(GroupFilterOptions, OPTIONS, sampler_kwargs)


class BoundedGroupFilter(ReplayBuffer):
    """verl's synchronous sampler with a budget of prompts a step.

    A uniform group is evicted only while the groups at hand and those the budget still allows fill a batch. So every
    step gets its full batch: groups that teach something first, and uniform ones only when the budget is spent. The log
    has the uniform groups kept and the share of groups evicted, ``evicted / (evicted + batch)``.

    Groups that failed are replaced, whatever the budget; verl would train without them, also when a dead rollout engine
    fails them all, and then wait for that engine forever.
    """

    def __init__(self, *, trainer_mode: str, sampler_kwargs: Mapping[str, Any], refill_fn: Any, **kwargs: Any) -> None:
        if trainer_mode != "sync":
            raise InputError(
                f"trainer.v1.trainer_mode: BoundedGroupFilter works with 'sync' only, got {trainer_mode!r}; "
                "set trainer.v1.sampler.custom_sampler.path and name to null"
            )
        self.options = read_options(sampler_kwargs)
        timeout = self.options.step_timeout
        self._watchdog = Watchdog(timeout, f"gream-verl: no new batch for {timeout} s. {HANGS}") if timeout else None
        self._budget = 0
        self._generate = refill_fn
        inflight = self.options.max_inflight_gen_batches
        if self.options.reproducible:
            # verl sends off later, or never, what a refill has no room for: room for all of it
            inflight = self.options.max_num_gen_batches + 1
        super().__init__(
            trainer_mode=trainer_mode,
            sampler_kwargs=sampler_kwargs,
            refill_fn=self._generate_within_budget,
            poll_interval=self.options.poll_interval,
            filter_groups_metric=self.options.metric,
            train_batch_size=self.options.train_batch_size,
            gen_batch_size=1,  # verl fetches single prompts when filter_groups is on (trainer_base.py:733)
            max_inflight_gen_batches=inflight,
            sync_refill_failed_groups=True,
            **kwargs,
        )

    def sample(self, global_steps: int, partition_id: str, batch_size: int) -> tuple[KVBatchMeta, dict]:
        """Wait for a batch and return it, with metrics; see ``ReplayBuffer.sample``.

        Raises:
            InputError: When the budget is spent, the batch is not full of groups that teach something, and
                ``when_exhausted`` is ``raise``.
            RuntimeError: When too many groups fail.
        """
        if self._watchdog is not None:
            self._watchdog.feed()
        # The trainer has already asked for one batch.
        self._budget = (self.options.max_num_gen_batches - 1) * self.options.train_batch_size
        self._uniform_kept = self._failed = 0
        batch, metrics = super().sample(global_steps, partition_id, batch_size)
        if partition_id == "val":
            return batch, metrics
        if self.options.reproducible:
            batch = self._in_order(batch)
        if self.options.metric is not None:
            metrics["training/filter_groups/uniform_kept"] = self._uniform_kept
            evicted = metrics.get("training/filter_groups/evicted_samples", 0)
            metrics["training/filter_groups/eviction_rate"] = evicted / (evicted + batch_size)
        if self.options.bgae is not None:
            metrics |= {f"bgae/{name}": value for name, value in self._statistics(batch, self.options.bgae).items()}
        return batch, metrics

    def _statistics(self, batch: KVBatchMeta, options: BgaeOptions) -> dict[str, float]:
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["rm_scores"])
        rewards = torch.stack([scores.sum() for scores in data["rm_scores"]])
        groups = torch.from_numpy(np.unique([key.split("_")[0] for key in batch.keys], return_inverse=True)[1])
        return group_statistics(rewards, groups, torch.ones(len(groups), dtype=torch.bool), options)

    def _in_order(self, batch: KVBatchMeta) -> KVBatchMeta:
        """Return the batch with its rows in the order of the data instead of that of their arrival."""
        place = {uid: number for number, uid in enumerate(self.prompt_global_steps[batch.partition_id])}

        def order(row: tuple[str, dict]) -> tuple[int, ...]:
            uid, *numbers = row[0].split("_")
            return place[uid], *map(int, numbers)

        keys, tags = zip(*sorted(zip(batch.keys, batch.tags, strict=True), key=order), strict=True)
        return replace(batch, keys=list(keys), tags=list(tags))

    def _first(self, partition_id: str, uids: set[str], count: int) -> list[str]:
        """Return the first ``count`` of ``uids`` in the order of the data."""
        return list(islice((uid for uid in self.prompt_global_steps[partition_id] if uid in uids), count))

    def _must_wait(self, partition_id: str) -> bool:
        in_flight = self.pending_keys[partition_id] or self.running_keys[partition_id]
        return self.options.reproducible and bool(in_flight)

    def _generate_within_budget(self, prompts: int) -> None:
        prompts = min(prompts, self._budget)
        if prompts > 0:
            self._budget -= prompts
            try:
                self._generate(prompts)
            except InputError:  # of the dataset
                raise
            except ValueError as error:  # verl fetches single prompts only where it expects refills
                raise InputError(
                    f"{error}; set trainer.v1.sampler.sync_refill_failed_groups=true, which BoundedGroupFilter needs"
                ) from error

    def _terminal_eviction_reasons(self, global_steps: int, partition_id: str) -> EvictionReasons:
        if self._must_wait(partition_id):
            return set(), set(), set(), Counter()
        stale, uniform, failed, counts = super()._terminal_eviction_reasons(global_steps, partition_id)
        self._failed += len(failed)
        self._budget += len(failed)
        if self._failed > self.options.max_failed_share * self.options.train_batch_size:
            raise RuntimeError(
                f"{self._failed} groups of step {global_steps} failed, more than {OPTIONS}.max_failed_share="
                f"{self.options.max_failed_share} of a batch; the messages above say why. {RESTART}"
            )
        if not uniform:
            return stale, uniform, failed, counts
        groups = sum(
            len(keys[partition_id])
            for keys in (self.pending_keys, self.running_keys, self.finished_keys, self.failure_keys)
        )
        spare = max(0, groups - len(failed) + self._budget - self.options.train_batch_size)
        evicted = set(self._first(partition_id, uniform, spare))
        values = self._dapo_classification_cache[partition_id]
        return stale, evicted, failed, Counter(values[uid] for uid in evicted)

    def _sampleable_terminal_keys(self, partition_id: str, eviction_reasons: EvictionReasons) -> set[str]:
        if self._must_wait(partition_id):
            return set()
        return super()._sampleable_terminal_keys(partition_id, eviction_reasons)

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
                f"algorithm.filter_groups: only {len(kept)} of {batch_size} groups differ in "
                f"{self.options.metric!r} after {self.options.max_num_gen_batches} generation batches; raise "
                "max_num_gen_batches or rollout.n, or set when_exhausted=fill"
            )
        self._uniform_kept = missing
        kept.update(self._first(partition_id, uniform, missing))
        return super()._select_prompt_uids(partition_id, kept, batch_size)
