"""The rollout ``hf_cpu`` in verl's two registries, without importing it."""

from __future__ import annotations

from types import ModuleType

from gream_verl.core.import_hooks import when_imported
from gream_verl.cpu import HF_ROLLOUT


def register() -> None:
    """Make ``actor_rollout_ref.rollout.name=hf_cpu`` known to verl."""
    when_imported("verl.workers.rollout.base", _register_adapter)
    when_imported("verl.workers.rollout.replica", _register_replica)


def _register_adapter(base: ModuleType) -> None:
    # verl has no function for this registry (verl/workers/rollout/base.py:89).
    base._ROLLOUT_REGISTRY[(HF_ROLLOUT, "async")] = "gream_verl.cpu.hf_rollout.HFServerAdapter"


def _register_replica(replica: ModuleType) -> None:
    replica.RolloutReplicaRegistry.register(HF_ROLLOUT, _load_replica)


def _load_replica() -> type:
    from gream_verl.cpu.hf_rollout import HFReplica

    return HFReplica
