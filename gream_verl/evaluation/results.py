"""What an evaluation found, as files: a JSON with metrics and settings, and a JSON line for each user."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, require_file, write_json, write_text
from gream_verl.evaluation.metrics import RANKING, pass_at_k, rank_of, user_metric

BASELINES = ("popularity", "co-occurrence")
"""The floors, in the order of every table."""
MODELS = ("direct", "reasoning")
"""What ``settings["mode"]`` of a language model is; anything else is a baseline."""
DECISIVE = ("split", "held_out", "history", "seen", "drop_history", "candidates", "items")
"""What two protocols must agree on for their numbers to be comparable; template and mode are part of the model."""
OF_THE_PROMPTS = ("split", "held_out", "history")
"""What of it is settled where users, targets and messages are the same, as ``prompts_digest`` tells."""
DECISIVE_FOR_BASELINES = ("drop_history", "items")
"""The same for baselines, which read no prompt and know the targets only from the rows."""
VALIDATION = "-val"
"""Behind the name of a result on the validation split: NAME-val-direct.json, popularity-val.json."""
REMEDY = "evaluate anew with `gream evaluate`"


@dataclass(frozen=True)
class Evaluation:
    """One model on one set of users.

    Attributes:
        metrics: Name to value, averages over users.
        settings: Everything that decides the result, and what it ran on.
        rows: One mapping a user, with at least ``user``, ``target`` (an item) and, where items were ranked,
            ``recommended`` (items, best first).
        intervals: Name of a metric to the ends of its 95% bootstrap interval; made by ``breakdown.describe``.
        breakdown: What users are divided by to buckets; see ``breakdown.break_down``.
    """

    metrics: Mapping[str, float]
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    breakdown: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)

    @cached_property
    def ranks(self) -> NDArray[np.int64]:
        """The place of each user's target, from 1; 0 when it was not recommended. int64 [users]."""
        return np.array([rank_of(row["target"], row["recommended"]) for row in self.rows], dtype=np.int64)

    @cached_property
    def depth(self) -> int:
        """Length of the longest recommended list; 0 when nothing was ranked."""
        return max((len(row.get("recommended", ())) for row in self.rows), default=0)

    def reaches(self, k: int) -> bool:
        """Return whether the first k places are known.

        They are where lists are so long, or where none was cut: when all are shorter than was asked for, as few items
        were left or few answers sampled, there is nothing beyond them.
        """
        asked = self.settings.get("beams") or self.settings.get("k") or self.depth
        return self.depth > 0 and (0 < k <= self.depth or self.depth < asked)

    @property
    def is_baseline(self) -> bool:
        """Whether this is popularity, co-occurrence, SASRec: anything but a language model."""
        return self.settings.get("mode") not in MODELS

    def values(self, metric: str) -> NDArray[np.float64] | None:
        """Return a metric of every user, whose mean is the metric; float64 [users].

        Args:
            metric: A ranking metric, ``pass@k``, or anything that rows or their chains hold, such as ``rsvr``.

        Returns:
            None when this evaluation does not know it: no such metric, or lists and chains that are too few.
        """
        name, _, cutoff = metric.partition("@")
        chains: list[list[dict[str, Any]]] = [row.get("chains", []) for row in self.rows]
        if name in RANKING and cutoff.isdecimal():
            return user_metric(metric, self.ranks) if self.reaches(int(cutoff)) else None
        if all(metric in row for row in self.rows):
            return np.array([row[metric] for row in self.rows], dtype=np.float64)
        if name == "pass" and cutoff.isdecimal() and all(chains) and min(map(len, chains)) >= int(cutoff) > 0:
            correct = [sum(chain["acc"] for chain in some) for some in chains]
            return pass_at_k([len(some) for some in chains], correct, int(cutoff))
        if all(some and all(metric in chain for chain in some) for some in chains):
            return np.array([np.mean([chain[metric] for chain in some]) for some in chains])
        return None

    def of_users(self, users: Collection[tuple[str, str]]) -> Evaluation:
        """Return the evaluation of some users only.

        Args:
            users: Users, each with the target; those that are not here are left out.

        Returns:
            All metrics that are means over users, and no intervals and no breakdown.
        """
        places = [place for place, row in enumerate(self.rows) if (row["user"], row["target"]) in users]
        values_of = {metric: self.values(metric) for metric in self.metrics}
        metrics = {metric: float(values[places].mean()) for metric, values in values_of.items() if values is not None}
        return Evaluation(metrics, {**self.settings, "users": len(places)}, [self.rows[place] for place in places])

    def disagreements(self, other: Evaluation) -> list[str]:
        """Return why the numbers of ``other`` must not be paired with these; nothing when they may.

        Users, targets and what ``DECISIVE`` names must be the same; where one is a baseline, what
        ``DECISIVE_FOR_BASELINES`` names; less of it where the prompts are the same, see ``OF_THE_PROMPTS``. What a file
        does not tell is not compared: those made before protocols were kept tell ``drop_history`` only.
        """
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
            keys = tuple(key for key in keys if key not in OF_THE_PROMPTS)
        found += [
            f"{key.replace('_', ' ')} is {there[key]!r}, not {here[key]!r}"
            for key in keys
            if key in here and key in there and here[key] != there[key]
        ]
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path`` (all but the rows) and, beside it, ``<stem>.rows.jsonl``."""
        write_text(rows_path(path), "".join(json.dumps(row) + "\n" for row in self.rows))
        content = {"metrics": dict(self.metrics), "settings": dict(self.settings)}
        content |= {"intervals": dict(self.intervals), "breakdown": dict(self.breakdown)}
        write_json(path, content, indent=2)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Read what ``save`` wrote; older files have no intervals and no breakdown.

        Raises:
            InputError: When one of the two files is missing or damaged.
        """
        content = read_json(path, REMEDY)
        lines = require_file(rows_path(path), REMEDY).read_text(encoding="utf-8").rstrip("\n").split("\n")
        try:
            intervals = {metric: (low, high) for metric, (low, high) in content.get("intervals", {}).items()}
            rows = [json.loads(line) for line in lines]
            _check(content, rows)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not the result of an evaluation ({error!r}); {REMEDY}") from error
        if len(rows) != content["settings"]["users"]:
            users = content["settings"]["users"]
            raise InputError(f"{rows_path(path)}: {len(rows):,} rows, but the result is of {users:,} users; {REMEDY}")
        [(user, count)] = Counter(row["user"] for row in rows).most_common(1)
        if count > 1:
            raise InputError(f"{rows_path(path)}: user {user!r} has {count} rows; {REMEDY}")
        return cls(content["metrics"], content["settings"], rows, intervals, content.get("breakdown", {}))


def _check(content: Any, rows: Sequence[Any]) -> None:
    """Raise what ``load`` catches where a file does not hold what ``save`` wrote."""
    settings, metrics = content["settings"], content["metrics"]
    if not isinstance(settings["users"], int) or not isinstance(settings.get("protocol", {}), dict):
        raise TypeError("users or protocol of the settings")
    if not all(isinstance(value, int | float) for value in metrics.values()):
        raise TypeError("a metric is not a number")
    buckets = [bucket for some in content.get("breakdown", {}).values() for bucket in some]
    if not all(bucket.keys() >= {"bucket", "users", "intervals"} for bucket in buckets):
        raise KeyError("bucket, users or intervals of the breakdown")
    ranked = any("recommended" in row for row in rows) or any(metric.partition("@")[0] in RANKING for metric in metrics)
    needed = {"user": str, "target": str} | ({"recommended": list} if ranked else {})
    for number, row in enumerate(rows, start=1):
        for key, kind in needed.items():
            if not isinstance(row[key], kind):
                raise TypeError(f"{key} of row {number}")


def rows_path(path: str | os.PathLike[str]) -> Path:
    """Return where the rows of an evaluation lie: ``<stem>.rows.jsonl`` beside ``<stem>.json``."""
    return Path(path).with_suffix(".rows.jsonl")


def read_folder(folder: str | os.PathLike[str]) -> dict[str, Evaluation]:
    """Read all evaluations of a folder, by the names of their files: baselines first, then models.

    Raises:
        InputError: When there is none, or one is damaged.
    """
    found = {path.stem: Evaluation.load(path) for path, _ in _results(folder)}
    if not found:
        raise InputError(f"{folder}: no result of an evaluation (NAME.json and NAME.rows.jsonl); {REMEDY}")
    return dict(sorted(found.items(), key=lambda pair: (not pair[1].is_baseline, _place(pair[0]), pair[0])))


def read_baselines(folder: str | os.PathLike[str]) -> dict[str, Evaluation]:
    """Read the baselines of a folder, by the names of their files, floors first; there may be none.

    Raises:
        InputError: When one is damaged.
    """
    paths = [path for path, mode in _results(folder) if mode not in MODELS]
    return {path.stem: Evaluation.load(path) for path in sorted(paths, key=lambda path: (_place(path.stem), path))}


def _results(folder: str | os.PathLike[str]) -> Iterator[tuple[Path, Any]]:
    """Yield the results of a folder, by name, with their mode; other JSON files, such as compare.json, are none."""
    for path in sorted(Path(folder).glob("*.json")):
        content = read_json(path, REMEDY)
        settings = content.get("settings") if isinstance(content, dict) else None
        if rows_path(path).is_file() or (settings is not None and "metrics" in content):
            yield path, settings.get("mode") if isinstance(settings, dict) else None


def _place(name: str) -> int:
    floor = name.removesuffix(VALIDATION)
    return BASELINES.index(floor) if floor in BASELINES else len(BASELINES)
