import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from rich.console import Console

from gream_verl.core.errors import InputError
from gream_verl.pipeline.steps import Pipeline, Step, explain, last_line


@pytest.fixture
def pipeline(tmp_path):
    return Pipeline(tmp_path / "run", Console(file=open(os.devnull, "w"), width=80))


def copy_step(tmp_path, *, name="copy", extra=""):
    """A step that copies one file and counts how often it ran."""
    code = (
        "import sys, shutil, pathlib; shutil.copy(sys.argv[1], sys.argv[2]); "
        f"open(sys.argv[3], 'a').write('x'); {extra}"
    )
    source, target, count = (tmp_path / part for part in ("source", "target", "count"))
    return Step(name, "Copy", [sys.executable, "-c", code, str(source), str(target), str(count)], [source], [target])


def runs(tmp_path):
    return len((tmp_path / "count").read_text())


def test_a_finished_step_is_kept_and_a_changed_input_runs_it_again(tmp_path, pipeline):
    (tmp_path / "source").write_text("one")
    step = copy_step(tmp_path)
    assert not pipeline.run([step])["copy"].reused
    assert pipeline.run([step])["copy"].reused
    assert runs(tmp_path) == 1
    (tmp_path / "source").write_text("two")
    assert not pipeline.run([step])["copy"].reused
    assert (tmp_path / "target").read_text() == "two"
    (tmp_path / "target").unlink()
    pipeline.run([step])
    assert runs(tmp_path) == 3


def test_a_changed_command_runs_again(tmp_path, pipeline):
    (tmp_path / "source").write_text("one")
    pipeline.run([copy_step(tmp_path)])
    pipeline.run([copy_step(tmp_path, extra="pass")])
    assert runs(tmp_path) == 2


def test_a_failure_names_the_log_and_keeps_what_was_done(tmp_path, pipeline):
    (tmp_path / "source").write_text("one")
    first = copy_step(tmp_path)
    command = [sys.executable, "-c", "print('the reason'); raise SystemExit(3)"]
    with pytest.raises(InputError, match=r"the reason[\s\S]*'bad' failed \(exit status 3\)[\s\S]*bad\.log"):
        pipeline.run([first, Step("bad", "Bad", command, logged=True)])
    assert pipeline.run([first])["copy"].reused


def test_a_step_that_makes_nothing_is_not_called_done(tmp_path, pipeline):
    step = Step("idle", "Idle", [sys.executable, "-c", "pass"], [], [tmp_path / "never"])
    with pytest.raises(InputError, match="without making"):
        pipeline.run([step])


def test_a_missing_input_is_one_sentence(tmp_path, pipeline):
    with pytest.raises(InputError, match="no such file"):
        pipeline.run([Step("none", "None", ["true"], [tmp_path / "absent"])])


def test_a_step_out_of_time_is_stopped_with_everything_it_started(tmp_path, pipeline):
    child = tmp_path / "child"
    code = (
        "import subprocess, sys, time, pathlib; "
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True); "
        f"pathlib.Path({str(child)!r}).write_text(str(child.pid)); time.sleep(600)"
    )
    started = time.monotonic()
    with pytest.raises(InputError, match="more than 2 s"):
        pipeline.run([Step("slow", "Slow", [sys.executable, "-c", code], timeout=2.0, logged=True)])
    assert time.monotonic() - started < 60
    pid = int(child.read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_stopped_step_finds_its_checkpoints_and_another_run_does_not(tmp_path, pipeline):
    (tmp_path / "source").write_text("one")
    checkpoints = tmp_path / "checkpoints"
    code = (
        "import pathlib, sys; folder = pathlib.Path(sys.argv[1]); folder.mkdir(exist_ok=True); "
        "seen = sorted(p.name for p in folder.iterdir()); (folder / f'run{len(seen)}').touch(); "
        "sys.exit(0 if len(seen) == 1 else 7)"
    )
    command = [sys.executable, "-c", code, str(checkpoints)]
    step = Step("train", "Train", command, [tmp_path / "source"], [checkpoints], resumes=[checkpoints])
    with pytest.raises(InputError, match="exit status 7"):
        pipeline.run([step])
    pipeline.run([step])  # goes on from run0, and ends well
    assert sorted(path.name for path in checkpoints.iterdir()) == ["run0", "run1"]
    (tmp_path / "source").write_text("two")
    with pytest.raises(InputError, match="exit status 7"):
        pipeline.run([step])  # begins anew
    assert sorted(path.name for path in checkpoints.iterdir()) == ["run0"]
    assert sorted(path.name for path in (tmp_path / "checkpoints.previous").iterdir()) == ["run0", "run1"]


def test_a_step_ends_with_the_process_that_runs_it(tmp_path):
    child = tmp_path / "child"
    step = f"import os, time, pathlib; pathlib.Path({str(child)!r}).write_text(str(os.getpid())); time.sleep(600)"
    code = (
        "import sys; from pathlib import Path; from gream_verl.pipeline.steps import Pipeline, Step; "
        f"Pipeline(Path({str(tmp_path)!r})).run([Step('slow', 'Slow', [sys.executable, '-c', {step!r}], logged=True)])"
    )
    runner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (child.exists() and child.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    pid = int(child.read_text())
    runner.kill()
    runner.wait(10)
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_was_made_from_an_earlier_training_is_out_of_date(tmp_path, pipeline):
    weights, score = tmp_path / "weights", tmp_path / "score"
    train = [sys.executable, "-c", f"open({str(weights)!r}, 'w').write('the same')"]
    evaluate = [sys.executable, "-c", f"open({str(score)!r}, 'w').write('1')"]
    steps = [
        Step("train", "Train", train, makes=[weights], resumes=[tmp_path / "checkpoints"]),
        Step("evaluate", "Evaluate", evaluate, [weights], [score]),
    ]
    pipeline.run(steps)
    assert all(result.reused for result in pipeline.run(steps).values())
    weights.unlink()
    assert not any(result.reused for result in pipeline.run(steps).values())


def test_a_sentence_of_ours_in_a_framework_s_traceback_is_what_the_user_sees(pipeline):
    code = "from gream_verl.core.errors import InputError; raise InputError('D.index.json: item missing; build it')"
    with pytest.raises(InputError) as caught:
        pipeline.run([Step("bad", "Bad", [sys.executable, "-c", code], logged=True)])
    first, second = str(caught.value).splitlines()
    assert first == "D.index.json: item missing; build it"
    assert "'bad' failed" in second


def test_two_runs_in_one_folder_are_refused(tmp_path, pipeline):
    nested = (
        "from pathlib import Path\nfrom gream_verl.core.errors import InputError\n"
        "from gream_verl.pipeline.steps import Pipeline\n"
        f"try: Pipeline(Path({str(tmp_path / 'run')!r})).run([])\n"
        f"except InputError as error: open({str(tmp_path / 'said')!r}, 'w').write(str(error))"
    )
    pipeline.run([Step("outer", "Outer", [sys.executable, "-c", nested], makes=[tmp_path / "said"])])
    assert "in use by another run" in (tmp_path / "said").read_text()


def test_the_last_line_of_a_rewritten_progress_bar_is_shown(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"start\n 1%|\r 50%|##  |\r\n\n")
    assert last_line(log) == "50%|##  |"
    log.write_bytes(
        b"\x1b[36m(Task pid=7)\x1b[0m Progress: 5%|#\r\x1b[36m(Task pid=7)\x1b[0m Progress: 9%|#\nstep:3 - a:1\n"
    )
    assert last_line(log) == "Progress: 9%|#"
    log.write_bytes(b"")
    assert last_line(log) == "starting"


LOADING = "[INFO|2026-11-24 03:07:48] llamafactory.data.loader:144 >> Loading dataset small-mix.parquet...\n"
SAFETENSORS = "SafetensorError: Error while serializing: I/O error: No space left on device (os error 28)"
TORCH = """RuntimeError: basic_ios::clear: iostream error

During handling of the above exception, another exception occurred:

    self.file_like.write_end_of_file()
RuntimeError: [enforce fail at inline_container.cc:672] . unexpected pos 3520 vs 3412
 45%|####      | 20/44 [00:00<00:00, 33.14it/s]"""
MAGIC = "pyarrow.lib.ArrowInvalid: Parquet magic bytes not found in footer. Either the file is corrupted or this is not"
KEY = '    raise self._value\nKeyError: {}\n"""\nThe above exception was the direct cause:\nKeyError: {}'
GENERATION = """OSError: Couldn't deserialize thrift: No more data to read.
datasets.exceptions.DatasetGenerationError: An error occurred while generating the dataset"""
MISSING = """    raise ValueError(f"File {local_path} not found.")
ValueError: File data/small-mix.parquet not found."""


@pytest.mark.parametrize(
    ("log", "said"),
    [
        (f"safetensors._safetensors_rust.{SAFETENSORS}", "was full;"),
        (TORCH, "was full;"),
        (TORCH.partition("\n")[0], "was full;"),
        ("OSError: [Errno 28] No space left on device", "was full;"),
        ("OSError: [Errno 122] Disk quota exceeded", "was full;"),
        (LOADING + "OSError: [Errno 28] No space left on device\n" + GENERATION, "was full;"),
        (LOADING + MAGIC, "data/small-mix.parquet: not a whole SFT file (Parquet magic bytes not found)"),
        (LOADING + "ArrowInvalid: Parquet file size is 0 bytes", "SFT file (Parquet file size is 0 bytes)"),
        (LOADING + GENERATION, "SFT file (Couldn't deserialize thrift)"),
        (LOADING + KEY.format("'conversations'", "'conversations'"), "SFT file (KeyError: 'conversations')"),
        (LOADING + KEY.format("'from'", "'from'"), "SFT file (KeyError: 'from')"),
        (LOADING + 'ValueError: Instruction "train" corresponds to no data!', "SFT file (corresponds to no data)"),
        (LOADING + MISSING, "SFT file (ValueError: File data/small-mix.parquet not found)"),
        (LOADING.replace("small", "first") + LOADING + MAGIC, "data/small-mix.parquet: not a whole"),
        ("gream_verl.core.errors.InputError: x.json: missing\nOSError: [Errno 28] No space left", "x.json: missing"),
        ("PermissionError: [Errno 13] Permission denied: 'sft'", "[Errno 13] Permission denied: 'sft'"),
    ],
)
def test_a_known_end_of_a_framework_is_one_sentence(tmp_path, log, said):
    step = Step("sft", "SFT", ["x"], [Path("data/small-mix.parquet")], [tmp_path / "sft" / "model.safetensors"])
    sentence = explain(f"many\nlines\n{log}\n", step, tmp_path)
    assert said in sentence
    assert "\n" not in sentence
    if "was full" in said:
        assert f"the run ({tmp_path})" in sentence
        assert "free some space there" in sentence
    if "SFT file" in said:
        assert sentence.endswith("make it anew with `gream data mix`")


TRACEBACK = "Traceback (most recent call last):\n"


@pytest.mark.parametrize(
    "log",
    [
        "KeyError: 'value'",
        LOADING + "KeyError: 'labels'",
        LOADING + "50%|##",
        "",
        # Neither what was survived earlier nor what other data said is the reason.
        "No space left on device\n" + TRACEBACK + "RuntimeError: CUDA error",
        TRACEBACK + "BrokenPipeError: [Errno 32] Broken pipe\n" + TRACEBACK + "RuntimeError: CUDA error",
        LOADING + "***** Running training *****\n" + TRACEBACK + KEY.format("'value'", "'value'"),
    ],
)
def test_an_unknown_end_is_not_explained(tmp_path, log):
    assert explain(log, Step("sft", "SFT", ["x"]), tmp_path) is None


def test_a_long_log_is_explained_at_once(tmp_path):
    steps = "".join(f"{{'loss': 1.0, 'step': {step}}}\n" for step in range(20_000))
    log = LOADING + steps + TRACEBACK + "OutOfMemoryError"  # a pattern that looks back would take minutes
    assert explain(log, Step("sft", "SFT", ["x"]), tmp_path) is None


def test_a_full_disk_is_seen_where_the_log_found_no_place_to_say_so(tmp_path, monkeypatch):
    step = Step("sft", "SFT", ["x"], makes=[tmp_path / "other" / "model.safetensors"])
    (tmp_path / "other").mkdir()
    usage = type("Usage", (), {"free": 4096})
    plenty = type("Usage", (), {"free": 1 << 40})
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage if place.name == "other" else plenty)
    assert explain("Saving model", step, tmp_path).startswith(f"{tmp_path / 'other'}: the disk is full (0.0 GiB left)")
