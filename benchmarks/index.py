"""Balanced k-means: exactness and speed against the obvious assignment, time and distortion at a real catalogue's size.

Run ``python -m benchmarks.index``; with ``--embeddings F.npy`` on vectors of your own, else on synthetic ones of the
size of Amazon Beauty 2014 (12,101 x 384).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from scipy.optimize import linear_sum_assignment

from data_processing.indexing.assignment import assign_balanced
from data_processing.indexing.balanced_kmeans import balanced_kmeans, size_bounds
from data_processing.indexing.residual_index import default_shape


def synthetic_vectors(rows: int = 12_101, dimensions: int = 384, groups: int = 200) -> np.ndarray:
    """Return unit rows in groups of uneven sizes."""
    random = np.random.default_rng(0)
    group = random.choice(groups, rows, p=random.dirichlet(np.full(groups, 0.5)))
    vectors = random.normal(size=(groups, dimensions))[group] + random.normal(size=(rows, dimensions))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def hungarian_assignment(costs: np.ndarray, lower: int, upper: int) -> np.ndarray:
    """Return the cheapest balanced assignment, every cluster standing once for each place it has."""
    clusters = costs.shape[1]
    places = np.concatenate([np.repeat(np.arange(clusters), lower), np.repeat(np.arange(clusters), upper - lower)])
    columns = costs[:, places].astype(np.float64)
    columns[:, : clusters * lower] -= 1e4  # these places must be filled
    return places[linear_sum_assignment(columns)[1]]


def compare_assignments(console: Console, rows: int, clusters: int) -> None:
    costs = np.random.default_rng(0).normal(size=(rows, clusters)).astype(np.float32)
    bounds = size_bounds(rows, clusters)
    seconds, totals = [], []
    for solve in (hungarian_assignment, lambda *problem: assign_balanced(*problem)[0]):
        start = time.perf_counter()
        labels = solve(costs, *bounds)
        seconds.append(time.perf_counter() - start)
        totals.append(float(costs[np.arange(rows), labels].astype(np.float64).sum()))
    if abs(totals[0] - totals[1]) > 1e-6 * abs(totals[0]):
        raise AssertionError(f"costs differ: {totals}")
    console.print(
        f"{rows} rows to {clusters} clusters: Hungarian {seconds[0]:.3f} s, exact flow {seconds[1]:.3f} s, "
        f"ratio {seconds[0] / seconds[1]:.0f}, equal cost {totals[1]:.3f}"
    )


def cluster_levels(console: Console, vectors: np.ndarray, levels: int, codes: int, seed: int) -> None:
    residual = vectors - vectors.mean(axis=0)
    total = float((residual**2).sum(dtype=np.float64))
    begin = time.perf_counter()
    for level in range(levels):
        start = time.perf_counter()
        found = balanced_kmeans(residual, codes, seed=seed + level)
        residual = residual - found.centroids[found.labels]
        sizes = np.bincount(found.labels, minlength=codes)
        console.print(
            f"level {level + 1}: {time.perf_counter() - start:.2f} s, sizes {sizes.min()}..{sizes.max()}, "
            f"distortion {found.inertia / total:.4f} of the variance"
        )
    console.print(f"{len(vectors)} x {vectors.shape[1]}, {levels} x {codes}: {time.perf_counter() - begin:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--embeddings", type=Path, help="an .npy file [items, dimensions]")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    console = Console()
    balanced_kmeans(synthetic_vectors(100, 8, 4), 4)  # compile
    for rows, clusters in ((500, 16), (1_000, 32), (2_000, 32)):
        compare_assignments(console, rows, clusters)
    vectors = np.load(options.embeddings) if options.embeddings else synthetic_vectors()
    cluster_levels(console, vectors, *default_shape(len(vectors)), options.seed)


if __name__ == "__main__":
    main()
