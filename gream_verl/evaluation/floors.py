"""Recommenders that need no model: a result below them means that nothing was learnt.

Both see what training sees and recommend to the same users as the models, by the same protocol.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from rich.progress import track

from gream_verl.core.errors import InputError
from gream_verl.core.split import read_interactions, training_parts
from gream_verl.evaluation.metrics import rank_of, ranking_metrics
from gream_verl.evaluation.prompts import Prompt
from gream_verl.evaluation.results import Evaluation

WINDOW = 10
RECENT = 20
USERS_AT_ONCE = 256

Scorer = Callable[[Sequence[Sequence[int]]], sp.csr_array]


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
) -> sp.csr_array:
    """Score items by their counts with each history; the item k places back weighs 1/k.

    Args:
        counts: [items, candidates]; from ``cooccurrence``, all columns or some.
        histories: Rows of items, in time order, for each of u users.
        recent: How many of the last items count.

    Returns:
        float64 [u, candidates], sparse: what is not stored scores 0.
    """
    flat, user = _flatten([history[-recent:] for history in histories])
    lengths = np.bincount(user, minlength=len(histories))
    place = np.arange(len(flat)) - (np.cumsum(lengths) - lengths)[user]
    recency = 1.0 / (lengths[user] - place)
    weights = sp.coo_array((recency, (user, flat)), shape=(len(histories), counts.shape[0])).tocsr()
    return weights @ counts


def recommend(
    scorer: Scorer, histories: Sequence[Sequence[int]], order: NDArray[np.int64], k: int, *, drop_history: bool = True
) -> list[list[int]]:
    """Return the k best items of each user.

    Args:
        scorer: Gives [users, candidates] scores above 0 for some histories; what is not stored scores 0.
        histories: Rows of items for each user; candidates are the first rows, others are never recommended.
        order: All candidates; of two with equal scores the one that is first here wins.
        k: Length of the lists; shorter where fewer items are left.
        drop_history: Leave out the items of the user's history.
    """
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    taken = np.zeros(len(order), dtype=bool)  # of the user at hand
    lists: list[list[int]] = []
    for start in track(range(0, len(histories), USERS_AT_ONCE), description="Baseline", transient=True):
        chunk = histories[start : start + USERS_AT_ONCE]
        scores = scorer(chunk)
        for user, history in enumerate(chunk):
            stored = slice(*scores.indptr[user : user + 2])
            scored, values = scores.indices[stored], scores.data[stored]
            dropped = np.array([item for item in history if drop_history and item < len(order)], dtype=np.int64)
            taken[dropped] = True
            free = ~taken[scored]
            scored, values = scored[free], values[free]
            best = scored[np.lexsort((place[scored], -values))[:k]]
            if len(best) < k:  # then all with a score are in it, and those without follow
                taken[scored] = True
                rest = order[: k + len(dropped)]
                best = np.append(best, rest[~taken[rest]][: k - len(best)])
                taken[scored] = False
            taken[dropped] = False
            lists.append(best.tolist())
    return lists


def evaluate_floors(
    inter_file: str | os.PathLike[str],
    prompts: Sequence[Prompt],
    *,
    items: Collection[str] | None = None,
    protocol: Mapping[str, Any] | None = None,
    k: int = 30,
    seed: int = 0,
) -> dict[str, Evaluation]:
    """Evaluate ``popularity`` and ``co-occurrence`` on the users of some prompts.

    Args:
        inter_file: ``<D>.inter.json``.
        prompts: From ``read_prompts``; of either type, only the items matter.
        items: What may be recommended, those of the index, known to the interactions or not; None: all of the
            interactions. Others count in training and in histories all the same.
        protocol: What the prompts say of themselves. Its ``drop_history`` (true where it is not told) is followed: an
            item of the user's history is never recommended.
        k: Length of the recommended lists.
        seed: Seed of the order among items of equal score and popularity.

    Raises:
        InputError: When a file cannot be used or a prompt has an item that neither the interactions nor ``items`` have.
    """
    protocol = dict(protocol or {})
    drop_history = protocol.get("drop_history", True)
    sequences = read_interactions(inter_file)
    known = {item for sequence in sequences.values() for item in sequence}
    candidates = sorted(known if items is None else set(items))
    row_of = {item: row for row, item in enumerate([*candidates, *sorted(known.difference(candidates))])}
    train = [[row_of[item] for item in part] for part in training_parts(inter_file, sequences).values()]
    try:
        histories = [[row_of[item] for item in prompt.history] for prompt in prompts]
    except KeyError as error:
        source = protocol.get("prompts", "the prompts")
        raise InputError(f"{source}: item {error} is not in {inter_file}; make both from the same data") from None

    many = len(candidates)
    order = np.lexsort((-np.random.default_rng(seed).permutation(many), -popularity(train, len(row_of))[:many]))
    counts, nothing = cooccurrence(train, len(row_of))[:, :many], sp.csr_array((USERS_AT_ONCE, many))
    scorers: dict[str, Scorer] = {
        "popularity": lambda chunk: nothing,
        "co-occurrence": lambda chunk: cooccurrence_scores(counts, chunk),
    }
    result = {}
    for name, scorer in scorers.items():
        lists = recommend(scorer, histories, order, k, drop_history=drop_history)
        more = {"window": WINDOW, "recent": RECENT} if name == "co-occurrence" else {}
        result[name] = baseline_evaluation(
            name, inter_file, prompts, [{"recommended": [candidates[row] for row in best]} for best in lists],
            protocol=protocol, k=k, seed=seed, more=more,
        )  # fmt: skip
    return result


def baseline_evaluation(
    name: str,
    inter_file: str | os.PathLike[str],
    prompts: Sequence[Prompt],
    found: Sequence[Mapping[str, Any]],
    *,
    protocol: Mapping[str, Any],
    k: int,
    seed: int,
    more: Mapping[str, Any],
) -> Evaluation:
    """Return the evaluation of a recommender that was trained on the interactions and reads no prompt.

    Args:
        name: Its name, the mode of the settings.
        inter_file: ``<D>.inter.json``.
        prompts: The users.
        found: What it found for each user: ``recommended``, and more where it is known.
        protocol: What the prompts say of themselves.
        k: Length of the lists.
        seed: Seed of whatever was random.
        more: Further settings.
    """
    rows = [
        {"user": prompt.user, "target": prompt.target, "history_length": len(prompt.history), **row}
        for prompt, row in zip(prompts, found, strict=True)
    ]
    settings = {
        "mode": name,
        "interactions": os.fspath(inter_file),
        "train": "the training part of each user",
        "drop_history": protocol.get("drop_history", True),
        "k": k,
        "users": len(prompts),
        "users_in_file": protocol.get("users_in_file", len(prompts)),
        "seed": seed,
        "protocol": dict(protocol),
        **more,
    }
    return Evaluation(ranking_metrics([rank_of(row["target"], row["recommended"]) for row in rows]), settings, rows)


def _flatten(sequences: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return all entries one after another, and the number of the sequence that each is from."""
    flat = np.array([row for sequence in sequences for row in sequence], dtype=np.int64)
    return flat, np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
