import errno

import pytest
import typer
import yaml
from wheel_build import ROOT

from gream_verl.cli.main import app
from gream_verl.cli.main import main as gream
from gream_verl.core.errors import InputError
from gream_verl.pipeline.quickstart import PRETRAINED, TINY, Quickstart, quickstart_steps
from gream_verl.pipeline.runner import Step


def run(monkeypatch, capsys, *arguments):
    """Run `gream ...` in this process; return the exit status and what it printed to stdout and stderr."""
    monkeypatch.setattr("sys.argv", ["gream", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        gream()
    printed = capsys.readouterr()
    return caught.value.code or 0, printed.out, printed.err


def commands(group, path=()):
    for name, command in getattr(group, "commands", {}).items():
        yield [*path, name], command
        yield from commands(command, [*path, name])


def test_every_command_explains_itself_takes_the_run_first_and_has_at_most_twelve_options():
    for path, command in commands(typer.main.get_command(app)):
        assert len(command.help.split("\n\n")[0]) <= 60, path
        options = [one for one in command.params if one.param_type_name == "option"]
        arguments = [one.metavar or "" for one in command.params if one.param_type_name == "argument"]
        assert len(options) <= 12, path
        assert all(one.help for one in options), path
        if any(one.name == "dataset" for one in options):
            assert arguments[0].startswith("RUN"), path


def test_the_help_of_gream_fits_one_screen_and_that_of_a_command_names_its_defaults(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    status, out, _ = run(monkeypatch, capsys, "--help")
    assert status == 0
    assert len(out.splitlines()) <= 24
    assert "completion" not in out
    _, out, _ = run(monkeypatch, capsys, "evaluate", "--help")
    assert "Default: 256." in out
    assert "[default:" not in out  # the settings come from a file, too


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InputError("x.json: torn; delete it"), "gream: x.json: torn; delete it"),
        (ModuleNotFoundError("no", name="polars"), "polars is not installed; pip install 'gream-verl[pipeline,cpu]'"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), "runs/x: No space left on device; free some"),
    ],
)
def test_an_error_that_the_user_can_repair_is_one_sentence(monkeypatch, capsys, error, said):
    def fail(*_):
        raise error

    monkeypatch.setattr("gream_verl.pipeline.quickstart.quickstart_steps", fail)
    status, _, err = run(monkeypatch, capsys, "quickstart")
    assert status == 1
    assert said in err
    assert len(err.strip().splitlines()) == 1


def test_an_error_of_the_program_is_a_traceback(monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("gream_verl.pipeline.quickstart.quickstart_steps", fail)
    monkeypatch.setattr("sys.argv", ["gream", "quickstart"])
    with pytest.raises(OSError, match="Input/output"):
        gream()


def test_a_failed_step_ends_the_quickstart(monkeypatch, capsys, tmp_path):
    steps = [Step("data", "true"), Step("index", "false"), Step("rl-data", "true")]
    monkeypatch.setattr("gream_verl.pipeline.quickstart.quickstart_steps", lambda _: steps)
    status, out, err = run(monkeypatch, capsys, "quickstart", tmp_path / "run")
    assert status == 1
    assert "step 'index' failed with exit status 1; earlier steps are kept" in err
    assert "1/3 data" in out
    assert "3/3" not in out


def words(options):
    return {step.name: " ".join(step.command.split()) for step in quickstart_steps(options)}


def test_the_quickstart_is_the_list_of_the_readme(monkeypatch):
    monkeypatch.chdir(ROOT)
    run = "runs/quickstart"
    assert list(words(Quickstart()).values()) == [
        f"gream data prepare {run} --source movielens",
        f"gream index build {run}",
        f"gream data rl {run} --rl-rows 4000",
        f"gream data mix {run}",
        f"gream model tiny {run}",
        "python -m gream_verl.cpu.llamafactory train sft_configs/tiny_cpu.yaml",
        f"gream evaluate {run} {run}/sft --chains 2 --max-tokens 128 --overwrite",
        "python -m verl.trainer.main_ppo +recipe=gream_srpo_cpu",
        f"gream evaluate {run} {run}/srpo --chains 2 --max-tokens 128 --overwrite",
        f"gream report {run}",
    ]


def test_a_base_is_extended_before_the_mix_and_checked_before_sft(tmp_path):
    made = words(Quickstart(PRETRAINED.run, base=str(tmp_path)))
    assert list(made)[3:7] == ["model", "sft-data", "sft-check", "sft"]
    assert made["model"] == f"gream model extend runs/pretrained --base {tmp_path} --overwrite"
    assert made["sft-data"].endswith("--tokenizer runs/pretrained/model")
    assert made["sft-check"].removeprefix("gream sft check") == made["sft"].removeprefix("llamafactory-cli train")
    assert made["sft"].endswith("smollm2_cpu.yaml")
    assert made["srpo"].endswith("+recipe=gream_srpo_smollm2_cpu")
    other = words(Quickstart(PRETRAINED.run, base="Qwen/Qwen3-0.6B", template="qwen3_nothink"))
    assert other["sft"].endswith("smollm2_cpu.yaml template=qwen3_nothink default_system=null")


@pytest.mark.parametrize("base", [None, "base"])
def test_another_run_and_seed_are_passed_on_to_every_step(base):
    steps = words(Quickstart("runs/other", base=base, seed=3))
    profile = PRETRAINED if base else TINY
    for name, command in steps.items():
        assert "runs/other" in command
        assert str(profile.run) not in command
        assert name in ("data", "report", "sft-check") or "seed 3" in command or "seed=3" in command


def test_amazon_files_reach_the_first_step(tmp_path):
    reviews, metadata = tmp_path / "my reviews.json.gz", tmp_path / "meta.json.gz"
    first = quickstart_steps(Quickstart("runs/magazine", "amazon2018", reviews, metadata))[0]
    assert first.command.endswith(f"--source amazon2018 --interactions '{reviews}' --items {metadata}")
    assert first.reads == [reviews, metadata]
    assert [path.name for path in first.makes] == ["magazine.inter.json", "magazine.item.json"]


@pytest.mark.parametrize("name", ["runs/a,b", "runs/a=b", "runs/with blank", "runs/$x"])
def test_a_name_that_a_config_would_misread_is_refused(name):
    with pytest.raises(InputError, match="in the name of a run"):
        quickstart_steps(Quickstart(name))


@pytest.mark.parametrize("profile", [TINY, PRETRAINED])
def test_config_and_recipe_name_the_run_of_their_profile(profile):
    keys = yaml.safe_load((ROOT / "sft_configs" / profile.config).read_text())
    assert keys["model_name_or_path"] == f"{profile.run}/model"
    assert keys["dataset_dir"] == f"{profile.run}/data"
    assert keys["output_dir"] == f"{profile.run}/sft"
    recipe = (ROOT / "recipes" / "recipe" / f"{profile.recipe}.yaml").read_text()
    assert yaml.safe_load(recipe)["gream"]["run"] == str(profile.run)
