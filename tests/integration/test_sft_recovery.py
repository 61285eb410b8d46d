"""SFT with real LLaMA-Factory goes on after a kill -9."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sft_run import logged, make_sft_run, running, sft_arguments, train

from gream_verl.core.checkpoints import drop_torn_checkpoints
from gream_verl.core.files import read_json, write_json

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

SAVED = 20
SETTINGS = (
    "per_device_train_batch_size=4",
    "gradient_accumulation_steps=2",
    "num_train_epochs=7",  # 56 steps, of which no checkpoint is at the end of an epoch
    f"save_steps={SAVED}",
    "save_total_limit=2",
    "include_num_input_tokens_seen=non_padding",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and a model with dropout, whose training depends on the state of the random numbers, too."""
    folder = tmp_path_factory.mktemp("recovery")
    make_sft_run(folder)
    config = folder / "model" / "config.json"
    write_json(config, read_json(config) | {"attention_dropout": 0.2})
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> Path:
    """The output of a training that nothing stopped."""
    train(folder, *SETTINGS, f"output_dir={folder}/uninterrupted")
    return folder / "uninterrupted"


def kill_when(folder: Path, sft: Path, ready: Callable[[], bool]) -> None:
    """Start the training and kill -9 all of it as soon as ``ready`` says so."""
    command = ["llamafactory-cli", "train", *sft_arguments(folder, *SETTINGS, f"output_dir={sft}")]
    with running(command, folder / "killed.log") as process:
        deadline = time.monotonic() + 120
        while not ready():
            assert process.poll() is None, (folder / "killed.log").read_text(errors="replace")[-4000:]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL


def steps_done(sft: Path) -> int:
    """Return the last step that LLaMA-Factory logged."""
    log = sft / "trainer_log.jsonl"
    lines = log.read_text().splitlines() if log.is_file() else []
    return max((int(step) for line in lines for step in re.findall(r'"current_steps": (\d+)', line)), default=0)


def assert_same_training(one: Path, other: Path) -> None:
    """Check that two trainings went the same way: every logged number of every step, and the bytes of the weights."""
    states = [json.loads((folder / "trainer_state.json").read_text()) for folder in (one, other)]
    for name in ("step", "loss", "grad_norm", "learning_rate", "num_input_tokens_seen"):
        first, second = (logged(state, name) for state in states)
        assert first == second
        assert len(first) == states[0]["global_step"]
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_a_killed_training_goes_on_as_if_nothing_had_been(folder: Path, uninterrupted: Path) -> None:
    sft = folder / "killed"
    torn = sft / f"checkpoint-{2 * SAVED}"

    def is_being_written() -> bool:
        """Let the second checkpoint wait: a file after its weights needs a reader that never comes."""
        if not torn.exists() and steps_done(sft) > SAVED + 5:
            torn.mkdir()
            os.mkfifo(torn / "optimizer.pt")
        return (torn / "training_args.bin").exists()

    kill_when(folder, sft, is_being_written)
    (torn / "optimizer.pt").unlink()
    assert (torn / "model.safetensors").is_file()
    assert not (sft / "model.safetensors").exists()
    drop_torn_checkpoints(sft)
    assert [path.name for path in sft.glob("checkpoint-*")] == [f"checkpoint-{SAVED}"]

    train(folder, *SETTINGS, f"output_dir={sft}")
    assert f"checkpoint-{SAVED}." in (folder / "sft.log").read_text()
    assert_same_training(sft, uninterrupted)


def test_the_state_is_the_last_file_of_a_checkpoint(uninterrupted: Path) -> None:
    for checkpoint in uninterrupted.glob("checkpoint-*"):
        last = max(checkpoint.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        assert last.name == "trainer_state.json"


@pytest.mark.parametrize("kept", [None, 0, 1000])
def test_a_checkpoint_without_a_whole_state_is_torn(tmp_path: Path, uninterrupted: Path, kept: int | None) -> None:
    for number in (40, 56):
        shutil.copytree(uninterrupted / f"checkpoint-{number}", tmp_path / f"checkpoint-{number}")
    state = tmp_path / "checkpoint-56" / "trainer_state.json"
    whole = state.read_bytes()
    state.unlink() if kept is None else state.write_bytes(whole[:kept])
    drop_torn_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-40"]
