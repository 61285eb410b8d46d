"""Recommenders without a model: co-occurrence, and lists by given scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray


def cooccurrence(train: Sequence[Sequence[int]], items: int, *, window: int = 10) -> sp.csr_array:
    """Count the items near each other, float64 [items, items]: d positions apart, at most ``window``, add 1/d."""
    flat, user = flatten(train)
    one_way = sp.csr_array((items, items), dtype=np.float64)
    for distance in range(1, min(window, len(flat) - 1) + 1):
        same = user[distance:] == user[:-distance]
        pairs = flat[:-distance][same], flat[distance:][same]
        one_way += sp.coo_array((np.full(int(same.sum()), 1.0 / distance), pairs), shape=(items, items)).tocsr()
    return sp.csr_array(one_way + one_way.T)


def cooccurrence_scores(counts: sp.csr_array, histories: Sequence[Sequence[int]], *, recent: int = 20) -> sp.csr_array:
    """Score items by their counts [items, candidates] with the last items of each history, float64 [users, candidates].

    The item k positions back weighs 1/k, up to ``recent``.
    """
    flat, user = flatten([history[-recent:] for history in histories])
    lengths = np.bincount(user, minlength=len(histories))
    position = np.arange(len(flat)) - (np.cumsum(lengths) - lengths)[user]
    recency = 1.0 / (lengths[user] - position)
    return sp.coo_array((recency, (user, flat)), shape=(len(histories), counts.shape[0])).tocsr() @ counts


def recommend(
    scores: sp.csr_array, dropped: Sequence[Sequence[int]], order: NDArray[np.int64], k: int
) -> list[list[int]]:
    """Return the k best items of each user by ``scores`` [users, candidates], fewer where fewer are left.

    ``dropped`` items are not recommended to their user. Of equal scores the first in ``order`` [candidates] wins.
    """
    lists: list[list[int]] = []
    place = np.argsort(order)
    for user, gone in enumerate(dropped):
        stored = slice(*scores.indptr[user : user + 2])
        values = np.zeros(len(order))
        values[scores.indices[stored]] = scores.data[stored]
        values[[item for item in gone if item < len(order)]] = -1.0
        some = np.union1d(scores.indices[stored], order[: k + len(gone)])  # no other item can be in the list
        best = some[np.lexsort((place[some], -values[some]))[:k]]
        lists.append(best[values[best] >= 0].tolist())
    return lists


def flatten(sequences: Sequence[Sequence[int]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return all entries in one array, and the number of the sequence of each, both int64 [entries]."""
    flat = np.array([item for sequence in sequences for item in sequence], dtype=np.int64)
    return flat, np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
