"""One gloo process group on the CPU.

verl asks torch for the backend ``cpu:gloo,<device>:<backend>`` (verl/utils/distributed.py:89); with the device ``cpu``
torch refuses the duplicate.
"""

from __future__ import annotations

from types import ModuleType

from gream_verl.core.import_hooks import when_imported


def register() -> None:
    """Make verl start its global process group with ``cpu:gloo``."""
    when_imported("verl.utils.distributed", _patch)


def _patch(distributed: ModuleType) -> None:
    original = distributed.initialize_global_process_group_ray

    def initialize_global_process_group_ray(timeout_second: float | None = None, backend: str | None = None) -> None:
        original(timeout_second=timeout_second, backend=backend or "cpu:gloo")

    distributed.initialize_global_process_group_ray = initialize_global_process_group_ray  # type: ignore[attr-defined]
