"""For whom a recommender is good, and what it shows: users by history and target, coverage, novelty, intervals."""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from math import log2
from typing import Any

import numpy as np

from gream_verl.core.errors import InputError
from gream_verl.core.split import read_interactions, training_parts
from gream_verl.evaluation.metrics import bootstrap_mean, coverage, mean_of_recommended
from gream_verl.evaluation.results import Evaluation

BOUNDS = {
    "history length": ("history_length", (0, 1, 5, 10, 20, 50)),
    "popularity of the target": ("target_popularity", (0, 1, 5, 10, 20, 50, 100, 500)),
}
"""What divides the users: the key of the rows, and where each bucket begins; the last one has no end."""


@dataclass(frozen=True)
class Catalogue:
    """All items of a data set, and how often training sees each.

    Attributes:
        popularity: Item to the number of training interactions; 0 for items that are only held out, or in no
            interaction.
        items: What may be recommended, of which coverage is the share; None: all of ``popularity``.
    """

    popularity: Mapping[str, int]
    items: Collection[str] | None = None

    @classmethod
    def load(cls, inter_file: str | os.PathLike[str], items: Collection[str] | None = None) -> Catalogue:
        """Read ``<D>.inter.json`` and the split beside it.

        Args:
            inter_file: ``<D>.inter.json``.
            items: What may be recommended, those of the index; None: all of the interactions.

        Raises:
            InputError: When a file cannot be used.
        """
        sequences = read_interactions(inter_file)
        if not any(sequences.values()):
            raise InputError(f"{inter_file}: no interaction; make it anew with `gream data prepare`")
        popularity = Counter(dict.fromkeys(chain(items or (), *sequences.values()), 0))
        popularity.update(chain.from_iterable(training_parts(inter_file, sequences).values()))
        return cls(popularity, None if items is None else frozenset(items))

    @cached_property
    def _total(self) -> int:
        return sum(self.popularity.values()) + len(self.popularity)

    def information(self, item: str) -> float:
        """Return the self-information of an item in bits, -log2 p, with p = (popularity + 1) / (interactions + items).

        p is the chance that a training interaction is with this item; one more for each item keeps it above 0.
        """
        return -log2((self.popularity.get(item, 0) + 1) / self._total)


def describe(evaluation: Evaluation, catalogue: Catalogue, *, k: int = 10, seed: int = 0) -> Evaluation:
    """Add what needs the catalogue, and how sure the numbers are.

    Args:
        evaluation: What ``evaluate_direct`` and its like return.
        catalogue: Of the data set it was made on.
        k: Length of the lists.
        seed: Seed of the bootstrap.

    Returns:
        The evaluation with, of what was ranked, ``coverage@k``, ``novelty@k`` (mean self-information of the
        recommended items in bits; Zhou et al., "Solving the apparent diversity-accuracy dilemma of recommender
        systems", 2010) and ``popularity@k`` (mean number of training interactions of the recommended items, RecBole's
        AveragePopularity); ``target_popularity`` in every row; 95% ``intervals`` of recall@k, ndcg@k and rsvr; and
        ``breakdown``.
    """
    rows = [{**row, "target_popularity": catalogue.popularity.get(row["target"], 0)} for row in evaluation.rows]
    metrics = dict(evaluation.metrics)
    if evaluation.depth:
        lists = [row["recommended"] for row in rows]
        metrics[f"coverage@{k}"] = coverage(
            lists, catalogue.popularity if catalogue.items is None else catalogue.items, k
        )
        metrics[f"novelty@{k}"] = mean_of_recommended(lists, catalogue.information, k)
        metrics[f"popularity@{k}"] = mean_of_recommended(lists, lambda item: catalogue.popularity.get(item, 0), k)
    described = replace(evaluation, metrics=metrics, rows=rows)
    return replace(
        described, intervals=intervals(described, k=k, seed=seed), breakdown=break_down(described, k=k, seed=seed)
    )


def main_metrics(k: int) -> tuple[str, ...]:
    """Return the metrics that have intervals and tests: those one looks at first."""
    return f"recall@{k}", f"ndcg@{k}", "rsvr"


def intervals(evaluation: Evaluation, *, k: int = 10, seed: int = 0) -> dict[str, tuple[float, float]]:
    """Return the 95% bootstrap intervals over users of the main metrics that this evaluation knows."""
    known = {metric: evaluation.values(metric) for metric in main_metrics(k)}
    return {metric: bootstrap_mean(values, seed=seed) for metric, values in known.items() if values is not None}


def break_down(evaluation: Evaluation, *, k: int = 10, seed: int = 0) -> dict[str, list[dict[str, Any]]]:
    """Return the main metrics of users by the length of their history and by the popularity of their target.

    Returns:
        ``history length`` and ``popularity of the target``, where all rows know it, with the buckets that hold users:
        ``bucket`` (such as ``5-9``), ``users``, the metrics, and their ``intervals``.
    """
    known = {metric: values for metric in main_metrics(k) if (values := evaluation.values(metric)) is not None}
    result = {}
    for heading, (key, bounds) in BOUNDS.items():
        if not known or not all(key in row for row in evaluation.rows):
            continue
        place = np.array([bisect_right(bounds, row[key]) - 1 for row in evaluation.rows])
        result[heading] = [
            {
                "bucket": _label(bounds, bucket),
                "users": int((place == bucket).sum()),
                **{metric: float(values[place == bucket].mean()) for metric, values in known.items()},
                "intervals": {
                    metric: list(bootstrap_mean(values[place == bucket], seed=seed)) for metric, values in known.items()
                },
            }
            for bucket in np.unique(place)
        ]
    return result


def labels(heading: str) -> list[str]:
    """Return the labels of all buckets of a heading, in order."""
    _, bounds = BOUNDS[heading]
    return [_label(bounds, bucket) for bucket in range(len(bounds))]


def _label(bounds: Sequence[int], bucket: int) -> str:
    if bucket == len(bounds) - 1:
        return f"{bounds[bucket]}+"
    first, last = bounds[bucket], bounds[bucket + 1] - 1
    return str(first) if first == last else f"{first}-{last}"
