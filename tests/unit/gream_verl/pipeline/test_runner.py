import contextlib
import io
import json
import shlex
import subprocess
import sys
import time

import psutil
import pytest
from rich.console import Console

from gream_verl.core.errors import InputError
from gream_verl.pipeline.runner import Step, log_lines, run_steps, stamp_file


def run(folder, *steps):
    return run_steps(folder / "run", steps, Console(quiet=True))


def shell(code, *words):
    return shlex.join(["sh", "-c", code, "sh", *map(str, words)])


def ended(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_for(happened, seconds=60):
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def copy(tmp_path):
    (tmp_path / "source").write_text("one")
    source, target = tmp_path / "source", tmp_path / "target"
    return Step("copy", shell('cp "$1" "$2"', source, target), [source], [target])


def test_a_finished_step_is_kept_and_a_changed_one_runs_again(tmp_path, copy):
    assert run(tmp_path, copy) == ["copy"]
    assert run(tmp_path, copy) == []
    (tmp_path / "source").write_text("two")
    assert run(tmp_path, copy) == ["copy"]
    assert (tmp_path / "target").read_text() == "two"
    (tmp_path / "target").unlink()
    assert run(tmp_path, copy) == ["copy"]
    again = Step("copy", copy.command.replace("cp", "cp -f"), copy.reads, copy.makes)
    assert run(tmp_path, again) == ["copy"]
    folder = Step("copy", copy.command, [tmp_path / "folder"], copy.makes)
    (tmp_path / "folder").mkdir()
    assert run(tmp_path, folder) == ["copy"]
    (tmp_path / "folder" / "more").touch()
    assert run(tmp_path, folder) == ["copy"]


def test_a_command_is_shown_as_a_shell_takes_it(tmp_path):
    console = Console(record=True, file=io.StringIO(), width=40)
    step = Step("say", shell("true", "'+recipe=[one,two]'", tmp_path))
    run_steps(tmp_path / "run", [step], console)
    assert f"$ {step.command}" in console.export_text().splitlines()


def test_a_failure_shows_the_end_of_the_log_and_keeps_earlier_steps(tmp_path, copy):
    bad = Step("bad", shell("echo the reason; exit 3"), checkpoints=tmp_path / "checkpoints")
    with pytest.raises(InputError, match=r"the reason\n.*logs/bad\.log\nstep 'bad' failed with exit status 3"):
        run(tmp_path, copy, bad)
    assert run(tmp_path, copy) == []


@pytest.mark.parametrize(
    ("command", "reads", "makes", "message"),
    [
        ("true", [], ["never"], "did not make .*never"),
        ("true", ["absent"], [], "no such file"),
        (shell("kill -9 $$"), [], [], "exit status -9"),
    ],
)
def test_a_step_that_cannot_end_well_is_not_done(tmp_path, command, reads, makes, message):
    step = Step("bad", command, [tmp_path / name for name in reads], [tmp_path / name for name in makes])
    for _ in range(2):
        with pytest.raises(InputError, match=message):
            run(tmp_path, step)


def test_an_interrupt_ends_a_step_with_everything_it_started(tmp_path):
    child = tmp_path / "child"

    class Interrupted(Console):
        def status(self, *_, **__):
            return contextlib.nullcontext(self)

        def update(self, _):
            if child.exists():
                raise KeyboardInterrupt

    step = shell('setsid sleep 600 & echo $! > "$1.new"; mv "$1.new" "$1"; wait', child)
    with pytest.raises(KeyboardInterrupt):
        run_steps(tmp_path / "run", [Step("slow", step, checkpoints=tmp_path / "sft")], Interrupted(quiet=True))
    assert ended(int(child.read_text()))


def test_a_step_ends_with_the_process_that_runs_it(tmp_path):
    child = tmp_path / "child"
    step = shell('echo $$ > "$1.new"; mv "$1.new" "$1"; exec sleep 600', child)
    code = (
        "import sys; from pathlib import Path; from rich.console import Console; "
        "from gream_verl.pipeline.runner import Step, run_steps; "
        f"run_steps(Path({str(tmp_path)!r}), [Step('slow', {step!r})], Console())"
    )
    runner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    wait_for(child.exists)
    runner.kill()
    runner.wait(10)
    wait_for(lambda: ended(int(child.read_text())))


def test_a_stopped_training_finds_its_whole_checkpoints_and_another_one_finds_none(tmp_path):
    (tmp_path / "source").write_text("one")
    sft = tmp_path / "sft"
    # saves a whole checkpoint and a torn one, and fails unless it found a checkpoint
    code = (
        'ls "$1" > "$2"; mkdir -p "$1/checkpoint-1" "$1/checkpoint-2"; echo {} > "$1/checkpoint-1/trainer_state.json"'
    )
    code += '; grep -q checkpoint "$2"'
    found = tmp_path / "found"
    train = Step("train", shell(code, sft, found), [tmp_path / "source"], [sft], checkpoints=sft)
    with pytest.raises(InputError, match="exit status 1"):
        run(tmp_path, train)
    assert run(tmp_path, train) == ["train"]
    assert found.read_text() == "checkpoint-1\n"
    (tmp_path / "source").write_text("two")
    with pytest.raises(InputError, match="exit status 1"):
        run(tmp_path, train)
    assert found.read_text() == ""
    assert (tmp_path / "sft.previous" / "checkpoint-1").is_dir()


def test_a_step_that_reads_a_stamp_runs_after_every_run_of_that_step(tmp_path):
    weights = tmp_path / "weights"
    train = Step("train", shell('echo the same > "$1"', weights), makes=[weights])
    evaluate = Step("evaluate", "true", [stamp_file(tmp_path / "run", "train")])
    assert run(tmp_path, train, evaluate) == ["train", "evaluate"]
    assert run(tmp_path, train, evaluate) == []
    weights.unlink()
    assert run(tmp_path, train, evaluate) == ["train", "evaluate"]
    assert json.loads(stamp_file(tmp_path / "run", "train").read_text())["seconds"] > 0


def test_two_runs_in_one_folder_are_refused(tmp_path):
    class Nested(Console):
        def rule(self, *_, **__):
            with pytest.raises(InputError, match="in use by another run"):
                run(tmp_path, Step("idle", "true"))

    assert run_steps(tmp_path / "run", [Step("outer", "true")], Nested(quiet=True)) == ["outer"]


def test_each_state_of_a_progress_bar_is_a_line_of_the_log(tmp_path):
    (tmp_path / "log").write_bytes(b"start\n 1%|\r 50%|##  |\r\n\n")
    assert log_lines(tmp_path / "log") == ["start", " 1%|", " 50%|##  |"]
    (tmp_path / "log").write_bytes(b"x" * 50_000)
    assert len(log_lines(tmp_path / "log")[0]) == 16384
