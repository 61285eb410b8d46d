"""Recommenders that need no model: a result below them means that nothing was learnt.

Both see what training sees, recommend to the same users as the models, and never recommend an item of the user's
history.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from gream_verl.evaluation.metrics import rank_of, ranking_metrics
from gream_verl.evaluation.prompts import read_prompts
from gream_verl.evaluation.results import Evaluation
from gream_verl.files import InputError, read_json
from gream_verl.split import training_parts

WINDOW = 10
RECENT = 20
USERS_AT_ONCE = 256

Scorer = Callable[[Sequence[Sequence[int]]], NDArray[np.float64]]


def popularity(train: Sequence[Sequence[int]], items: int) -> NDArray[np.float64]:
    """Return how often each item occurs in the training sequences. float64 [items]."""
    return np.bincount(_flatten(train)[0], minlength=items).astype(np.float64)


def cooccurrence(train: Sequence[Sequence[int]], items: int, *, window: int = WINDOW) -> sp.csr_array:
    """Count which items lie near which others in the training sequences.

    Two items at a distance of d places, at most ``window``, add 1/d to each other.

    Args:
        train: Rows of items, in time order, for each user.
        items: Number of items.
        window: The largest distance that counts.

    Returns:
        float64 [items, items], symmetric, sparse.
    """
    flat, user = _flatten(train)
    left, right, weight = [], [], []
    for distance in range(1, min(window, len(flat) - 1) + 1):
        same = user[distance:] == user[:-distance]
        left.append(flat[:-distance][same])
        right.append(flat[distance:][same])
        weight.append(np.full(int(same.sum()), 1.0 / distance))
    pairs = (np.concatenate([[], *left]).astype(np.int64), np.concatenate([[], *right]).astype(np.int64))
    one_way = sp.coo_array((np.concatenate([[], *weight]), pairs), shape=(items, items)).tocsr()
    return sp.csr_array(one_way + one_way.T)


def cooccurrence_scores(
    counts: sp.csr_array, histories: Sequence[Sequence[int]], *, recent: int = RECENT
) -> NDArray[np.float64]:
    """Score all items by their counts with each history; the item k places back weighs 1/k.

    Args:
        counts: [items, items]; from ``cooccurrence``.
        histories: Rows of items, in time order, for each of u users.
        recent: How many of the last items count.

    Returns:
        float64 [u, items].
    """
    flat, user = _flatten([history[-recent:] for history in histories])
    lengths = np.bincount(user, minlength=len(histories))
    place = np.arange(len(flat)) - (np.cumsum(lengths) - lengths)[user]
    recency = 1.0 / (lengths[user] - place)
    weights = sp.coo_array((recency, (user, flat)), shape=(len(histories), counts.shape[0])).tocsr()
    return (weights @ counts).toarray()


def recommend(
    scorer: Scorer, histories: Sequence[Sequence[int]], tie_break: NDArray[np.float64], k: int
) -> list[list[int]]:
    """Return the k best items of each user, without those of the history.

    Args:
        scorer: Gives [users, items] scores for some histories.
        histories: Rows of items for each user.
        tie_break: float64 [items], all different; decides between equal scores.
        k: Length of the lists; shorter where fewer items are left.
    """
    lists: list[list[int]] = []
    for start in range(0, len(histories), USERS_AT_ONCE):
        chunk = histories[start : start + USERS_AT_ONCE]
        scores = scorer(chunk)
        flat, user = _flatten(chunk)
        scores[user, flat] = -np.inf
        for row in scores:
            best = np.lexsort((-tie_break, -row))[:k]
            lists.append(best[row[best] > -np.inf].tolist())
    return lists


def evaluate_floors(
    inter_file: str | os.PathLike[str],
    prompts_parquet: str | os.PathLike[str],
    *,
    k: int = 30,
    limit: int | None = None,
    seed: int = 0,
) -> dict[str, Evaluation]:
    """Evaluate ``popularity`` and ``co-occurrence`` on the users of the direct prompts.

    Args:
        inter_file: ``<D>.inter.json``.
        prompts_parquet: ``<D>-test.parquet``.
        k: Length of the recommended lists.
        limit: As for ``evaluate_direct``: the same limit and seed give the same users.
        seed: Seed of the sample, and of the order among items of equal score and popularity.

    Raises:
        InputError: When a file cannot be used or a prompt has an item that the interactions lack.
    """
    sequences: Mapping[str, list[str]] = read_json(inter_file, "make it with `gream data prepare`")
    prompts, total = read_prompts(prompts_parquet, "direct", limit=limit, seed=seed)
    items = sorted({item for sequence in sequences.values() for item in sequence})
    row_of = {item: row for row, item in enumerate(items)}
    train = [[row_of[item] for item in part] for part in training_parts(inter_file, sequences).values()]
    try:
        histories = [[row_of[item] for item in prompt.history] for prompt in prompts]
    except KeyError as error:
        raise InputError(
            f"{prompts_parquet}: item {error} is not in {inter_file}; make both from the same data"
        ) from None

    popular = popularity(train, len(items))
    counts = cooccurrence(train, len(items))
    tie_break = popular + np.random.default_rng(seed).permutation(len(items)) / len(items)
    scorers: dict[str, Scorer] = {
        "popularity": lambda chunk: np.tile(popular, (len(chunk), 1)),
        "co-occurrence": lambda chunk: cooccurrence_scores(counts, chunk),
    }
    result = {}
    for name, scorer in scorers.items():
        rows: list[dict[str, Any]] = [
            {"user": prompt.user, "target": prompt.target, "recommended": [items[row] for row in best]}
            for prompt, best in zip(prompts, recommend(scorer, histories, tie_break, k), strict=True)
        ]
        settings = {
            "mode": name,
            "interactions": os.fspath(inter_file),
            "prompts": os.fspath(prompts_parquet),
            "train": "the training part of each user",
            "drop_history": True,
            "users": len(prompts),
            "users_in_file": total,
            "seed": seed,
        }
        if name == "co-occurrence":
            settings |= {"window": WINDOW, "recent": RECENT}
        ranks = [rank_of(row["target"], row["recommended"]) for row in rows]
        result[name] = Evaluation(ranking_metrics(ranks), settings, rows)
    return result


def _flatten(sequences: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return all entries one after another, and the number of the sequence that each is from."""
    flat = np.array([row for sequence in sequences for row in sequence], dtype=np.int64)
    return flat, np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
