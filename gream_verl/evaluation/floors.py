"""Floors: recommenders without a model, popularity and co-occurrence. A model below them has learnt nothing.

Both see what training sees, and recommend to the same users by the same protocol as the models.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import scipy.sparse as sp
from rich.progress import track

from gream_verl.core.counting import cooccurrence, cooccurrence_scores, flatten, recommend
from gream_verl.core.split import read_interactions, training_parts
from gream_verl.evaluation.metrics import rank_of, ranking_metrics
from gream_verl.evaluation.prompts import Prompt
from gream_verl.evaluation.results import FLOORS, Evaluation

USERS_AT_ONCE = 256


def evaluate_floors(
    inter_file: str | os.PathLike[str],
    prompts: Sequence[Prompt],
    items: Collection[str],
    protocol: Mapping[str, Any],
    *,
    k: int = 30,
    seed: int = 0,
) -> dict[str, Evaluation]:
    """Evaluate ``popularity`` and ``co-occurrence`` on the users of some prompts; ``k`` is the length of the lists.

    Only ``items``, those of the index, are recommended; others count in training and in histories. The ``protocol``
    decides on dropping the history, the ``seed`` on the order among items of equal score and popularity.
    """
    sequences = read_interactions(inter_file)
    candidates = sorted(items)
    others = set(chain(*sequences.values(), *(prompt.history for prompt in prompts))).difference(candidates)
    number_of = {item: number for number, item in enumerate([*candidates, *sorted(others)])}
    train = [[number_of[item] for item in part] for part in training_parts(inter_file, sequences).values()]
    histories = [[number_of[item] for item in prompt.history] for prompt in prompts]

    many = len(candidates)
    popularity = np.bincount(flatten(train)[0], minlength=len(number_of))[:many]
    order = np.lexsort((-np.random.default_rng(seed).permutation(many), -popularity))
    counts = cooccurrence(train, len(number_of))[:, :many]
    lists: dict[str, list[list[int]]] = {floor: [] for floor in FLOORS}
    for start in track(range(0, len(histories), USERS_AT_ONCE), description="Floors", transient=True):
        chunk = histories[start : start + USERS_AT_ONCE]
        dropped = chunk if protocol["drop_history"] else [[]] * len(chunk)
        lists["popularity"] += recommend(sp.csr_array((len(chunk), many)), dropped, order, k)
        lists["co-occurrence"] += recommend(cooccurrence_scores(counts, chunk), dropped, order, k)
    settings = {"interactions": os.fspath(inter_file), "k": k, "seed": seed, "protocol": dict(protocol)}
    evaluations = {}
    for floor, numbers in lists.items():
        rows = [{"recommended": [candidates[number] for number in best]} for best in numbers]
        evaluations[floor] = baseline_evaluation(floor, prompts, rows, settings)
    return evaluations


def baseline_evaluation(
    name: str, prompts: Sequence[Prompt], found: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> Evaluation:
    """Return the evaluation of a recommender that reads no prompt, from what it found for each user."""
    rows = [
        {"user": prompt.user, "target": prompt.target, "history_length": len(prompt.history), **row}
        for prompt, row in zip(prompts, found, strict=True)
    ]
    ranks = [rank_of(row["target"], row["recommended"]) for row in rows]
    return Evaluation(ranking_metrics(ranks), {"mode": name, "users": len(rows), **settings}, rows)
