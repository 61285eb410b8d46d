"""FSDP2 offloading without pinned memory.

The reference model is built with ``CPUOffloadPolicy(pin_memory=True)``
(verl/workers/engine/fsdp/transformer_impl.py:462); pinning needs an accelerator.
"""

from __future__ import annotations

from types import ModuleType

from gream_verl.core.import_hooks import when_imported


def register() -> None:
    """Make verl's FSDP engine ask for offloading without pinned memory."""
    when_imported("verl.workers.engine.fsdp.transformer_impl", _patch)


def _patch(transformer_impl: ModuleType) -> None:
    policy = transformer_impl.CPUOffloadPolicy
    transformer_impl.CPUOffloadPolicy = lambda pin_memory=True: policy(pin_memory=False)  # type: ignore[attr-defined]
