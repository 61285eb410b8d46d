"""The result of an evaluation: metrics, settings, one row per user, intervals; in memory and as files."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, require_file, write_json, write_text
from gream_verl.core.split import read_interactions, training_parts
from gream_verl.decoding.chains import in_turn
from gream_verl.evaluation.metrics import RANKING, bootstrap_mean, coverage, rank_of, ranking_metrics, user_metric

FLOORS = ("popularity", "co-occurrence")
MODEL_MODES = ("direct", "reasoning", "merged")  # settings["mode"] of a language model; anything else is a baseline
# Settings of the protocol that comparable results share, the first two also baselines, which read no prompt. Template
# and mode are part of the model.
DECISIVE = ("drop_history", "items", "seen", "history")
MEASURES = ("rsvr", "greedy_rsvr", "expected_rsvr", "target_logprob", "target_logprob_without_chain", "chain_gain")
"""Measures of answers, one per row where they are known; docs/evaluation.md defines them."""
MAIN_METRICS = ("recall@10", "ndcg@10", *MEASURES)  # with intervals and tests
REMEDY = "run `gream evaluate` again"
TOLERANCE = 1e-6  # between a metric of a file and that of its rows


@dataclass(frozen=True)
class Evaluation:
    """One recommender on one set of users.

    ``rows`` has one mapping per user, with at least ``user``, ``target`` (an item) and, where items were ranked,
    ``recommended`` (items, best first).
    """

    metrics: Mapping[str, float]  # means over users
    settings: Mapping[str, Any]  # everything that decides the result, and the machine
    rows: Sequence[Mapping[str, Any]]
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # 95%, bootstrap; see measure

    @cached_property
    def ranks(self) -> NDArray[np.int64]:
        """Rank of each user's target, from 1; 0 when it was not recommended. int64 [users]."""
        return np.array([rank_of(row["target"], row["recommended"]) for row in self.rows], dtype=np.int64)

    @cached_property
    def depth(self) -> int:
        """Length of the longest recommended list; 0 when nothing was ranked."""
        return max((len(row.get("recommended", ())) for row in self.rows), default=0)

    def reaches(self, k: int) -> bool:
        """Return True when the first k ranks are known: lists are that long, or ended before the length asked for."""
        asked = self.settings.get("beams") or self.settings.get("k") or self.depth
        return self.depth > 0 and (0 < k <= self.depth or self.depth < asked)

    @property
    def is_baseline(self) -> bool:
        """True for popularity, co-occurrence and SASRec, False for a language model."""
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
        keys = DECISIVE[:2] if self.is_baseline or other.is_baseline else DECISIVE
        different = [key for key in keys if here.keys() & there.keys() >= {key} and here[key] != there[key]]
        return found + [f"{key.replace('_', ' ')} is {there[key]!r}, not {here[key]!r}" for key in different]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``<stem>.rows.jsonl`` and then ``path``, which holds all but the rows."""
        write_text(rows_path(path), "".join(json.dumps(row) + "\n" for row in self.rows))
        content = {"metrics": dict(self.metrics), "settings": dict(self.settings), "intervals": dict(self.intervals)}
        write_json(path, content, indent=2)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Read the two files of ``save``."""
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
            lists = {row["user"]: row.get("recommended", ()) for row in rows}
            if twice := [user for user, items in lists.items() if len({*items}) < len(items)]:
                raise ValueError(f"user {twice[0]!r} has an item twice")
            found = cls(metrics, settings, rows, intervals)
            for name, value in metrics.items():
                own = found.values(name) if name.partition("@")[0] in RANKING else None
                if own is not None and abs(own.mean() - value) > TOLERANCE:
                    raise ValueError(f"{name} is {value}, but {own.mean():.6g} of its rows")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not the result of an evaluation ({error!r}); {REMEDY}") from error
        return found


def merged(first: Evaluation, second: Evaluation) -> Evaluation:
    """Return one list for each user from two: the best of the first, the best of the second, and so on, each item once.

    No model runs. The list of a user has the length of the shorter one.
    """
    lists_of = {row["user"]: row["recommended"] for row in second.rows}
    rows = []
    for row in first.rows:
        lists = row["recommended"], lists_of[row["user"]]
        items = in_turn(*lists, min(map(len, lists)))
        kept = {key: row[key] for key in ("user", "target", "history_length") if key in row}
        rows.append({**kept, "recommended": items})
    ranks = [rank_of(row["target"], row["recommended"]) for row in rows]
    settings = {**first.settings, "mode": "merged", "score": "ranks of both modes in turn"}
    return Evaluation(ranking_metrics(ranks), settings, rows)


def row_means(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean over users of every measure of answers that the rows have."""
    known = [name for name in MEASURES if all(name in row for row in rows)]
    return {name: float(np.mean([row[name] for row in rows])) for name in known}


def rows_path(path: str | os.PathLike[str]) -> Path:
    """Return the file of the rows, ``<stem>.rows.jsonl`` next to ``<stem>.json``."""
    return Path(path).with_suffix(".rows.jsonl")


def read_folder(folder: str | os.PathLike[str]) -> dict[str, Evaluation]:
    """Read all evaluations of a folder by file name: floors, other baselines, models. There may be none."""
    # Other JSON files, such as a saved comparison, have no rows.
    paths = [path for path in sorted(Path(folder).glob("*.json")) if rows_path(path).is_file()]
    found = {path.stem: Evaluation.load(path) for path in paths}
    order = {f"{floor}{suffix}": number for number, floor in enumerate(FLOORS) for suffix in ("", "-val")}
    names = sorted(found, key=lambda name: (not found[name].is_baseline, order.get(name, len(FLOORS)), name))
    return {name: found[name] for name in names}


def training_counts(inter_file: str | os.PathLike[str], items: Collection[str]) -> Counter[str]:
    """Count the training interactions of every item of the index and the interactions; 0 for those unseen."""
    sequences = read_interactions(inter_file)
    counts = Counter(dict.fromkeys(chain(items, *sequences.values()), 0))
    counts.update(chain.from_iterable(training_parts(inter_file, sequences).values()))
    return counts


def measure(
    evaluation: Evaluation, items: Collection[str], counts: Counter[str], *, cutoffs: Sequence[int] = (), seed: int = 0
) -> Evaluation:
    """Add metrics at more cutoffs, metrics that need the data set, and intervals; drop what the lists do not reach.

    ``novelty@10`` is the mean of -log2 p of the recommended items with p = (count + 1) / (interactions + items) (Zhou
    et al., "Solving the apparent diversity-accuracy dilemma of recommender systems", 2010). Every row gets
    ``target_popularity``, the count of the target. The ``items`` are those of the index, the ``counts`` from
    ``training_counts``, the ``seed`` is that of the bootstrap.
    """
    metrics = dict(evaluation.metrics)
    if evaluation.depth:
        metrics |= ranking_metrics(evaluation.ranks, cutoffs)
        lists = [row["recommended"] for row in evaluation.rows]
        metrics["coverage@10"] = coverage(lists, items, 10)
        shown, total = Counter(chain.from_iterable(some[:10] for some in lists)), counts.total() + len(counts)
        bits = sum(times * -log2((counts[item] + 1) / total) for item, times in shown.items())
        metrics["novelty@10"] = bits / shown.total()
    values = {metric: evaluation.values(metric) for metric in MAIN_METRICS}
    intervals = {metric: bootstrap_mean(some, seed=seed) for metric, some in values.items() if some is not None}
    known = {
        metric: value
        for metric, value in metrics.items()
        if "@" not in metric or metric.startswith("pass@") or evaluation.reaches(int(metric.partition("@")[2]))
    }
    rows = [{**row, "target_popularity": counts[row["target"]]} for row in evaluation.rows]
    return replace(evaluation, metrics=known, rows=rows, intervals=intervals)
