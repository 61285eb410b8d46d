"""The result of an evaluation as files: JSON with metrics and settings, and one JSON line per user."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, require_file, write_json, write_text
from gream_verl.evaluation.metrics import RANKING, rank_of, user_metric

FLOORS = ("popularity", "co-occurrence")
MODEL_MODES = ("direct", "reasoning")
"""``settings["mode"]`` of a language model; anything else is a baseline."""
DECISIVE = ("split", "held_out", "history", "seen", "drop_history", "candidates", "items")
"""Settings of the protocol that two results must share to be comparable; template and mode are part of the model."""
DECIDED_BY_PROMPTS = ("split", "held_out", "history")
"""Settings that are the same wherever users, targets and messages are, which ``prompts_digest`` shows."""
DECISIVE_FOR_BASELINES = ("drop_history", "items")
"""The same for baselines, which read no prompt."""
REMEDY = "run `gream evaluate` again"


@dataclass(frozen=True)
class Evaluation:
    """One recommender on one set of users.

    Attributes:
        metrics: Name to mean over users.
        settings: Everything that decides the result, and the machine.
        rows: One mapping per user, with at least ``user``, ``target`` (an item) and, where items were ranked,
            ``recommended`` (items, best first).
        intervals: Metric to both ends of its 95% bootstrap interval; see ``catalogue.measure``.
    """

    metrics: Mapping[str, float]
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    @cached_property
    def ranks(self) -> NDArray[np.int64]:
        """Rank of each user's target, from 1; 0 when it was not recommended. int64 [users]."""
        return np.array([rank_of(row["target"], row["recommended"]) for row in self.rows], dtype=np.int64)

    @cached_property
    def depth(self) -> int:
        """Length of the longest recommended list; 0 when nothing was ranked."""
        return max((len(row.get("recommended", ())) for row in self.rows), default=0)

    def reaches(self, k: int) -> bool:
        """Return whether the first k ranks are known: lists are that long, or ended before the length asked for."""
        asked = self.settings.get("beams") or self.settings.get("k") or self.depth
        return self.depth > 0 and (0 < k <= self.depth or self.depth < asked)

    @property
    def is_baseline(self) -> bool:
        """Whether this is no language model but popularity, co-occurrence or SASRec."""
        return self.settings.get("mode") not in MODEL_MODES

    def values(self, metric: str) -> NDArray[np.float64] | None:
        """Return a ranking metric or a key of the rows, such as ``rsvr``, float64 [users]; None when it is unknown."""
        name, _, cutoff = metric.partition("@")
        if name in RANKING and cutoff.isdecimal():
            return user_metric(metric, self.ranks) if self.reaches(int(cutoff)) else None
        known = all(metric in row for row in self.rows)
        return np.array([row[metric] for row in self.rows], dtype=np.float64) if known else None

    def disagreements(self, other: Evaluation) -> list[str]:
        """Return the reasons why ``other`` must not be compared with this; settings that a file lacks are no reason."""
        ours, theirs = ({row["user"]: row["target"] for row in each.rows} for each in (self, other))
        common = ours.keys() & theirs.keys()
        found = []
        if len(common) < max(len(ours), len(theirs)):
            found.append(f"{len(common):,} of {max(len(ours), len(theirs)):,} users in common")
        if others := sum(ours[user] != theirs[user] for user in common):
            found.append(f"{others:,} users have another target")
        here, there = ({**each.settings, **each.settings.get("protocol", {})} for each in (self, other))
        keys: tuple[str, ...] = DECISIVE_FOR_BASELINES if self.is_baseline or other.is_baseline else DECISIVE
        if here.get("prompts_digest", "") == there.get("prompts_digest"):
            keys = tuple(key for key in keys if key not in DECIDED_BY_PROMPTS)
        different = [key for key in keys if here.keys() & there.keys() >= {key} and here[key] != there[key]]
        return found + [f"{key.replace('_', ' ')} is {there[key]!r}, not {here[key]!r}" for key in different]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``<stem>.rows.jsonl`` and then ``path``, which holds all but the rows."""
        write_text(rows_path(path), "".join(json.dumps(row) + "\n" for row in self.rows))
        content = {"metrics": dict(self.metrics), "settings": dict(self.settings), "intervals": dict(self.intervals)}
        write_json(path, content, indent=2)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Read the two files of ``save``.

        Raises:
            InputError: When one of them is missing or damaged.
        """
        content = read_json(path, REMEDY)
        lines = require_file(rows_path(path), REMEDY).read_text(encoding="utf-8").splitlines()
        try:
            settings, rows = content["settings"], [json.loads(line) for line in lines]
            metrics = {metric: float(value) for metric, value in content["metrics"].items()}
            intervals = {metric: (low, high) for metric, (low, high) in content.get("intervals", {}).items()}
            needed = {"user", "target"} | ({"recommended"} if any("recommended" in row for row in rows) else set())
            users = {row["user"] for row in rows if row.keys() >= needed}
            if not len(users) == len(rows) == settings["users"]:
                raise ValueError(f"{settings['users']} users, but {len(rows)} rows with {len(users)} complete users")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not the result of an evaluation ({error!r}); {REMEDY}") from error
        return cls(metrics, settings, rows, intervals)


def rows_path(path: str | os.PathLike[str]) -> Path:
    """Return the file of the rows, ``<stem>.rows.jsonl`` next to ``<stem>.json``."""
    return Path(path).with_suffix(".rows.jsonl")


def read_folder(folder: str | os.PathLike[str]) -> dict[str, Evaluation]:
    """Read all evaluations of a folder by file name: floors, other baselines, models. There may be none.

    Raises:
        InputError: When one is damaged.
    """
    # Other JSON files, such as a saved comparison, have no rows.
    paths = [path for path in sorted(Path(folder).glob("*.json")) if rows_path(path).is_file()]
    found = {path.stem: Evaluation.load(path) for path in paths}
    order = {f"{floor}{suffix}": number for number, floor in enumerate(FLOORS) for suffix in ("", "-val")}
    names = sorted(found, key=lambda name: (not found[name].is_baseline, order.get(name, len(FLOORS)), name))
    return {name: found[name] for name in names}
