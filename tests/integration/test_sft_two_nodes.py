"""SFT on two nodes, as two launchers on this machine: one started on each node, gloo between them."""

from __future__ import annotations

import json
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest
from sft_run import logged, make_sft_run, running, sft_arguments
from transformers import AutoTokenizer

from data_processing.sft.row_lengths import turn_counter
from data_processing.sft.rows import Row, read_rows

pytestmark = [pytest.mark.integration, pytest.mark.timeout(200)]

STEPS, BATCH, ACCUMULATION = 3, 4, 2


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_two_nodes_train_the_rows_in_the_order_of_the_file(tmp_path: Path) -> None:
    mix = make_sft_run(tmp_path)
    settings = (f"max_steps={STEPS}", f"per_device_train_batch_size={BATCH}", "ddp_backend=gloo", "warmup_steps=1")
    command = ["llamafactory-cli", "train", *sft_arguments(tmp_path, *settings, "preprocessing_num_workers=1")]
    nodes = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": "1", "NNODES": "2", "MASTER_ADDR": "127.0.0.1"}
    nodes["MASTER_PORT"] = str(free_port())
    with ExitStack() as both:
        logs = [tmp_path / f"node-{rank}.log" for rank in range(2)]
        launchers = [
            both.enter_context(running(command, log, **nodes, NODE_RANK=str(rank))) for rank, log in enumerate(logs)
        ]
        for launcher, log in zip(launchers, logs, strict=True):
            assert launcher.wait(150) == 0, log.read_text(errors="replace")[-4000:]
    assert "Multi-node training enabled: num nodes: 2, node rank: 1" in logs[1].read_text()

    # What the trainer has seen after each step are all tokens of the next rows of the file.
    rows = [Row(*values) for values in read_rows(mix).iter_rows()]
    tokens = turn_counter(AutoTokenizer.from_pretrained(tmp_path / "model"))(rows).sum(1)
    a_step = BATCH * ACCUMULATION * 2
    expected = [int(tokens[: a_step * (step + 1)].sum()) for step in range(STEPS)]
    assert (
        logged(json.loads((tmp_path / "sft" / "trainer_state.json").read_text()), "num_input_tokens_seen") == expected
    )
