"""The item index: embeddings to semantic IDs by residual balanced k-means (arXiv 2510.20815, section 3.1).

At each level the residuals are clustered into codes of equal use, and what the centroids explain is taken away before
the next level. Items that share a whole path get a collision token each.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from data_processing.indexing.balanced_kmeans import balanced_kmeans
from data_processing.indexing.collaborative import collaborative_vectors
from data_processing.indexing.diagnostics import diagnose
from data_processing.indexing.embed import cached_embeddings, item_text
from data_processing.layout import DataFolder
from gream_verl.files import InputError, atomic_path, write_json
from gream_verl.semantic_ids import MAX_LEVELS, ItemIndex

PAPER_SHAPE = (4, 256)
PAPER_ITEMS = 10_000


def default_shape(items: int) -> tuple[int, int]:
    """Return ``(levels, codes)`` for a catalogue of ``items``.

    From 10,000 items on, the paper's 4 levels of 256 codes. Below, 3 levels of about sqrt(items) codes (the nearest
    power of two), so that two codes are about enough to tell items apart and each token is seen often in training.

    >>> [default_shape(items) for items in (20, 1_300, 9_000, 12_000)]
    [(3, 4), (3, 32), (3, 128), (4, 256)]
    """
    if items >= PAPER_ITEMS:
        return PAPER_SHAPE
    return 3, min(items, 2 ** max(1, round(np.log2(items) / 2)))


def residual_codes(vectors: np.ndarray, levels: int, codes: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Quantise ``vectors`` level by level; each code of a level is used equally often, give or take one item.

    Args:
        vectors: Finite array [items, dimensions].
        levels: Number of levels.
        codes: Codes a level, at most the number of items.
        seed: Seed of all levels.

    Returns:
        int32 [items, levels], codes from 0, and the codebooks, float32 [levels, codes, dimensions].

    Raises:
        ValueError: When ``vectors`` is not a finite matrix, or has fewer rows than codes.
    """
    residual = np.array(vectors, dtype=np.float32)
    paths, codebooks = [], []
    for level in track(range(levels), description="Clustering residuals"):
        clustering = balanced_kmeans(residual, codes, seed=seed + level)
        residual = residual - clustering.centroids[clustering.labels]
        paths.append(clustering.labels)
        codebooks.append(clustering.centroids)
    return np.stack(paths, axis=1), np.stack(codebooks)


def resolve_collisions(codes: np.ndarray) -> list[tuple[int, ...]]:
    """Return each item's path; items that share one all get one code more, in the order of the items.

    >>> resolve_collisions(np.array([[1, 2], [0, 0], [1, 2]]))
    [(1, 2, 0), (0, 0), (1, 2, 1)]
    """
    owners: dict[tuple[int, ...], list[int]] = defaultdict(list)
    paths = [tuple(path) for path in codes.tolist()]
    for item, path in enumerate(paths):
        owners[path].append(item)
    return [(*path, owners[path].index(item)) if len(owners[path]) > 1 else path for item, path in enumerate(paths)]


def index_vectors(text: np.ndarray, collaborative: np.ndarray, collaborative_weight: float = 1.0) -> np.ndarray:
    """Join what is clustered: centred text vectors with rows of root mean square length 1, and collaborative vectors.

    Args:
        text: [items, text dimensions].
        collaborative: [items, collaborative dimensions], rows of length 1 or 0.
        collaborative_weight: Factor of the collaborative part; 0 leaves it out.

    Returns:
        float32 [items, dimensions].

    Raises:
        ValueError: When the two do not have the same number of rows.
    """
    if text.ndim != 2 or collaborative.ndim != 2 or len(text) != len(collaborative):
        raise ValueError(
            f"expected [items, dimensions] twice, got text {text.shape} and collaborative {collaborative.shape}"
        )
    centred = text - text.mean(axis=0)
    length = float(np.sqrt((centred**2).sum(axis=1).mean()))
    parts = [centred / (length or 1.0)]
    if collaborative_weight:
        parts.append(collaborative_weight * collaborative)
    return np.concatenate(parts, axis=1).astype(np.float32)


def build_index(
    folder: DataFolder,
    *,
    levels: int | None = None,
    codes: int | None = None,
    seed: int = 0,
    collaborative_weight: float = 1.0,
    model: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
    """Give every item of ``folder`` a semantic ID.

    Writes ``<D>.emb.npy`` (what was clustered), ``<D>.codebooks.npz``, ``<D>.index-report.json`` (what is returned) and
    ``<D>.index.json``, that one last. Text embeddings are kept in ``<D>.text-emb.npz`` for the next call.

    Args:
        folder: Holds ``<D>.item.json`` and ``<D>.inter.json``.
        levels: Number of levels; None means that of ``default_shape``.
        codes: Codes a level; None means that of ``default_shape``.
        seed: Seed of the clustering.
        collaborative_weight: Weight of train co-occurrence beside text; 0 means text alone.
        model: Sentence-transformers model, a folder or a hub name; None means the one that needs no network.

    Returns:
        ``diagnose`` of the index, and the settings it was built with.

    Raises:
        InputError: When a file is missing or malformed, the model cannot be loaded, or levels and codes do not fit.
    """
    items = folder.read_items()
    default_levels, default_codes = default_shape(len(items))
    levels = default_levels if levels is None else levels
    codes = default_codes if codes is None else codes
    _check_shape(folder, len(items), levels, codes)
    training = folder.read_training(items)
    text = cached_embeddings([item_text(item) for item in items.values()], _beside(folder, "text-emb.npz"), model)
    row = {item: position for position, item in enumerate(items)}
    collaborative = collaborative_vectors([[row[item] for item in taken] for taken in training.values()], len(items))
    vectors = index_vectors(text, collaborative, collaborative_weight)
    paths, codebooks = residual_codes(vectors, levels, codes, seed)
    report = diagnose(vectors, paths, codebooks, [item.categories for item in items.values()])
    report["settings"] = {
        "seed": seed,
        "collaborative_weight": collaborative_weight,
        "model": "all-MiniLM-L6-v2 (package)" if model is None else os.fspath(model),
    }
    _save(folder, list(items), vectors, paths, codebooks, report)
    return report


def _check_shape(folder: DataFolder, items: int, levels: int, codes: int) -> None:
    if not 1 <= levels < MAX_LEVELS:
        raise InputError(f"{levels} levels: expected 1 to {MAX_LEVELS - 1}, one letter being kept for collision tokens")
    if not 1 <= codes <= items:
        raise InputError(
            f"{folder.item}: {items} items cannot use {codes} codes a level; ask for between 1 and {items} codes"
        )


def _beside(folder: DataFolder, suffix: str) -> Path:
    return folder.root / f"{folder.name}.{suffix}"


def _save(
    folder: DataFolder,
    items: Sequence[str],
    vectors: np.ndarray,
    codes: np.ndarray,
    codebooks: np.ndarray,
    report: dict[str, Any],
) -> None:
    with atomic_path(folder.embeddings) as temporary:
        np.save(temporary, vectors)
    with atomic_path(_beside(folder, "codebooks.npz")) as temporary:
        np.savez(temporary, codebooks=codebooks, codes=codes)
    write_json(_beside(folder, "index-report.json"), report, indent=1)
    ItemIndex.from_codes(items, resolve_collisions(codes)).save(folder.index)
