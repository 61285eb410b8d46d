"""What an item index is worth before any model is trained on it: balance, distortion, collisions, purity."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

UBIQUITOUS = 0.9
"""A category that at least this share of the items carries tells them apart too little to count."""


def diagnose(
    vectors: np.ndarray, codes: np.ndarray, codebooks: np.ndarray, categories: Sequence[Iterable[str]]
) -> dict[str, Any]:
    """Describe an item index.

    Args:
        vectors: [items, dimensions], what was quantised.
        codes: int [items, levels], codes from 0.
        codebooks: [levels, codes, dimensions].
        categories: Names of each item's categories.

    Returns:
        ``items``, ``levels``, ``codes``; ``balance``: ``level_balance`` of each level; ``distortion`` after each level;
        ``collisions``; ``purity`` at each depth. Ready for JSON.

    Raises:
        ValueError: When the shapes do not fit each other.
    """
    levels, size, _ = codebooks.shape
    if codes.shape != (len(vectors), levels) or len(categories) != len(vectors):
        raise ValueError(
            f"{len(vectors)} vectors and {levels} levels need codes of shape {(len(vectors), levels)} and as many "
            f"categories, got codes of shape {codes.shape} and {len(categories)} categories"
        )
    return {
        "items": len(vectors),
        "levels": levels,
        "codes": size,
        "balance": [level_balance(codes[:, level], size) for level in range(levels)],
        "distortion": distortion(vectors, codes, codebooks),
        "collisions": collisions(codes),
        "purity": [prefix_purity(codes[:, :depth], categories) for depth in range(levels + 1)],
    }


def level_balance(codes: np.ndarray, size: int) -> dict[str, Any]:
    """Return how evenly one level uses its ``size`` codes.

    Returns:
        ``counts`` of items a code, their ``min`` and ``max``, and ``entropy`` of the use, 1 being perfectly even.
    """
    counts = np.bincount(codes, minlength=size)
    shares = counts[counts > 0] / max(counts.sum(), 1)
    entropy = float(-(shares * np.log(shares)).sum() / np.log(size)) if size > 1 else 1.0
    return {"min": int(counts.min()), "max": int(counts.max()), "entropy": entropy, "counts": counts.tolist()}


def distortion(vectors: np.ndarray, codes: np.ndarray, codebooks: np.ndarray) -> list[float]:
    """Return the squared residual after each level as a share of the variance of the vectors; lower is better."""
    residual = np.asarray(vectors, dtype=np.float64)
    total = max(((residual - residual.mean(axis=0)) ** 2).sum(), np.finfo(float).tiny)
    shares = []
    for level, codebook in enumerate(codebooks):
        residual = residual - codebook[codes[:, level]]
        shares.append(float((residual**2).sum() / total))
    return shares


def collisions(codes: np.ndarray) -> dict[str, float]:
    """Return how many ``items`` share their whole path with another, their ``rate``, and the ``largest`` such group."""
    _, sizes = np.unique(codes, axis=0, return_counts=True)
    shared = int(sizes[sizes > 1].sum())
    return {"items": shared, "rate": shared / len(codes), "largest": int(sizes.max())}


def prefix_purity(prefixes: np.ndarray, categories: Sequence[Iterable[str]]) -> float:
    """Return the share of items that carry the category that is most common among the items of their prefix.

    Categories that nearly all items carry are left out, and so are items without any other. A prefix of no codes gives
    the floor: the share of the most common category.

    Args:
        prefixes: int [items, depth].
        categories: Names of each item's categories.

    Returns:
        A share from 0 to 1; 0 when no item has a category that counts.
    """
    carried = Counter(category for names in categories for category in set(names))
    ubiquitous = {category for category, items in carried.items() if items >= UBIQUITOUS * len(categories)}
    groups: dict[tuple[int, ...], list[set[str]]] = {}
    for prefix, names in zip(prefixes.tolist(), categories, strict=True):
        if telling := set(names) - ubiquitous:
            groups.setdefault(tuple(prefix), []).append(telling)
    pure = sum(max(Counter(name for names in group for name in names).values()) for group in groups.values())
    return pure / max(sum(map(len, groups.values())), 1)
