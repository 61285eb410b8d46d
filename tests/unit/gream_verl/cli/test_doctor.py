import tomllib
from importlib import metadata

import pytest
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


def test_the_supported_range_holds_the_release_that_the_extras_pin():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra in ("cpu", "gpu"):
        pinned = next(need for need in extras[extra] if need.startswith("verl"))
        assert pinned.partition("==")[2] in doctor.SUPPORTED_VERL


def test_this_environment_is_healthy_and_a_plugin_that_is_not_registered_is_a_fault(monkeypatch):
    """Verl is imported once, for both."""
    assert not [finding for finding in doctor.examine() if finding.remedy]
    from verl.trainer.ppo import core_algos

    monkeypatch.delitem(core_algos.ADV_ESTIMATOR_REGISTRY, "bgae")
    fault = next(finding for finding in doctor.examine() if finding.remedy)
    assert fault.subject == "advantage estimator bgae"
    assert "bgae" in fault.state
    assert "--force-reinstall" in fault.remedy
