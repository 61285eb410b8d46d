"""Do items that lie close to each other have codes in common? Neighbours in embedding space against shared prefixes."""

from __future__ import annotations

from typing import Any, NamedTuple

import faiss
import numpy as np

from data_processing.indexing.diagnostics import prefix_numbers

SAMPLE = 2000
NEIGHBOURS = 10


class Neighbours(NamedTuple):
    """The nearest other items of some items.

    Attributes:
        items: int64 [sample], rows of the items, ascending.
        nearest: int64 [sample, neighbours], rows of their neighbours, the nearest first.
    """

    items: np.ndarray
    nearest: np.ndarray


def find_neighbours(vectors: np.ndarray, *, sample: int = SAMPLE, count: int = NEIGHBOURS, seed: int = 0) -> Neighbours:
    """Draw items and find their nearest others by exact search.

    Args:
        vectors: float32 [items, dimensions]; distances are Euclidean, as in residual k-means.
        sample: Items to draw; all when there are fewer.
        count: Neighbours of each; all others when there are fewer.
        seed: Seed of the draw.
    """
    rows = len(vectors)
    items = np.sort(np.random.default_rng(seed).choice(rows, min(sample, rows), replace=False))
    count = min(count, rows - 1)
    _, found = faiss.knn(vectors[items], vectors, count + 1)
    # An item is its own nearest neighbour, but comes later among equals, or not at all.
    itself_last = np.argsort(found == items[:, None], axis=1, kind="stable")
    return Neighbours(items, np.take_along_axis(found, itself_last, axis=1)[:, :count])


def neighbour_prefixes(codes: np.ndarray, neighbours: Neighbours) -> dict[str, Any]:
    """Return how much of their prefix neighbours share.

    Args:
        codes: int [items, levels], at least two items.
        neighbours: Of the same items.

    Returns:
        * ``sample`` and ``neighbours``, their numbers;
        * ``depth_by_rank``: mean shared depth of an item and its nearest, second nearest neighbour and so on;
        * ``sharing``: how many of the neighbours share the first code, the first two codes, and so on;
        * ``depth_random`` and ``sharing_random``: the same of pairs drawn from all items, exactly.
    """
    paths = codes[neighbours.nearest]
    depths = np.cumprod(paths == codes[neighbours.items][:, None, :], axis=2).sum(axis=2)
    pairs = len(codes) * (len(codes) - 1)
    sizes = [np.bincount(depth) for depth in prefix_numbers(codes)[1:]]
    random = [float((size * (size - 1)).sum() / pairs) for size in sizes]
    sample, count = depths.shape
    return {
        "sample": sample,
        "neighbours": count,
        "depth_by_rank": depths.mean(axis=0).tolist(),
        "depth_random": sum(random),
        "sharing": [float((depths >= depth).sum() / sample) for depth in range(1, codes.shape[1] + 1)],
        "sharing_random": [count * share for share in random],
    }


def distance_by_depth(vectors: np.ndarray, codes: np.ndarray, items: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """Return how far apart items are that share a prefix of just that depth and no more.

    Each item is paired, at each depth, with one that is drawn from those that share so much with it.

    Args:
        vectors: [all items, dimensions].
        codes: int [all items, levels].
        items: int [sample], rows of the items to pair.
        seed: Seed of the draw.

    Returns:
        ``pairs``, their number at depth 0 to all; ``distance``, their mean Euclidean distance, None without a pair.
    """
    generator = np.random.default_rng(seed)
    prefixes = prefix_numbers(codes)
    by_path = np.argsort(prefixes[-1], kind="stable")  # every prefix is a run of rows here
    starts = [np.searchsorted(depth[by_path], depth[items]) for depth in prefixes]
    sizes = [np.bincount(depth)[depth[items]] for depth in prefixes]
    # Below the whole path there is the item itself, which is not to be paired with itself.
    place = np.empty(len(codes), np.int64)
    place[by_path] = np.arange(len(codes))
    starts.append(place[items])
    sizes.append(np.ones(len(items), np.int64))
    pairs: list[int] = []
    distances: list[float | None] = []
    for depth in range(len(prefixes)):
        others = sizes[depth] - sizes[depth + 1]
        some = others > 0
        drawn = starts[depth][some] + generator.integers(others[some])
        drawn += np.where(drawn >= starts[depth + 1][some], sizes[depth + 1][some], 0)
        apart = vectors[items[some]].astype(np.float64) - vectors[by_path[drawn]]
        pairs.append(len(apart))
        distances.append(float(np.sqrt((apart**2).sum(axis=1)).mean()) if len(apart) else None)
    return {"pairs": pairs, "distance": distances}
