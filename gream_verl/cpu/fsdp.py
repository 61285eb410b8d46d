"""FSDP2 offloading without pinned memory.

The reference model is built with ``CPUOffloadPolicy(pin_memory=True)``
(verl/workers/engine/fsdp/transformer_impl.py:462); pinning needs an accelerator.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType
from typing import Any

from gream_verl.core.import_hooks import when_imported


def register() -> None:
    """Make verl's FSDP engine ask for offloading without pinned memory."""
    when_imported("verl.workers.engine.fsdp.transformer_impl", _patch)


def _patch(transformer_impl: ModuleType) -> None:
    transformer_impl.CPUOffloadPolicy = partial(  # type: ignore[attr-defined]
        _unpinned, transformer_impl.CPUOffloadPolicy
    )


def _unpinned(policy: type, pin_memory: bool = False) -> Any:
    return policy(pin_memory=False)
