"""Balanced k-means: every cluster holds between ``rows // clusters - 1`` and ``rows // clusters + 1`` rows, exactly.

Lloyd's algorithm with another assignment, the cheapest that keeps the bounds. Each round:

1. Costs. Squared distances of all rows to all centroids.
2. Prices. Every cluster has a price that its rows pay on top. Crowded clusters get dearer and empty ones cheaper
   (subgradient ascent on the dual of the assignment problem) until the sizes are nearly right.
3. Exact flow (``assignment.py``). It repairs the rest at the least possible cost.
4. Centroids move to the means of their rows.

The first rounds take one step on the prices and no flow: sizes that are only nearly right leave the centroids free to
travel, which ends in lower distortion.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import faiss
import numpy as np
from scipy import sparse
from threadpoolctl import ThreadpoolController

from data_processing.indexing.assignment import assign_balanced

SEEDING_ROUNDS = 2
LOOSE_ROUNDS = 15
MAX_ROUNDS, TOLERANCE = 100, 1e-4
"""Most rounds; the last is one that lowers the inertia by less than this share of it."""
STALE = 0.05
"""Prices that misplace a larger share of the rows than this are compared with prices found from nothing."""
FRESH_STEPS, LOOSE_STEP = np.geomspace(2.0, 0.1, 20), 0.3
BLOCK_ROWS = 1024
"""Rows that one thread takes at a time: fixed, so that the number of threads changes no byte."""
_LIBRARIES = ThreadpoolController()


class Clustering(NamedTuple):
    """Result of ``balanced_kmeans``."""

    labels: np.ndarray  # int32 [rows], the cluster of each row
    centroids: np.ndarray  # float32 [clusters, dimensions], the mean of each cluster's rows
    inertia: float  # sum of squared distances of the rows to their centroids


def size_bounds(rows: int, clusters: int) -> tuple[int, int]:
    """Return the smallest and the largest size of a cluster, at least 1."""
    return max(1, rows // clusters - 1), rows // clusters + 1


def balanced_kmeans(vectors: np.ndarray, clusters: int, *, seed: int = 0) -> Clustering:
    """Cluster ``vectors`` with sizes within ``size_bounds``; the same input and seed give the same output.

    Args:
        vectors: Finite array [rows, dimensions].
        clusters: Number of clusters, at most the number of rows.
        seed: Seed of the first centroids.
    """
    vectors = np.asarray(vectors, dtype=np.float32)
    if not 1 <= clusters <= len(vectors) or not np.isfinite(vectors).all():
        raise ValueError(f"expected at least {clusters} finite vectors [rows, dimensions], got {vectors.shape}")
    lower, upper = size_bounds(len(vectors), clusters)
    # Expanded squared distances lose digits far from the origin. Residuals lie around it already.
    middle = vectors.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred = np.ascontiguousarray(vectors - middle if middle.any() else vectors)
    total = float(np.einsum("ij,ij->", centred, centred, dtype=np.float64))
    centroids = _first_centroids(centred, clusters, seed)
    costs = np.empty((len(vectors), clusters), np.float32)
    prices, unit, inertia = np.zeros(clusters, np.float32), 1.0, np.inf
    for turn in range(MAX_ROUNDS):
        assignment_costs(centred, centroids, costs)
        if turn < 2:  # the first centroids are means of few rows, and their distances not yet typical
            unit = _price_unit(costs)
        prices = _fresh_if_stale(costs, prices, unit)
        if turn < LOOSE_ROUNDS:
            labels, sizes = _cheapest(costs, prices)
            prices = raise_crowded(prices, sizes, LOOSE_STEP * unit)
            centroids = cluster_means(centred, labels, centroids)
            continue
        labels, prices = assign_balanced(costs, lower, upper, prices)
        centroids = cluster_means(centred, labels, centroids)
        # The sum of squares splits into that within clusters, the inertia, and that of the means.
        squared_lengths = (centroids.astype(np.float64) ** 2).sum(axis=1)
        previous, inertia = inertia, max(0.0, total - float(squared_lengths[labels].sum()))
        if previous - inertia <= TOLERANCE * inertia:
            break
    return Clustering(labels, (centroids + middle).astype(np.float32), inertia)


def assignment_costs(vectors: np.ndarray, centroids: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Return squared distances less the squared length of each vector, which changes no assignment.

    Args:
        vectors: float32 [rows, dimensions].
        centroids: float32 [clusters, dimensions].
        out: float32 [rows, clusters] to write to and return.
    """
    costs = np.empty((len(vectors), len(centroids)), np.float32) if out is None else out
    factors, squared_lengths = np.ascontiguousarray(-2.0 * centroids.T), (centroids**2).sum(axis=1)

    def fill(block: slice) -> None:
        np.matmul(vectors[block], factors, out=costs[block])
        costs[block] += squared_lengths

    _by_block(fill, len(vectors))
    return costs


def _cheapest(costs: np.ndarray, prices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the cluster of least cost plus price of each row, int64 [rows], and the sizes of the clusters."""
    labels = np.empty(len(costs), np.int64)

    def fill(block: slice) -> None:
        np.argmin(costs[block] + prices, axis=1, out=labels[block])

    _by_block(fill, len(costs))
    return labels, np.bincount(labels, minlength=len(prices))


def _by_block(work: Callable[[slice], None], rows: int) -> None:
    """Do ``work`` on every block of rows, on all processors that this process may use."""
    blocks = [slice(start, start + BLOCK_ROWS) for start in range(0, rows, BLOCK_ROWS)]
    with _LIBRARIES.limit(limits=1, user_api="blas"):
        if len(blocks) < 5:  # done sooner than threads are started
            list(map(work, blocks))
            return
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as threads:
            list(threads.map(work, blocks))


def _first_centroids(vectors: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Return the centroids of few rounds of plain k-means, on one thread so that sums have one order."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        kmeans = faiss.Kmeans(
            vectors.shape[1], clusters, niter=SEEDING_ROUNDS, seed=seed % 2**31, min_points_per_centroid=1
        )
        kmeans.train(vectors)
    finally:
        faiss.omp_set_num_threads(threads)
    return np.array(kmeans.centroids, dtype=np.float32)


def raise_crowded(prices: np.ndarray, sizes: np.ndarray, step: float) -> np.ndarray:
    """Move each of the prices [clusters] by at most ``step``: up where ``sizes`` [clusters] is too large, else down."""
    crowding = sizes * (len(sizes) / sizes.sum()) - 1.0
    return (prices + step * np.clip(crowding, -1.0, 1.0)).astype(np.float32)


def _price_unit(costs: np.ndarray) -> float:
    """Return the mean gap between a row's best and second best cluster: the price difference that moves rows."""
    if costs.shape[1] == 1:
        return 1.0
    best = np.partition(costs, 1, axis=1)[:, :2]
    return float((best[:, 1] - best[:, 0]).mean())


def _fresh_if_stale(costs: np.ndarray, prices: np.ndarray, unit: float) -> np.ndarray:
    """Return ``prices``, or new ones where those no longer fit the centroids and the new ones do better."""

    def misplace(prices: np.ndarray) -> float:
        """Return the share of the rows that would have to move for all sizes to be equal."""
        sizes = _cheapest(costs, prices)[1]
        return float(np.abs(sizes / sizes.sum() - 1.0 / len(sizes)).sum() / 2.0)

    misplaced = misplace(prices)
    if misplaced <= STALE:
        return prices
    fresh = np.zeros_like(prices)
    for step in FRESH_STEPS:
        fresh = raise_crowded(fresh, _cheapest(costs, fresh)[1], step * unit)
    return fresh if misplace(fresh) < misplaced else prices


def cluster_means(vectors: np.ndarray, labels: np.ndarray, fallback: np.ndarray) -> np.ndarray:
    """Return the mean of each cluster's rows, float32 [clusters, dimensions]; empty ones keep their ``fallback``."""
    rows, clusters = len(vectors), len(fallback)
    membership = sparse.csr_matrix((np.ones(rows, np.float32), (labels, np.arange(rows))), shape=(clusters, rows))
    sizes = np.bincount(labels, minlength=clusters)[:, None]
    return np.where(sizes > 0, (membership @ vectors) / np.maximum(sizes, 1), fallback).astype(np.float32)
