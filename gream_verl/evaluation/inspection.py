"""Rollouts and recommended lists for a reader: titles instead of ids, the worst and the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from rich.table import Table
from rich.text import Text

from gream_verl.core.errors import InputError
from gream_verl.core.files import require_file
from gream_verl.core.rsvr import matching_depth, reference_answer
from gream_verl.core.semantic_ids import SID_TOKEN, ItemIndex, find_sids, parse_sid
from gream_verl.evaluation.metrics import rank_of

SHOWN = 5
"""Items of a list that are shown."""
REMEDY = "verl writes it into trainer.rollout_data_dir and trainer.validation_data_dir"


def read_rollouts(path: Path) -> list[dict[str, Any]]:
    """Return the rollouts of verl's ``<step>.jsonl``, or of the last step in its folder, the lowest reward first."""
    if path.is_dir():
        steps = [file for file in path.glob("*.jsonl") if file.stem.isdigit()]
        path = max(steps, key=lambda file: int(file.stem), default=path / "<step>.jsonl")
    try:
        rows = pl.read_ndjson(require_file(path, REMEDY), infer_schema_length=None)
        rows = rows.select("step", "score", "input", "output", "gts").drop_nulls()
        return rows.sort("score", maintain_order=True).to_dicts()
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{path}: not rollouts of verl ({error}); {REMEDY}") from error


def list_table(rows: Sequence[Mapping[str, Any]], limit: int, titles: Mapping[str, str]) -> Table:
    """Return a table of the ``limit`` best and worst lists of an evaluation, by the place of the target."""
    if not all("recommended" in row for row in rows):
        raise InputError("the result has no lists; evaluate with beams above 0")
    ranks = [rank_of(row["target"], row["recommended"]) for row in rows]
    order = sorted(range(len(rows)), key=lambda row: ranks[row] or float("inf"))
    table = Table("user", "place", "target", "recommended", title=f"{len(rows)} lists", title_justify="left")
    for part in (order[:limit], order[max(limit, len(order) - limit) :]):
        for row in part:
            target, items = rows[row]["target"], rows[row]["recommended"][:SHOWN]
            listed = "\n".join(f"{place}. {titles.get(item, item)}" for place, item in enumerate(items, 1))
            table.add_row(rows[row]["user"], str(ranks[row] or "none"), Text(titles.get(target, target)), Text(listed))
        table.add_section()
    return table


def rollout_table(
    rollouts: Sequence[Mapping[str, Any]], limit: int, index: ItemIndex, titles: Mapping[str, str]
) -> Table:
    """Return a table of the ``limit`` worst and the ``limit`` best of rollouts, given with the lowest reward first."""

    def titles_in(text: str) -> list[str]:
        return [titles[index.items[sid]] for sid in find_sids(text) if sid in index.items]

    step = rollouts[0]["step"] if rollouts else 0
    mean = sum(row["score"] for row in rollouts) / max(1, len(rollouts))
    table = Table(title=f"{len(rollouts)} rollouts of step {step}, mean reward {mean:.4f}", title_justify="left")
    for heading, ratio in (("reward", None), ("depth", None), ("answer, truth", 2), ("history, chain", 5)):
        table.add_column(heading, ratio=ratio, overflow="fold")
    for part in (rollouts[:limit], rollouts[max(limit, len(rollouts) - limit) :][::-1]):
        for row in part:
            answer = reference_answer(row["output"], "reasoning") or parse_sid(row["output"].strip()) or ()
            chain = row["output"].partition("<think>")[2].partition("</think>")[0] or SID_TOKEN.sub("", row["output"])
            named = [next(iter(titles_in(sid)), "(no item)") for sid in ("".join(answer), row["gts"])]
            table.add_row(
                f"{row['score']:.3f}",
                str(matching_depth(answer, parse_sid(row["gts"]) or ())),
                Text.assemble((named[0], "bold"), "\n", named[1]),
                Text.assemble((", ".join(titles_in(row["input"])[-5:]), "dim"), "\n", " ".join(chain.split())),
            )
        table.add_section()
    return table
