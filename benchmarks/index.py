"""Residual balanced k-means against k-means-constrained on real embeddings, and its time and memory as items grow.

``python -m benchmarks.index`` compares on MovieLens titles; ``--embeddings F.npy`` (repeat it) on vectors of your own.
pip installs k-means-constrained into an environment of its own, because its pins would hold back this one's.
Both sides run one after the other in child processes of this one; the time is that of clustering alone.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment

from data_processing.indexing.assignment import assign_balanced
from data_processing.indexing.balanced_kmeans import balanced_kmeans, size_bounds
from data_processing.indexing.diagnostics import collisions
from data_processing.indexing.residual_index import default_shape, residual_codes
from gream_verl.core.data_folder import Item

PEER = "k-means-constrained==0.9.1"
PEER_FOLDER = Path("runs") / "benchmarks" / "k-means-constrained"
PEER_PROGRAM = """
import json, sys, time
import numpy as np
from k_means_constrained import KMeansConstrained
vectors, levels, codes, seed = np.load(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
lower, upper = max(1, len(vectors) // codes - 1), len(vectors) // codes + 1
residual, paths = vectors - vectors.mean(axis=0), []
begin = time.perf_counter()
for level in range(levels):
    found = KMeansConstrained(codes, size_min=lower, size_max=upper, n_init=1, random_state=seed + level).fit(residual)
    residual = residual - found.cluster_centers_[found.labels_]
    paths.append(found.labels_)
np.save(sys.argv[5], np.stack(paths, axis=1))
print(json.dumps({"seconds": time.perf_counter() - begin}))
"""
DIMENSIONS = 384


def synthetic_vectors(rows: int, dimensions: int = DIMENSIONS) -> np.ndarray:
    """Return unit rows, float32, made in place.

    They lie in groups of uneven sizes, 50 on average, within which the variance of a dimension falls as 1 / its number.
    """
    random, groups = np.random.default_rng(0), max(rows // 50, 4)
    group = random.choice(groups, rows, p=random.dirichlet(np.full(groups, 0.5)))
    middles = random.standard_normal((groups, dimensions), np.float32)
    spread = np.arange(1, dimensions + 1, dtype=np.float32) ** -0.5
    spread *= np.sqrt(dimensions / (spread**2).sum())
    vectors = np.empty((rows, dimensions), np.float32)
    for start in range(0, rows, 65_536):
        block = vectors[start : start + 65_536]
        random.standard_normal(out=block, dtype=np.float32)
        block *= spread
        block += middles[group[start : start + len(block)]]
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return vectors


def hungarian_assignment(costs: np.ndarray, lower: int, upper: int) -> np.ndarray:
    """Return the cheapest balanced assignment by the Hungarian method, with one column per place of a cluster."""
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


def movielens_vectors(folder: Path) -> np.ndarray:
    """Return the embeddings of MovieLens titles and genres, as the quickstart embeds them."""
    from data_processing.indexing.embed import embed_items
    from data_processing.sources.movielens import read_movielens

    rows = read_movielens(folder).items.select("title", "categories").iter_rows()
    return embed_items([Item(title, categories=tuple(names)) for title, names in rows])


def child(vectors: np.ndarray, levels: int, codes: int, seed: int, unique: bool, codes_file: str) -> None:
    """Cluster, and print time and memory as JSON."""
    balanced_kmeans(synthetic_vectors(100, 8), 4)  # compile
    before = resource.getrusage(resource.RUSAGE_SELF)
    begin = time.perf_counter()
    found, _ = residual_codes(vectors, levels, codes, seed, unique=unique)
    seconds = time.perf_counter() - begin
    after = resource.getrusage(resource.RUSAGE_SELF)
    np.save(codes_file, found)
    took = {"seconds": seconds, "processor": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}
    print(json.dumps({**took, "memory": after.ru_maxrss * 1024}))


def in_child(command: list[str], processors: int, timeout: float) -> dict[str, Any]:
    """Run ``command`` on so many processors and return the JSON it prints last."""
    chosen = sorted(os.sched_getaffinity(0))[:processors]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, timeout=timeout,
        preexec_fn=lambda: os.sched_setaffinity(0, chosen), env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def peer_python() -> str:
    """Return the interpreter of an environment that has k-means-constrained, made when it is not there."""
    python = PEER_FOLDER / "bin" / "python"
    if not python.is_file():
        venv.create(PEER_FOLDER, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", PEER], check=True, timeout=900)
    return str(python.absolute())


def judge(vectors: np.ndarray, codes: np.ndarray, size: int) -> dict[str, Any]:
    """Return the distortion, the least and the greatest size of a cluster, and the items in collisions."""
    residual = vectors - vectors.mean(axis=0)
    total = float(np.einsum("ij,ij->", residual, residual, dtype=np.float64))
    sizes = []
    for column in codes.T:
        counts = np.bincount(column, minlength=size)
        for cluster in range(size):
            residual[column == cluster] -= residual[column == cluster].mean(axis=0)
        sizes += [int(counts.min()), int(counts.max())]
    left = float(np.einsum("ij,ij->", residual, residual, dtype=np.float64))
    return {"distortion": left / total, "sizes": (min(sizes), max(sizes)), "collisions": collisions(codes)["items"]}


def compare_with_peer(console: Console, name: str, vectors: np.ndarray, seed: int, timeout: float) -> None:
    levels, codes = default_shape(len(vectors))
    bounds = size_bounds(len(vectors), codes)
    table = Table(title=f"{name}: {len(vectors):,} x {vectors.shape[1]}, {levels} x {codes}", box=SIMPLE_HEAD)
    for column in ("", "seconds", "distortion", "sizes", "collide", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    with tempfile.TemporaryDirectory() as temporary:
        file, found = f"{temporary}/vectors.npy", f"{temporary}/codes.npy"
        np.save(file, vectors)
        shape = [str(levels), str(codes), str(seed)]
        ours = [sys.executable, "-m", "benchmarks.index", "--child", file, *shape, found]
        sides = {
            "k-means-constrained": ([peer_python(), "-c", PEER_PROGRAM, file, *shape, found], 1),
            "ours": (ours, 1),
            "ours, 2 threads": (ours, 2),
            "ours, unique": ([*ours, "--unique"], 1),
        }
        least = None
        for side, (command, processors) in sides.items():
            took = in_child(command, processors, timeout)
            result = judge(vectors, np.load(found), codes)
            if not bounds[0] <= result["sizes"][0] <= result["sizes"][1] <= bounds[1]:
                raise AssertionError(f"{side}: sizes {result['sizes']} are not within {bounds}")
            least = least or took["seconds"]
            table.add_row(
                side, f"{took['seconds']:.2f}", f"{result['distortion']:.4f}", "{}..{}".format(*result["sizes"]),
                f"{result['collisions']:,}", f"{least / took['seconds']:.0f}",
            )  # fmt: skip
    console.print(table)


def curve(console: Console, counts: list[int], levels: int, codes: int, timeout: float) -> None:
    table = Table(title=f"Synthetic items x {DIMENSIONS}, {levels} x {codes}", box=SIMPLE_HEAD)
    for column in ("items", "minutes", "processor minutes", "peak GB", "sizes", "bounds", "collide"):
        table.add_column(column, justify="right")
    with tempfile.TemporaryDirectory() as temporary:
        for rows in counts:
            found = f"{temporary}/codes.npy"
            command = [sys.executable, "-m", "benchmarks.index", "--child", str(rows), str(levels), str(codes), "0"]
            took = in_child([*command, found, "--unique"], len(os.sched_getaffinity(0)), timeout)
            result = np.load(found)
            sizes = np.concatenate([np.bincount(column, minlength=codes) for column in result.T])
            numbers = took["seconds"] / 60, took["processor"] / 60, took["memory"] / 1e9
            table.add_row(
                f"{rows:,}", *(f"{number:.2f}" for number in numbers),
                f"{sizes.min()}..{sizes.max()}", "{}..{}".format(*size_bounds(rows, codes)),
                f"{collisions(result)['items']:,}",
            )  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--embeddings", type=Path, action="append", help="an .npy file [items, dimensions]; repeat it")
    parser.add_argument("--items", type=int, nargs="*", default=[10_000, 100_000], help="points of the curve")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--timeout", type=float, default=3_600.0, help="seconds a side may take")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    parser.add_argument("--unique", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        source, levels, codes, seed, found = options.child
        vectors = synthetic_vectors(int(source)) if source.isdigit() else np.load(source)
        child(vectors, int(levels), int(codes), int(seed), options.unique, found)
        return
    console = Console()
    balanced_kmeans(synthetic_vectors(100, 8), 4)  # compile
    for rows, clusters in ((500, 16), (1_000, 32), (2_000, 32)):
        compare_assignments(console, rows, clusters)
    files = {file.stem: np.load(file).astype(np.float32) for file in options.embeddings or []}
    for name, vectors in (files or {"MovieLens": movielens_vectors(Path("runs") / "raw")}).items():
        compare_with_peer(console, name, vectors, options.seed, options.timeout)
    if options.items:
        curve(console, options.items, 4, 256, options.timeout)


if __name__ == "__main__":
    main()
