"""LLaMA-Factory feeds the rows of the mix in the file's order, also on two nodes; held-out losses change nothing."""

from __future__ import annotations

import json
from contextlib import ExitStack
from itertools import chain
from pathlib import Path

import pytest
from local_server import free_port
from sft_run import RECORDER, ROWS, logged, make_sft_run, running, sft_arguments, train
from transformers import AutoTokenizer

from data_processing.sft.check import read_rows
from data_processing.sft.lengths import token_counter

pytestmark = [pytest.mark.integration, pytest.mark.timeout(200)]

BATCH, ACCUMULATION = 4, 2
EVALUATION = (
    f"eval_dataset={','.join(f'small-mix-eval-{task}' for task in ROWS)}",
    "eval_on_each_dataset=true",
    "eval_strategy=steps",
    "eval_steps=8",
    "per_device_eval_batch_size=8",
    "plot_loss=true",
)
"""The keys of the Qwen3-4B configs."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    make_sft_run(folder)
    return folder


def test_the_model_is_fed_the_rows_of_the_file_and_held_out_losses_change_nothing(folder: Path) -> None:
    settings = [f"per_device_train_batch_size={BATCH}", f"gradient_accumulation_steps={ACCUMULATION}", "save_steps=50"]
    settings.append("num_train_epochs=4")
    plain = train(folder, *settings, f"output_dir={folder}/plain", script=RECORDER)
    evaluated = train(folder, *settings, *EVALUATION, f"output_dir={folder}/evaluated")

    rows = read_rows(folder / "data" / "small-mix.parquet")
    assert len(set(rows)) == len(rows) == sum(ROWS.values())
    tokenizer, texts = AutoTokenizer.from_pretrained(folder / "model"), {}
    for number, row in enumerate(rows):
        turns = {"system": row.system, "user": row.user, "assistant": row.assistant}
        chat = [{"role": role, "content": text} for role, text in turns.items() if text]
        texts[tokenizer.apply_chat_template(chat, tokenize=False)] = number
    fed = [[texts[text] for text in json.loads(line)] for line in (folder / "plain" / "fed-0.jsonl").open()]
    assert max(map(len, fed)) == BATCH
    assert list(chain(*fed)) == list(range(len(rows))) * 4

    for name in ("step", "loss", "grad_norm", "learning_rate"):
        assert logged(evaluated, name) == logged(plain, name)
    weights = [(folder / output / "model.safetensors").read_bytes() for output in ("plain", "evaluated")]
    assert weights[0] == weights[1]
    for task in ROWS:
        name = f"eval_small-mix-eval-{task}_loss"
        losses = [row[name] for row in evaluated["log_history"] if name in row]
        assert len(losses) >= 4
        assert losses[-1] < losses[0] - 0.1
        assert (folder / "evaluated" / f"training_{name}.png").is_file()
    assert (folder / "evaluated" / "training_loss.png").is_file()


def test_two_nodes_train_the_rows_in_the_order_of_the_file(folder: Path) -> None:
    """Two launchers on this machine, gloo between them; each step has seen all tokens of the next rows."""
    steps, output = 3, folder / "nodes"
    settings = [f"max_steps={steps}", f"per_device_train_batch_size={BATCH}", "ddp_backend=gloo", "warmup_steps=1"]
    settings += [f"output_dir={output}", "include_num_input_tokens_seen=non_padding"]
    command = ["llamafactory-cli", "train", *sft_arguments(folder, *settings)]
    nodes = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "1", "NNODES": "2", "MASTER_ADDR": "127.0.0.1"}
    nodes["MASTER_PORT"] = str(free_port())
    with ExitStack() as both:
        logs = [folder / f"node-{rank}.log" for rank in range(2)]
        launchers = [
            both.enter_context(running(command, log, **nodes, NODE_RANK=str(rank))) for rank, log in enumerate(logs)
        ]
        for launcher, log in zip(launchers, logs, strict=True):
            assert launcher.wait(150) == 0, log.read_text(errors="replace")[-4000:]
    assert "Multi-node training enabled: num nodes: 2, node rank: 1" in logs[1].read_text()

    rows = read_rows(folder / "data" / "small-mix.parquet")
    tokens = token_counter(AutoTokenizer.from_pretrained(folder / "model"))(rows)
    step = BATCH * ACCUMULATION * 2
    expected = [sum(tokens[: step * done]) for done in range(1, steps + 1)]
    assert logged(json.loads((output / "trainer_state.json").read_text()), "num_input_tokens_seen") == expected
