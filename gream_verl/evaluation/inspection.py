"""Rollouts as a person reads them: titles instead of semantic IDs, the worst and the best first."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json
from gream_verl.core.rsvr import matching_depth, reference_answer
from gream_verl.core.semantic_ids import SID_TOKEN, ItemIndex, find_tokens, parse_sid

MADE_BY = "verl writes it where trainer.rollout_data_dir or trainer.validation_data_dir says"
UNKNOWN = "(no item)"
SHOWN = 5
"""Titles of a history that a table shows, the latest."""


@dataclass(frozen=True)
class Rollout:
    """One response and its reward.

    Attributes:
        step: Training step.
        reward: What the trainer was told.
        depth: Leading tokens of the answer that agree with the truth.
        history: Titles of the items in the prompt.
        chain: The text between ``<think>`` and ``</think>``, or the whole response without such a block.
        answer: Title of the answered item; ``(no item)`` when there is none.
        truth: Title of the target.
    """

    step: int
    reward: float
    depth: int
    history: list[str]
    chain: str
    answer: str
    truth: str


def read_rollouts(path: str | os.PathLike[str], index: ItemIndex, titles: Mapping[str, str]) -> list[Rollout]:
    """Return the rollouts of a file, or of the last step in a folder, the lowest reward first.

    Args:
        path: ``<step>.jsonl``, or verl's folder of them.
        index: The items and their SIDs.
        titles: Title of every item.

    Raises:
        InputError: When there is no such file or a line is not a rollout.
    """
    path = Path(path)
    if path.is_dir():
        steps = [file for file in path.glob("*.jsonl") if file.stem.isdigit()]
        if not steps:
            raise InputError(f"{path}: no file <step>.jsonl; {MADE_BY}")
        path = max(steps, key=lambda file: int(file.stem))
    if not path.is_file():
        raise InputError(f"{path}: no such file; {MADE_BY}")
    rollouts = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            rollouts.append(_rollout(json.loads(line), index, titles))
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: line {number}: not a rollout ({error}); {MADE_BY}") from error
    return sorted(rollouts, key=lambda rollout: rollout.reward)


def read_titles(item_file: str | os.PathLike[str]) -> dict[str, str]:
    """Return the titles in ``<D>.item.json``."""
    remedy = "make it with `gream data prepare`"
    items = read_json(item_file, remedy)
    if not isinstance(items, dict) or not all(isinstance(fields, dict) for fields in items.values()):
        raise InputError(f"{item_file}: expected {{item: {{title, ...}}}}; {remedy}")
    return {item: str(fields.get("title") or item) for item, fields in items.items()}


def titles_in(text: str, index: ItemIndex, titles: Mapping[str, str]) -> list[str]:
    """Return the titles of all items whose SIDs stand in ``text``, in order."""
    tokens, found, place = find_tokens(text), [], 0
    while place < len(tokens):
        for length in (index.base_levels + 1, index.base_levels):
            item = index.items.get(tuple(tokens[place : place + length]))
            if item is not None:
                found.append(titles.get(item, item))
                place += length
                break
        else:
            place += 1
    return found


def rollout_table(rollouts: Sequence[Rollout], limit: int) -> Table:
    """Return a table of the worst ``limit`` rollouts and the best ``limit``.

    Args:
        rollouts: The lowest reward first.
        limit: Rows of each kind.
    """
    worst = rollouts[:limit]
    best = rollouts[max(limit, len(rollouts) - limit) :][::-1]
    step = rollouts[0].step if rollouts else 0
    mean = sum(rollout.reward for rollout in rollouts) / max(1, len(rollouts))
    table = Table(title=f"{len(rollouts)} rollouts of step {step}, mean reward {mean:.4f}", title_justify="left")
    table.add_column("reward", justify="right")
    table.add_column("depth", justify="right")
    table.add_column("answer, truth", ratio=2, overflow="fold")
    table.add_column("history, chain", ratio=5, overflow="fold")
    for part in (worst, best):
        for rollout in part:
            table.add_row(
                f"{rollout.reward:.3f}",
                str(rollout.depth),
                f"[bold]{escape(rollout.answer)}[/bold]\n{escape(rollout.truth)}",
                f"[dim]{escape(_latest(rollout.history))}[/dim]\n{escape(rollout.chain)}",
            )
        table.add_section()
    return table


def _latest(history: Sequence[str]) -> str:
    older = len(history) - SHOWN
    return (f"{older} more, " if older > 0 else "") + ", ".join(history[-SHOWN:])


def _rollout(row: Mapping[str, Any], index: ItemIndex, titles: Mapping[str, str]) -> Rollout:
    response = str(row["output"])
    answer = reference_answer(response, "reasoning") or parse_sid(response.strip())
    chain = response.partition("<think>")[2].partition("</think>")[0] or SID_TOKEN.sub("", response)
    return Rollout(
        step=int(row["step"]),
        reward=float(row["score"]),
        depth=matching_depth(answer or (), parse_sid(str(row["gts"])) or ()),
        history=titles_in(str(row["input"]), index, titles),
        chain=" ".join(chain.split()),
        answer=next(iter(titles_in("".join(answer or ()), index, titles)), UNKNOWN),
        truth=next(iter(titles_in(str(row["gts"]), index, titles)), UNKNOWN),
    )
