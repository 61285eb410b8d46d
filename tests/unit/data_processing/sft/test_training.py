from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sft_run import make_sft_run, sft_arguments

from data_processing.sft.config import SftConfig
from data_processing.sft.training import (
    BATCH,
    CUTOFF,
    Lengths,
    _cut,
    report_training,
    summary,
    task_rows,
    trained_seconds,
)
from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, write_json


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("training")
    make_sft_run(folder)
    return folder


@pytest.fixture
def folder(made: Path) -> Iterator[Path]:
    """Data and a model, and no training yet."""
    yield made
    shutil.rmtree(made / "sft", ignore_errors=True)


def config(folder: Path, *overrides: str) -> SftConfig:
    path, *keys = sft_arguments(folder, "per_device_train_batch_size=4", "gradient_accumulation_steps=1", *overrides)
    return SftConfig.read(Path(path), keys)


def write_log(folder: Path, name: str, **values: list[Any]) -> None:
    rows = [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]
    rows = [{"step": step, "epoch": step / 16, "loss": 2.0, **row} for step, row in enumerate(rows, start=1)]
    write_json(folder / "sft" / name / "trainer_state.json", {"global_step": len(rows), "log_history": rows})


def with_speed(tokens: list[int]) -> dict[str, list[Any]]:
    """Return what the trainer logs of tokens when a step takes a second."""
    seconds = range(1, len(tokens) + 1)
    speed = [count / second for count, second in zip(tokens, seconds, strict=True)]
    return {"num_input_tokens_seen": tokens, "train_runtime": [*seconds], "train_tokens_per_second": speed}


def seen(folder: Path) -> list[int]:
    return np.cumsum(Lengths.count(config(folder)).tokens[:40])[3::4].tolist()


def test_a_run_that_logged_its_tokens_is_told_by_task(folder: Path) -> None:
    tokens = seen(folder)
    write_log(folder, ".", **with_speed(tokens))
    write_json(folder / "data" / "small-mix.json", {"tasks": {"seqrec": {"shortened": 10, "left out": 40}}})
    (folder / "sft" / "trainer_log.jsonl").write_text('{"vram_reserved": 1.5}\n{"vram_reserved": 2.5, "loss": 1}\n')
    pictures = set()
    for _ in range(2):
        training = report_training(config(folder))
        pictures.add((folder / "sft" / "training_loss.png").read_bytes())
    assert len(pictures) == 1
    assert read_json(folder / "sft" / "training.json") == training
    assert training["tasks"]["seqrec"]["rows"] == 40
    (row,) = [row for row in task_rows(training) if row[0] == "seqrec"]
    assert row[6:] == ["25.0%", "50.0%", "0.0%"]
    assert training["tasks"]["seqrec"]["curve"]["losses"]
    assert 0 < training["padding"] < 1
    assert f"{tokens[-1]:,} tokens in 0.2 minutes, {tokens[-1] / 10:,.0f} tokens a second" in summary(training)
    assert summary(training).endswith("2.5 GiB of GPU memory at most.")


def test_tasks_that_are_not_told_are_named(folder: Path) -> None:
    write_log(folder, ".", **with_speed(seen(folder)[:1]))
    training = report_training(config(folder))
    assert training["remarks"][-1].startswith("No loss of item2index, reasoning, seqrec: too few steps")


@pytest.mark.parametrize("prompt", ["true", "false"])
def test_the_loss_of_a_row_is_over_its_trained_tokens(folder: Path, prompt: str) -> None:
    override = f"train_on_prompt={prompt}"
    rows = Lengths.count(config(folder, override))
    assert (rows.supervised == rows.tokens).all() == (prompt == "true")
    steps = np.arange(40) // 4
    summed = np.bincount(steps, 2 * (rows.supervised - (prompt == "true"))[:40])  # nothing predicts a first token
    losses = summed / np.bincount(steps, rows.supervised[:40])
    write_log(folder, ".", loss=losses.tolist(), **with_speed(seen(folder)))
    tasks = report_training(config(folder, override))["tasks"].values()
    told = [loss for task in tasks for loss in task["curve"]["losses"] if loss is not None]
    assert told == pytest.approx([2.0] * len(told))
    assert told


def test_losses_of_evaluations_are_told_by_what_was_evaluated(folder: Path) -> None:
    write_log(folder, ".", grad_norm=[1.0] * 4)
    state = read_json(folder / "sft" / "trainer_state.json")
    state["log_history"] += [{"step": 2, "eval_new_loss": 3.0}, {"step": 4, "eval_loss": 2.5, "eval_new_loss": 2.0}]
    write_json(folder / "sft" / "trainer_state.json", state)
    assert report_training(config(folder))["evaluation"] == {
        "new": {"steps": [2, 4], "losses": [3.0, 2.0]},
        "held-out rows": {"steps": [4], "losses": [2.5]},
    }


def test_of_the_first_rows_of_a_file_no_shares_are_told(folder: Path) -> None:
    write_log(folder, ".", grad_norm=[1.0] * 4)
    write_json(folder / "data" / "small-mix.json", {"tasks": {"seqrec": {"shortened": 40, "left out": 0}}})
    training = report_training(config(folder, "max_samples=20"))
    assert {(row[6], row[7]) for row in task_rows(training)[1:]} == {("–", "–")}
    assert "not known of the first `max_samples` rows" in training["remarks"][0]
    assert sum(task["rows"] for task in training["tasks"].values()) == 20


def test_a_model_that_is_not_there_is_named(folder: Path) -> None:
    write_log(folder, ".", grad_norm=[1.0] * 4)
    with pytest.raises(InputError, match=r"^\S+/gone: no such folder"):
        report_training(config(folder, f"model_name_or_path={folder}/gone"))


def test_keys_that_a_config_leaves_out_are_as_llamafactory_has_them() -> None:
    from llamafactory.hparams import DataArguments, TrainingArguments

    assert DataArguments.cutoff_len == CUTOFF
    assert TrainingArguments.per_device_train_batch_size == BATCH


@pytest.mark.parametrize(
    ("shift", "overrides", "said"),
    [
        (None, [], "set `include_num_input_tokens_seen: non_padding` and `logging_steps: 1`"),
        (1, [], "No loss by task: at step 10 the trainer had seen"),
        (0, ["per_device_train_batch_size=3"], "No loss by task: at step 1 the trainer had seen"),
    ],
)
def test_a_run_that_cannot_be_told_by_task_is_told_otherwise(
    folder: Path, shift: int | None, overrides: list[str], said: str
) -> None:
    tokens = seen(folder)
    told = {} if shift is None else with_speed([*tokens[:-1], tokens[-1] + shift])
    write_log(folder, ".", grad_norm=[1.0] * 10, **told)
    training = report_training(config(folder, *overrides))
    assert any(said in remark for remark in training["remarks"])
    assert training["loss"]["losses"] == [2.0] * 10
    assert not any(task["curve"]["losses"] for task in training["tasks"].values())


def test_a_stopped_run_is_told_up_to_its_last_checkpoint(folder: Path) -> None:
    with pytest.raises(InputError, match="no trainer_state"):
        report_training(config(folder))
    write_log(folder, "checkpoint-9", grad_norm=[1.0] * 9)
    write_log(folder, "checkpoint-10", grad_norm=[1.0] * 10)
    assert report_training(config(folder))["steps"] == 10
    write_json(folder / "sft" / "trainer_state.json", {"global_step": 11, "log_history": [{"step": 11}]})
    with pytest.raises(InputError, match="no loss yet"):
        report_training(config(folder))


def test_a_loss_that_is_no_number_ends_what_is_told(folder: Path) -> None:
    write_log(folder, ".", loss=[2.0, float("nan"), 1.0])
    training = report_training(config(folder))
    assert training["loss"] == {"steps": [1], "losses": [2.0]}
    assert "no number at step 2" in training["remarks"][0]


@given(st.lists(st.lists(st.floats(0.1, 100), min_size=1, max_size=5), min_size=1, max_size=4))
def test_the_time_of_every_start_counts(sessions: list[list[float]]) -> None:
    log, before = [], 0
    for steps in sessions:
        started = before
        for runtime in np.cumsum(steps):
            before += 1000
            speed = round((before - started) / runtime, 3)
            log.append(
                {
                    "num_input_tokens_seen": before,
                    "train_runtime": round(runtime, 4),
                    "train_tokens_per_second": speed,
                }
            )
    assert trained_seconds(log) == pytest.approx(sum(map(sum, sessions)), abs=1e-3)


@given(prompt=st.integers(1, 3000), response=st.integers(1, 3000), limit=st.integers(8, 2048))
def test_rows_are_cut_as_llamafactory_cuts_them(prompt: int, response: int, limit: int) -> None:
    from llamafactory.data.processor.processor_utils import infer_seqlen

    cut = _cut(np.array([prompt]), np.array([response]), limit)
    assert (cut[0].item(), cut[1].item()) == infer_seqlen(prompt, response, limit)
