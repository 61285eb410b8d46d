"""The platform ``cpu``, which verl lacks (verl/plugin/platform/platform_manager.py:83). Import verl before it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import psutil
import torch
from verl.plugin.platform import PlatformBase, PlatformRegistry, get_platform, set_platform

from gream_verl.core import cpu_environment
from gream_verl.cpu import is_active


def register() -> None:
    """Register the platform with verl, and select it if verl has already settled for another."""
    PlatformRegistry.register(platform="cpu")(PlatformCPU)
    if get_platform().device_name != "cpu":
        set_platform(PlatformCPU())


def _resident_bytes(*_: Any) -> int:
    return int(psutil.Process().memory_info().rss)


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _make_device_module() -> ModuleType:
    """Return ``torch.cpu`` plus the functions of ``torch.cuda`` that verl calls on its device module.

    verl/utils/device.py, verl/workers/engine_workers.py:219, verl/utils/profiler/performance.py:49. It is a module that
    can be imported, because it may be pickled by reference.
    """
    module = ModuleType("gream_verl.cpu.device_module")
    namespace = vars(module)
    namespace.update({name: value for name, value in vars(torch.cpu).items() if not name.startswith("__")})
    for name in ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved"):
        namespace[name] = _resident_bytes
    for name in ("empty_cache", "ipc_collect", "set_device", "set_per_process_memory_fraction"):
        namespace[name] = _nothing
    for name in ("reset_accumulated_memory_stats", "reset_peak_memory_stats"):
        namespace[name] = _nothing
    namespace.update(
        current_device=lambda: torch.device("cpu"),
        device_count=lambda: 1,
        get_device_name=lambda *_: "CPU",
        get_rng_state=lambda *_: torch.get_rng_state(),
        is_available=lambda: True,
        manual_seed=torch.manual_seed,
        manual_seed_all=torch.manual_seed,
        mem_get_info=lambda *_: (psutil.virtual_memory().available, psutil.virtual_memory().total),
        set_rng_state=lambda state, *_: torch.set_rng_state(state),
    )
    sys.modules[module.__name__] = module
    return module


class PlatformCPU(PlatformBase):
    """A machine on which torch, Ray and the rollout engine use CPU cores only."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _make_device_module()

    def is_available(self) -> bool:
        """Return True."""
        return True

    def is_platform_available(self, use_smi_check: bool = False) -> bool:
        """Return True where verl may choose this platform by itself."""
        return is_active()

    def current_device(self) -> torch.device:
        """Return the one device."""
        return torch.device("cpu")

    def device_count(self) -> int:
        """Return 1."""
        return 1

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        """Return no compute capability."""
        return None, None

    def manual_seed(self, seed: int) -> None:
        """Seed torch."""
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def communication_backend_name(self) -> str:
        """Return the backend of ``torch.distributed``."""
        return "gloo"

    def visible_devices_envvar(self) -> str:
        """Return the variable in which Ray hands out the logical devices."""
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        """Return the Ray resource on which workers are placed.

        Logical GPUs, declared by ``ray_kwargs.ray_init.num_gpus``: verl counts nothing but "GPU" and "NPU"
        (verl/single_controller/ray/base.py:146 and :230), and Ray gives out device ids for those names only.
        """
        return "GPU"

    def ray_noset_envvars(self) -> list[str]:
        """Return the variables that keep Ray from hiding devices."""
        return ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]

    def is_ipc_supported(self) -> bool:
        """Return False, so that weights travel through shared memory (verl/workers/rollout/vllm_rollout.py:143)."""
        return False

    def rollout_env_vars(self) -> dict[str, str]:
        """Return the environment of the rollout engine."""
        return {name: os.environ[name] for name in cpu_environment.DEFAULTS if name.startswith("VLLM_CPU_")}

    @contextmanager
    def nvtx_range(self, msg: str) -> Iterator[None]:
        """Mark nothing."""
        yield

    # Nothing to do on a CPU.
    set_device = synchronize = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = cudart = _nothing
