"""Prompts of test users on disk, for the tests of evaluation."""

from __future__ import annotations

from pathlib import Path

import polars as pl
from assets import rl_rows

from gream_verl.core.semantic_ids import ItemIndex


def write_prompts(path: Path, index: ItemIndex, users: int) -> Path:
    """Write direct, then reasoning prompts of ``users`` users, with histories of different lengths."""
    rows = []
    for mode in ("direct", "reasoning"):
        for number, row in enumerate(rl_rows(index, users, mode)):
            history = row["extra_info"]["history"][: 1 + number % 5]
            row["extra_info"]["history"] = history
            row["prompt"] = [
                {"role": "system", "content": "Recommend."},
                {"role": "user", "content": "".join(index.texts(history)) + " Next?"},
            ]
            rows.append(row)
    pl.DataFrame(rows).write_parquet(path)
    return path
