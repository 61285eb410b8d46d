"""The extras of GPU nodes, resolved by uv: nothing is installed."""

import os
import subprocess
import sys

import pytest
from wheel_build import ROOT

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def resolve(extra, python, tmp_path):
    """Resolve an extra as `pip install gream-verl[extra]` would, from the index that pip is set up for."""
    environment = {"UV_INDEX_STRATEGY": "unsafe-best-match", **os.environ}
    for variable, setting in (
        ("UV_DEFAULT_INDEX", "index-url"),
        ("UV_INDEX", "extra-index-url"),
        ("SSL_CERT_FILE", "cert"),
    ):
        for key in (f"global.{setting}", f":env:.{setting}"):
            found = subprocess.run(
                [sys.executable, "-m", "pip", "config", "get", key], capture_output=True, text=True, check=False
            )
            if found.returncode == 0 and found.stdout.strip():
                environment.setdefault(variable, found.stdout.strip())
    command = [sys.executable, "-m", "uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate"]
    command += ["--python-version", python, "--extra", "pipeline", "--extra", extra, str(ROOT / "pyproject.toml")]
    result = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=280, check=False
    )
    assert result.returncode == 0, result.stderr
    return dict(line.split("==") for line in result.stdout.splitlines() if "==" in line and not line.startswith(" "))


def test_the_gpu_extra_resolves_to_the_versions_that_verl_pins(tmp_path):
    versions = resolve("gpu", "3.12", tmp_path)
    assert versions["verl"] == "0.9.1"
    assert {"vllm", "megatron-core", "faiss-gpu-cu12", "torch"} <= set(versions)
    assert "faiss-cpu" not in versions


def test_the_gpu_sft_extra_resolves(tmp_path):
    versions = resolve("gpu-sft", "3.11", tmp_path)
    assert versions["llamafactory"] == "0.9.5"
    assert "deepspeed" in versions
    assert versions["torch"].split(".")[:2] == versions["torchaudio"].split(".")[:2]
