import os
import subprocess
import sys
import tomllib
import zipfile

import pytest
from wheel_build import ROOT, build_wheel

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_carries_every_module_recipe_config_template_and_entry_point(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in [*ROOT.glob("recipes/recipe/*.yaml"), *ROOT.glob("sft_configs/*.[yj]*")]:
        assert f"gream_verl/{path.relative_to(ROOT)}" in names
    assert "gream_verl/evaluation/report.html" in names
    assert "data_processing/teacher/prompts/chain.txt" in names
    assert "hydra_plugins/gream/__init__.py" in names
    assert "hydra_plugins/__init__.py" not in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]
    modules = {path for package in ("gream_verl", "data_processing") for path in (ROOT / package).rglob("*.py")}
    assert {str(path.relative_to(ROOT)) for path in modules} <= names
    archive = zipfile.ZipFile(wheel)
    text = archive.read(next(name for name in archive.namelist() if name.endswith("entry_points.txt"))).decode()
    assert "[verl.plugins]\ngream = gream_verl.plugin.register" in text
    assert "[vllm.general_plugins]" in text
    assert "gream = gream_verl.cli.main:main" in text


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


@pytest.mark.integration
@pytest.mark.timeout(300)
@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_gpu_extra_resolves_to_what_verl_pins(python, tmp_path):
    versions = resolve("gpu", python, tmp_path)
    assert versions["verl"] == "0.9.1"
    assert {"vllm", "megatron-core", "faiss-gpu-cu12", "torch"} <= set(versions)
    assert "faiss-cpu" not in versions


@pytest.mark.integration
@pytest.mark.timeout(300)
@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_the_gpu_sft_extra_resolves(python, tmp_path):
    versions = resolve("gpu-sft", python, tmp_path)
    assert versions["llamafactory"] == "0.9.5"
    assert "deepspeed" in versions
    assert versions["torch"].split(".")[:2] == versions["torchaudio"].split(".")[:2]


def test_gpu_and_cpu_worlds_pin_the_same_verl():
    extras = PROJECT["project"]["optional-dependencies"]
    assert "verl==0.9.1" in extras["cpu"]
    assert "verl[vllm]==0.9.1" in extras["gpu"]
