"""The loss by task that `gream sft report` tells is the loss of the model, on real runs of LLaMA-Factory."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from sft_run import make_sft_run, sft_arguments, train

from data_processing.sft.config import SftConfig
from data_processing.sft.losses import Schedule
from data_processing.sft.training import report_training

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
ROWS = {"seqrec": 40, "item2index": 24, "reasoning": 25}


def losses_of_rows(model, mix, train_on_prompt):
    """Return the summed loss of the supervised tokens of every row, by transformers, one row at a time."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    sums, counts = [], []
    for row in pl.read_parquet(mix).iter_rows(named=True):
        chat = [
            *([{"role": "system", "content": row["system"]}] if row["system"] else []),
            {"role": "user", "content": row["conversations"][0]["value"]},
            {"role": "assistant", "content": row["conversations"][1]["value"]},
        ]
        ids = tokenizer.apply_chat_template(chat, return_dict=False)
        prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=False)
        assert ids[: len(prompt)] == prompt
        start = 0 if train_on_prompt else len(prompt)
        with torch.no_grad():
            log_probs = network(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        of_tokens = -log_probs.gather(1, torch.tensor(ids[1:])[:, None])[max(start - 1, 0) :]
        sums.append(of_tokens.sum().item())
        counts.append(len(of_tokens))
    return np.array(sums), np.array(counts)


def train_without_learning(folder, mix, *overrides, ranks=1):
    """Train at a learning rate of nothing; return the log, the report, and of each row the loss and its tokens."""
    given = [
        *("learning_rate=1e-12", "weight_decay=0", "num_train_epochs=2", "per_device_train_batch_size=3"),
        *("include_num_input_tokens_seen=non_padding", "save_steps=1000", *overrides),
    ]
    state = train(folder, *given, ranks=ranks)
    path, *keys = sft_arguments(folder, *given)
    training = report_training(SftConfig.read(Path(path), keys))
    log = [row for row in state["log_history"] if "loss" in row]
    sums, counts = losses_of_rows(folder / "model", mix, "train_on_prompt=true" in overrides)
    schedule = Schedule.of(len(sums), len(log), batch=3, accumulation=2, ranks=ranks)
    return log, training, sums, counts, schedule


def test_the_loss_of_each_task_is_that_of_the_model_where_steps_hold_several(tmp_path):
    mix = make_sft_run(tmp_path, ROWS)
    rows = pl.read_parquet(mix)
    alike = rows.with_columns(pl.exclude("task").first().over("task"))  # so that a task has one loss
    alike.sample(fraction=1, shuffle=True, seed=0).write_parquet(mix)
    log, training, sums, counts, schedule = train_without_learning(tmp_path, mix, "train_on_prompt=false")

    names = pl.read_parquet(mix)["task"].to_numpy()
    parts = np.split(schedule.rows, schedule.ends[:-1])
    assert np.mean([len(set(names[part])) for part in parts]) > 2
    assert [row["loss"] for row in log] == pytest.approx([sums[part].sum() / counts[part].sum() for part in parts])
    for name, task in training["tasks"].items():
        own = names == name
        assert task["supervised_tokens"] == counts[own].sum()
        told = [loss for loss in task["curve"]["losses"] if loss is not None]
        assert told
        assert told == pytest.approx([sums[own].sum() / counts[own].sum()] * len(told), abs=1e-4)
    assert training["epochs"] == 2
    assert not [remark for remark in training["remarks"] if "loss" in remark]


def test_two_ranks_and_trained_prompts_within_the_standard_errors(tmp_path):
    mix = make_sft_run(tmp_path, ROWS)
    log, training, sums, counts, schedule = train_without_learning(tmp_path, mix, "train_on_prompt=true", ranks=2)

    parts = np.split(schedule.rows, schedule.ends[:-1])
    assert [row["loss"] for row in log] == pytest.approx(
        [sums[part].sum() / (counts[part] + 1).sum() for part in parts]  # the trainer counts first tokens, too
    )
    names = pl.read_parquet(mix)["task"].to_numpy()[schedule.rows]
    for name, task in training["tasks"].items():
        direct = sums[schedule.rows][names == name].sum() / counts[schedule.rows][names == name].sum()
        curve = zip(task["curve"]["losses"], task["curve"]["standard_errors"], strict=True)
        told = [(loss, error) for loss, error in curve if loss is not None]
        assert min(error for _, error in told) < 0.05
        assert all(abs(loss - direct) < 4 * error for loss, error in told)
