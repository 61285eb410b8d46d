"""The items of a data set, and the metrics of an evaluation that need them."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from math import log2

from gream_verl.core.errors import InputError
from gream_verl.core.split import read_interactions, training_parts
from gream_verl.evaluation.metrics import bootstrap_mean, coverage, ranking_metrics
from gream_verl.evaluation.results import Evaluation

MAIN_METRICS = ("recall@10", "ndcg@10", "rsvr")
"""Metrics with intervals and tests."""


@dataclass(frozen=True)
class Catalogue:
    """The items of a data set with their training interactions.

    Attributes:
        popularity: Item to its number of training interactions, 0 for items that training does not see.
        items: Items that may be recommended, those of the index.
    """

    popularity: Mapping[str, int]
    items: Collection[str]

    @classmethod
    def load(cls, inter_file: str | os.PathLike[str], items: Collection[str]) -> Catalogue:
        """Count the training interactions in ``<D>.inter.json``."""
        sequences = read_interactions(inter_file)
        if not any(sequences.values()):
            raise InputError(f"{inter_file}: no interaction; make it with `gream data prepare`")
        popularity = Counter(dict.fromkeys(chain(items, *sequences.values()), 0))
        popularity.update(chain.from_iterable(training_parts(inter_file, sequences).values()))
        return cls(popularity, frozenset(items))

    def information(self, item: str) -> float:
        """Return -log2 p of an item in bits, with p = (popularity + 1) / (interactions + items)."""
        return -log2((self.popularity.get(item, 0) + 1) / self._total)

    @cached_property
    def _total(self) -> int:
        return sum(self.popularity.values()) + len(self.popularity)


def measure(
    evaluation: Evaluation, catalogue: Catalogue | None, *, cutoffs: Sequence[int] = (), seed: int = 0
) -> Evaluation:
    """Add metrics at more cutoffs, metrics that need the catalogue, and intervals; drop what the lists do not reach.

    Args:
        evaluation: Result of ``evaluate_direct`` and its like.
        catalogue: Items of its data set; None where there are no interactions.
        cutoffs: More lengths of lists.
        seed: Seed of the bootstrap.

    Returns:
        The evaluation with, of its ranking, ``coverage@10``; ``novelty@10``, the mean self-information of the
        recommended items in bits (Zhou et al., "Solving the apparent diversity-accuracy dilemma of recommender
        systems", 2010); ``popularity@10``, their mean number of training interactions (RecBole's AveragePopularity);
        and the 95% ``intervals`` of the main metrics.
    """
    metrics = dict(evaluation.metrics)
    if evaluation.depth:
        metrics |= ranking_metrics(evaluation.ranks, cutoffs)
        if catalogue is not None:
            lists = [row["recommended"] for row in evaluation.rows]
            shown = Counter(item for items in lists for item in items[:10])
            bits = sum(catalogue.information(item) * times for item, times in shown.items())
            seen = sum(catalogue.popularity.get(item, 0) * times for item, times in shown.items())
            metrics["coverage@10"] = coverage(lists, catalogue.items, 10)
            metrics |= {"novelty@10": bits / shown.total(), "popularity@10": seen / shown.total()}

    def is_known(metric: str) -> bool:
        name, _, cutoff = metric.partition("@")
        return not cutoff or name == "pass" or evaluation.reaches(int(cutoff))

    values = {metric: evaluation.values(metric) for metric in MAIN_METRICS}
    intervals = {metric: bootstrap_mean(some, seed=seed) for metric, some in values.items() if some is not None}
    known = {metric: value for metric, value in metrics.items() if is_known(metric)}
    return replace(evaluation, metrics=known, intervals=intervals)
