"""Reasoning mode under kill -9."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from assets import make_index, make_tiny_model
from evaluation_files import write_prompts

from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.prompts import read_prompts
from gream_verl.evaluation.reasoning import evaluate_reasoning
from gream_verl.evaluation.results import Evaluation

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

USERS = 40
KILLED = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from test_reasoning_kill import evaluate
evaluate(Path(sys.argv[3]), Path(sys.argv[4]))
"""


def evaluate(folder: Path, progress: Path) -> Evaluation:
    prompts, _ = read_prompts(folder / "tiny-test.parquet", "reasoning")
    options = EvaluationOptions(engine="hf", chains=2, max_tokens=20, beams=5, batch_size=9)  # pieces of three users
    index = ItemIndex.load(folder / "tiny.index.json")
    return evaluate_reasoning(folder / "model", prompts, index, options, progress)


def test_a_killed_process_loses_nothing_and_another_goes_on_to_the_same_rows(tmp_path: Path) -> None:
    index, progress = make_index(), tmp_path / "progress.jsonl"
    index.save(tmp_path / "tiny.index.json")
    make_tiny_model(tmp_path / "model", index)
    write_prompts(tmp_path / "tiny-test.parquet", index, USERS)
    here = Path(__file__).parent
    command = [sys.executable, "-c", KILLED, str(here), str(here.parent), str(tmp_path), str(progress)]
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = {**os.environ, "PYTHONPATH": paths}
    run = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not progress.exists() or progress.read_bytes().count(b"\n") <= 0.3 * USERS:
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    run.kill()
    run.wait(30)
    lines = progress.read_bytes().splitlines(keepends=True)
    done = [line for line in lines if line.endswith(b"\n")]
    assert 0.3 * USERS < len(done) <= USERS

    resumed = evaluate(tmp_path, progress)
    assert resumed.settings["users_from_progress"] == len(done) - 1
    assert progress.read_bytes().splitlines(keepends=True)[: len(done)] == done
    assert list(resumed.rows) == list(evaluate(tmp_path, tmp_path / "whole.jsonl").rows)
