"""The check of a GPU, with a tiny shape and no GPU; SRPO, constrained or not, is that of ``test_srpo``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gream_verl.core.files import read_json

pytestmark = [pytest.mark.integration, pytest.mark.timeout(500)]
pytest.importorskip("llamafactory", reason="LLaMA-Factory is not installed")
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_check.py"


def test_every_part_but_srpo_is_measured(tmp_path: Path) -> None:
    parts = ["machine", "beam search", "index", "SFT"]
    only = [argument for part in parts for argument in ("--only", part)]
    command = [sys.executable, str(SCRIPT), "--tiny", *only, "--output", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=480, check=False)
    assert done.returncode == 0, done.stderr
    found = read_json(tmp_path / "found.json")
    assert {row["part"] for row in found} == set(parts)
    assert not [row for row in found if row["what"] in ("FAILED", "skipped")]
    searched = [row["value"] for row in found if row["part"] == "beam search" and "items" in row["what"]]
    assert len(searched) == 2
    assert all("30 items 100%, first item 2 of 2" in value for value in searched)
