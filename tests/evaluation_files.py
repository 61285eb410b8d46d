"""Prompts and results of test users, for the tests of evaluation."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
from assets import make_index, make_tiny_model, rl_rows, teach_form

from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.evaluation.metrics import ranking_metrics
from gream_verl.evaluation.results import Evaluation, measure

ITEMS = [str(item) for item in range(40)]
COUNTS = Counter({item: int(item) for item in ITEMS})
PROTOCOL = {"split": "test", "history": 20, "drop_history": True, "template": "a"}


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


def make_taught_run(folder: Path, users: int) -> Path:
    """Write a model that answers in the right form, though half of its items left the index, and its prompts."""
    known, index = make_index(), make_index(items=12)
    index.save(folder / "tiny.index.json")
    make_tiny_model(folder / "model", known)
    teach_form(folder / "model", known, steps=100)
    pl.DataFrame(rl_rows(index, users)).write_parquet(folder / "tiny-test.parquet")
    return folder


def make_evaluation(
    mode: str, *, skill: float = 0.2, users: int = 60, shift: int = 0, shuffled: bool = False,
    protocol: dict[str, Any] = PROTOCOL,
) -> Evaluation:  # fmt: skip
    """Return the evaluation of a model that finds a target with the chance ``skill`` and is otherwise random."""
    rows = []
    for user in range(users):
        draw = random.Random(f"{user}{skill}{mode}")
        target = ITEMS[(user * 7 + shift) % 40]
        recommended = draw.sample(ITEMS, 20)
        if draw.random() < skill:
            recommended = [target, *(item for item in recommended if item != target)][:20]
        row = {"user": str(user), "target": target, "recommended": recommended, "history_length": user % 30}
        rows.append(row | ({"rsvr": draw.choice([0.0, 0.5, 1.0])} if mode == "direct" else {}))
    if shuffled:
        random.Random(1).shuffle(rows)
    settings = {"mode": mode, "users": users, "seed": 0, "drop_history": True, "protocol": protocol}
    made = Evaluation({}, settings, rows)
    return measure(Evaluation(ranking_metrics(made.ranks), settings, rows), ITEMS, COUNTS)
