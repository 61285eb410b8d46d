import tomllib
from importlib import metadata

import pytest
from packaging.specifiers import SpecifierSet
from wheel_build import ROOT

from gream_verl.cli import doctor
from gream_verl.cli.main import main as gream


@pytest.fixture
def installed(monkeypatch):
    """Say that each package has version 1, but for those in the dictionary: None is not installed."""
    others = {}

    def version(name):
        if (found := others.get(name, "1")) is None:
            raise metadata.PackageNotFoundError
        return found

    monkeypatch.setattr(doctor, "version", version)
    return others


def test_missing_packages_are_faults_with_a_remedy_unless_a_part_needs_them_only(installed, monkeypatch, capsys):
    installed.update({"verl": "0.9.1", "ray": None, "vllm": None})
    monkeypatch.setattr("sys.argv", ["gream", "doctor"])
    with pytest.raises(SystemExit, match="1"):
        gream()
    printed = capsys.readouterr()
    assert printed.err == "gream: ray: not installed; run `make env`, or install gream-verl[cpu,pipeline]\n"
    assert "not installed; needed for rollouts" in printed.out


@pytest.mark.parametrize(
    ("version", "supported"),
    [("0.9.1", True), ("0.9.1.post1", True), ("0.9.2", False), ("0.9.0", False), ("0.10.0", False), ("1.0", False)],
)
def test_other_versions_of_verl_are_refused(installed, version, supported):
    installed["verl"] = version
    remedy = doctor._version("verl").remedy
    assert remedy == ("" if supported else 'pip install "verl==0.9.1.*"')


def test_a_release_that_was_not_tested_is_said_and_is_no_fault(installed):
    installed.update({"llamafactory": "0.9.6", "vllm": "0.24.1"})
    assert doctor._version("llamafactory") == ("llamafactory", "0.9.6, not tested; tested are ==0.9.5", "")
    assert doctor._version("vllm").state == "0.24.1"


@pytest.mark.parametrize("flash", [None, "2.8.3"])
def test_a_gpu_needs_flash_attention(installed, monkeypatch, flash):
    import torch

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert [finding.remedy for finding in doctor._accelerator()] == ["check the driver with `nvidia-smi`"]
    for name, value in (("is_available", True), ("device_count", 2), ("get_device_name", "H200")):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    installed |= {"flash-attn": flash, "faiss-gpu-cu12": None}
    gpu, attention = doctor._accelerator()
    assert gpu.state == "2 x H200"
    assert bool(attention.remedy) == (flash is None)
    installed["faiss-gpu-cu12"] = "1.14.3"
    assert "pip install faiss-cpu" in doctor._accelerator()[-1].remedy
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert doctor._accelerator()[-1] == ("faiss-gpu-cu12", "1.14.3 is of CUDA 12, torch of CUDA 12.8", "")


def test_the_supported_range_holds_the_release_that_the_extras_pin():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in ("cpu", "gpu"):
        pinned = next(need for need in extras[extra] if need.startswith("verl"))
        assert pinned.partition("==")[2] in doctor.SUPPORTED_VERL


def test_the_documentation_has_the_same_releases_and_parts():
    text = (ROOT / "docs" / "compatibility.md").read_text()
    for package, tested in {"verl": doctor.SUPPORTED_VERL, **doctor.TESTED}.items():
        row = next(line for line in text.splitlines() if line.startswith(f"| {package} |"))
        assert SpecifierSet(row.split("|")[2].strip()) == tested
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    for part in doctor.PLUGINS:
        assert any(row.startswith(f"| {part}") for row in (line.replace("`", "") for line in rows)), part


def test_this_environment_is_healthy_and_a_plugin_that_is_not_registered_is_a_fault(monkeypatch):
    """Verl is imported once, for both."""
    assert not [finding for finding in doctor.examine() if finding.remedy]
    from verl.trainer.ppo import core_algos

    monkeypatch.delitem(core_algos.ADV_ESTIMATOR_REGISTRY, "bgae")
    fault = next(finding for finding in doctor.examine() if finding.remedy)
    assert fault.subject == "advantage estimator bgae"
    assert "bgae" in fault.state
    assert "--force-reinstall" in fault.remedy
