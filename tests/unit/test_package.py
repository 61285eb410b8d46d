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


def test_gpu_and_cpu_worlds_pin_the_same_verl():
    extras = PROJECT["project"]["optional-dependencies"]
    assert "verl==0.9.1" in extras["cpu"]
    assert "verl[vllm]==0.9.1" in extras["gpu"]
