"""Makes the rollout ``hf`` known to verl: a module of ``VERL_USE_EXTERNAL_MODULES``, imported in every process."""

from __future__ import annotations

from types import ModuleType

from gream_verl.core.import_hooks import when_imported


def _register_adapter(base: ModuleType) -> None:
    # verl has no function for this registry (verl/workers/rollout/base.py:89).
    base._ROLLOUT_REGISTRY[("hf", "async")] = "hf_rollout.HFServerAdapter"


def _load_replica() -> type:
    from hf_rollout import HFReplica

    return HFReplica


when_imported("verl.workers.rollout.base", _register_adapter)
when_imported(
    "verl.workers.rollout.replica", lambda replica: replica.RolloutReplicaRegistry.register("hf", _load_replica)
)
