"""Environment variables for processes on a CPU, so that a user has none to set."""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping

DEFAULTS = {
    # One thread per process: the actor, the rollout engine and the reward workers already share few cores.
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Ray binds to and advertises the loopback address only (ray/_private/services.py:815).
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Logical CPU slots are not cores: do not start one idle Python process for each of them.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    # TransferQueue asks for 8 torch threads, and warns at every call when the machine has fewer cores.
    "TQ_NUM_THREADS": "1",
    # vLLM: 1 GiB for the key-value cache, no pinning, every core usable.
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
    "VLLM_NO_USAGE_STATS": "1",
    # The engine computes in its own process, as the recipe asks: between two of them vLLM waits by spinning on a core.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # FSDP engines are registered for the devices cuda and npu only (verl/workers/engine/fsdp/transformer_impl.py:1143);
    # this stock override looks them up under the former (verl/workers/engine/base.py:405).
    "VERL_ENGINE_DEVICE": "cuda",
}


def set_defaults(environment: MutableMapping[str, str] = os.environ, *, only: str = "") -> None:
    """Set the ``DEFAULTS`` that begin with ``only``, where the user did not; processes started later inherit them."""
    for name, value in DEFAULTS.items():
        if name.startswith(only):
            environment.setdefault(name, value)
    if environment["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0" and "ray._private.ray_constants" in sys.modules:
        # `import verl` imports Ray before its plugins, and Ray reads the variable once (ray_constants.py:658).
        sys.modules["ray._private.ray_constants"].ENABLE_RAY_CLUSTER = False  # type: ignore[attr-defined]
