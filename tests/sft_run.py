"""A small SFT run of real LLaMA-Factory, for tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from small_data import make_data

from data_processing.sft.mix import MixOptions, write_mix
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.model.tiny_model import make_tiny_model, read_sft_texts

CONFIG = Path(__file__).parents[1] / "sft_configs" / "tiny_cpu.yaml"
RECORDER = Path(__file__).with_name("sft_recorder.py")
ROWS = {"seqrec": 40, "item2index": 10, "reasoning": 12}


def make_sft_run(folder: Path, rows: Mapping[str, int] = ROWS) -> Path:
    """Write ``data`` with ``small-mix.parquet`` and an untrained ``model`` in ``folder``; return the mix."""
    data = make_data(folder / "data", users=60)
    write_mix(data, MixOptions(rows))
    texts, index = read_sft_texts(data.mix), ItemIndex.load(data.index)
    make_tiny_model(texts, index, folder / "model", vocabulary_size=512, hidden_size=32, layers=1)
    return data.mix


def sft_arguments(folder: Path, *overrides: str) -> list[str]:
    """Return the arguments of ``llamafactory-cli train`` that train what :func:`make_sft_run` wrote."""
    paths = [f"model_name_or_path={folder}/model", f"dataset_dir={folder}/data", f"output_dir={folder}/sft"]
    return [str(CONFIG), *paths, "dataset=small-mix", "logging_steps=1", "preprocessing_num_workers=1", *overrides]


@contextmanager
def running(command: Sequence[str], log: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command of this environment, whose output goes to ``log``; end its process group when the block ends."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with log.open("wb") as output:
        process = subprocess.Popen(
            list(command),
            env={**os.environ, "PATH": path, **variables},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def train(folder: Path, *overrides: str, ranks: int = 1, script: Path | None = None) -> dict[str, Any]:
    """Train with ``llamafactory-cli``, or with a script of the same arguments; return the trainer's state."""
    if script is None:
        command = ["llamafactory-cli", "train"]
    elif ranks == 1:
        command = ["python", str(script)]
    else:
        command = ["torchrun", "--standalone", f"--nproc-per-node={ranks}", str(script)]
    torchrun = {"FORCE_TORCHRUN": "1", "NPROC_PER_NODE": str(ranks)} if ranks > 1 else {}
    arguments, log = sft_arguments(folder, *overrides), folder / "sft.log"
    with running([*command, *arguments], log, **torchrun) as process:
        assert process.wait(150) == 0, log.read_text(errors="replace")[-4000:]
    output = next(word.partition("=")[2] for word in reversed(arguments) if word.startswith("output_dir="))
    return json.loads((Path(output) / "trainer_state.json").read_text())


def logged(state: Mapping[str, Any], name: str) -> list[Any]:
    """Return what was logged as ``name``, step by step."""
    return [row[name] for row in state["log_history"] if "loss" in row]
