"""What an item index is worth before any model is trained on it: balance, distortion, collisions, prefixes, purity."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import sparse

UBIQUITOUS = 0.9
"""A category that at least this share of the items carries tells them apart too little to count."""
BLOCK = 1024
"""Rows of vectors that are looked at together, in float64: few enough to stay in the cache."""


def diagnose(
    vectors: np.ndarray | None,
    codes: np.ndarray,
    codebooks: np.ndarray | None,
    categories: Sequence[Collection[str]],
    *,
    seed: int = 0,
) -> dict[str, Any]:
    """Describe an item index.

    Args:
        vectors: [items, dimensions], what was quantised; None where it is not known.
        codes: int [items, levels], codes from 0, without collision tokens.
        codebooks: [levels, codes, dimensions]; None where they are not known.
        categories: Names of each item's categories.
        seed: Seed of the random prefixes that purity is compared with.

    Returns:
        Ready for JSON, "depth" being the number of leading codes, from 0 to all:

        * ``items``, ``levels``, ``codes`` (a level; without codebooks, the largest in use);
        * ``balance``: :func:`level_balance` of each level;
        * ``distortion`` and ``mean_squared_error`` after each level: see :func:`distortion`; None when not known;
        * ``collisions``: :func:`collisions`;
        * ``prefixes``, ``items_a_prefix``: number of distinct prefixes, and mean items of one, at each depth;
        * ``purity``: :func:`prefix_purity` at each depth, and ``purity_random``: that of prefixes of the same sizes
          with items dealt at random. None when no item has a category that counts; ``purity_items`` is how many have.

    Raises:
        ValueError: When the shapes do not fit each other.
    """
    items, levels = codes.shape
    size = int(codes.max()) + 1 if codebooks is None else codebooks.shape[1]
    for name, given in (("vectors", vectors), ("categories", categories)):
        if given is not None and len(given) != items:
            raise ValueError(f"codes of {items} items need as many {name}, got {len(given)}")
    if codebooks is not None and len(codebooks) != levels:
        raise ValueError(f"codes of {levels} levels need as many codebooks, got {len(codebooks)}")

    shares = errors = None
    if vectors is not None and codebooks is not None:
        shares, errors = distortion(vectors, codes, codebooks)
    prefixes = prefix_numbers(codes)
    distinct = [int(depth.max()) + 1 for depth in prefixes]
    carried = telling_categories(categories)
    told = int((np.diff(carried.indptr) > 0).sum())
    dealt = carried[np.random.default_rng(seed).permutation(items)]
    return {
        "items": items,
        "levels": levels,
        "codes": size,
        "balance": [level_balance(codes[:, level], size) for level in range(levels)],
        "distortion": shares,
        "mean_squared_error": errors,
        "collisions": collisions(prefixes[-1]),
        "prefixes": distinct,
        "items_a_prefix": [items / number for number in distinct],
        "purity": [prefix_purity(depth, carried) for depth in prefixes] if told else None,
        "purity_random": [prefix_purity(depth, dealt) for depth in prefixes] if told else None,
        "purity_items": told,
    }


def level_balance(codes: np.ndarray, size: int) -> dict[str, Any]:
    """Return how evenly one level uses its ``size`` codes.

    Args:
        codes: int [items], from 0 to ``size - 1``.
        size: Codes of the level.

    Returns:
        ``min``, ``mean`` and ``max`` items a code; ``used``, the number of codes with an item; ``perplexity``, the
        number of codes that would be as hard to guess if all were used evenly; ``entropy``, its logarithm as a share of
        the largest possible, 1 being perfectly even.
    """
    counts = np.bincount(codes, minlength=size)
    shares = counts[counts > 0] / len(codes)
    entropy = float(-(shares * np.log(shares)).sum())
    return {
        "min": int(counts.min()),
        "mean": len(codes) / size,
        "max": int(counts.max()),
        "used": len(shares),
        "entropy": entropy / float(np.log(size)) if size > 1 else 1.0,
        "perplexity": float(np.exp(entropy)),
    }


def distortion(vectors: np.ndarray, codes: np.ndarray, codebooks: np.ndarray) -> tuple[list[float], list[float]]:
    """Return what the codes leave unsaid after each level; lower is better.

    Args:
        vectors: [items, dimensions].
        codes: int [items, levels].
        codebooks: [levels, codes, dimensions].

    Returns:
        The summed squared residual as a share of the variance of the vectors, and its mean over the items.
    """
    middle = vectors.mean(axis=0, dtype=np.float64)
    total, left = 0.0, np.zeros(len(codebooks))
    for start in range(0, len(vectors), BLOCK):
        residual = vectors[start : start + BLOCK].astype(np.float64)
        total += _squared(residual - middle)
        for level, codebook in enumerate(codebooks):
            residual -= codebook[codes[start : start + BLOCK, level]]
            left[level] += _squared(residual)
    return (left / max(total, np.finfo(float).tiny)).tolist(), (left / len(vectors)).tolist()


def _squared(values: np.ndarray) -> float:
    return float(np.einsum("ij,ij->", values, values))


def prefix_numbers(codes: np.ndarray) -> np.ndarray:
    """Number the distinct prefixes of each depth from 0, in the order of their codes.

    Args:
        codes: int [items, levels], from 0.

    Returns:
        int64 [levels + 1, items]: the number of each item's prefix at depth 0 (all the same), 1, and so on.

    >>> prefix_numbers(np.array([[1, 5], [0, 7], [1, 2]])).tolist()
    [[0, 0, 0], [1, 0, 1], [2, 0, 1]]
    """
    items, levels = codes.shape
    numbers = np.zeros((levels + 1, items), np.int64)
    for level in range(levels):
        path = numbers[level] * (int(codes[:, level].max()) + 1) + codes[:, level]
        numbers[level + 1] = np.unique(path, return_inverse=True)[1]
    return numbers


def collisions(paths: np.ndarray) -> dict[str, float]:
    """Return how many items share their whole path with another.

    Args:
        paths: int [items], the number of each item's path: the last row of :func:`prefix_numbers`.

    Returns:
        ``items`` that share, their ``rate``, the ``groups`` they form, and the size of the ``largest`` group (1: none).
    """
    sizes = np.bincount(paths)
    shared = sizes[sizes > 1]
    return {
        "items": int(shared.sum()),
        "rate": float(shared.sum() / len(paths)),
        "groups": len(shared),
        "largest": int(sizes.max()),
    }


def telling_categories(categories: Sequence[Collection[str]]) -> sparse.csr_array:
    """Return which item carries which category, those that nearly all items carry left out.

    Args:
        categories: Names of each item's categories; a name counts once.

    Returns:
        int64 [items, categories] of 0 and 1, sparse.
    """
    names = pa.array(list(chain.from_iterable(categories)), pa.string()).dictionary_encode()
    ends = np.cumsum([0, *map(len, categories)])
    ones = np.ones(len(names), np.int64)
    columns = names.indices.to_numpy()
    carried = sparse.csr_array((ones, columns, ends), shape=(len(categories), len(names.dictionary)))
    carried.sum_duplicates()
    carried.data[:] = 1
    items_of = np.bincount(carried.indices, minlength=carried.shape[1])
    return carried[:, np.flatnonzero(items_of < UBIQUITOUS * len(categories))]


def prefix_purity(prefixes: np.ndarray, carried: sparse.csr_array) -> float:
    """Return the share of items that carry the category that is most common among the items of their prefix.

    Items without any category do not count. One prefix for all gives the floor: the share of the most common category.

    Args:
        prefixes: int [items], the number of each item's prefix: a row of :func:`prefix_numbers`.
        carried: [items, categories], see :func:`telling_categories`.

    Returns:
        A share from 0 to 1; 0 when no item has a category.
    """
    items = len(prefixes)
    if not carried.nnz:
        return 0.0
    members = sparse.csr_array((np.ones(items, np.int64), prefixes, np.arange(items + 1)))
    pure = (members.T @ carried).max(axis=1).sum()
    return float(pure / (np.diff(carried.indptr) > 0).sum())
