"""The item index: embeddings to semantic IDs by residual balanced k-means (arXiv 2510.20815, section 3.1).

At each level the residuals are clustered into codes of equal use, and what the centroids explain is taken away before
the next level. Items that share a whole path get a collision token each.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np
from rich.progress import track

from data_processing.indexing.assignment import assign_apart
from data_processing.indexing.balanced_kmeans import assignment_costs, balanced_kmeans, cluster_means, size_bounds
from data_processing.indexing.collaborative import collaborative_vectors
from data_processing.indexing.diagnostics import diagnose, prefix_numbers
from data_processing.indexing.embed import EmbeddingSettings, Engine, cache_path, cached_embeddings
from data_processing.indexing.saved_index import SavedIndex, changes_index, forget_report, report_files
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.files import write_json
from gream_verl.core.semantic_ids import MAX_LEVELS, ItemIndex, retired_file

BLOCK_ROWS = 65_536
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


class Quantisation(NamedTuple):
    """Vectors as paths of codes.

    Attributes:
        codes: int32 [items, levels], codes from 0.
        codebooks: float32 [levels, codes, dimensions].
    """

    codes: np.ndarray
    codebooks: np.ndarray


def residual_codes(
    vectors: np.ndarray, levels: int, codes: int, seed: int = 0, *, unique: bool = False
) -> Quantisation:
    """Quantise ``vectors`` level by level; each code of a level is used equally often, give or take one item.

    Args:
        vectors: Finite array [items, dimensions].
        levels: Number of levels.
        codes: Codes a level, at most the number of items.
        seed: Seed of all levels.
        unique: Whether no two items may have the same path: the last level is then solved again with that condition,
            its sizes within the same bounds.

    Returns:
        The codes of every item and the codebooks.

    Raises:
        ValueError: When ``vectors`` is not a finite matrix, has fewer rows than codes, or more items share all codes
            but the last than there are codes.
    """
    residual = np.array(vectors, dtype=np.float32)
    paths, codebooks = np.empty((levels, len(residual)), np.int32), []
    for level in track(range(levels), description="Clustering residuals"):
        clustering = balanced_kmeans(residual, codes, seed=seed + level)
        paths[level], centroids = clustering.labels, clustering.centroids
        if unique and level == levels - 1:
            costs = assignment_costs(residual, centroids)
            paths[level] = assign_apart(costs, prefix_numbers(paths[:level].T)[-1], *size_bounds(len(residual), codes))
            centroids = cluster_means(residual, paths[level], centroids)
        subtract_centroids(residual, centroids, paths[level])
        codebooks.append(centroids)
    return Quantisation(np.ascontiguousarray(paths.T), np.stack(codebooks))


def subtract_centroids(residual: np.ndarray, centroids: np.ndarray, labels: np.ndarray) -> None:
    """Take each row's centroid away, in place and block by block."""
    for start in range(0, len(residual), BLOCK_ROWS):
        block = slice(start, start + BLOCK_ROWS)
        residual[block] -= centroids[labels[block]]


def resolve_collisions(codes: np.ndarray, tokens: int | None = None) -> list[tuple[int, ...]]:
    """Return each item's path; items that share one all get one code more, in the order of the items.

    Args:
        codes: int [items, levels], codes from 0.
        tokens: How many collision tokens there are; None for as many as needed.

    Raises:
        InputError: When more items share a path than there are collision tokens.

    >>> resolve_collisions(np.array([[1, 2], [0, 0], [1, 2]]))
    [(1, 2, 0), (0, 0), (1, 2, 1)]
    """
    groups = prefix_numbers(codes)[-1]
    sizes = np.bincount(groups)
    if tokens is not None and sizes.max() > max(tokens, 1):
        raise InputError(
            f"{sizes.max()} items share one path of {codes.shape[1]} codes, and there are {tokens} collision tokens; "
            "raise --collision-tokens, or --levels or --codes so that fewer items meet, or ask for --unique"
        )
    order = np.argsort(groups, kind="stable")
    rank = np.empty(len(codes), np.int64)
    rank[order] = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    shared = (sizes > 1)[groups]
    return [
        (*path, token) if meets else tuple(path)
        for path, token, meets in zip(codes.tolist(), rank.tolist(), shared.tolist(), strict=True)
    ]


class TextFrame(NamedTuple):
    """How text embeddings become a part of what is clustered: less ``mean`` [dimensions], divided by ``scale``."""

    mean: np.ndarray
    scale: float


def text_frame(text: np.ndarray) -> TextFrame:
    """Return the frame in which ``text`` [items, dimensions] is centred and has rows of root mean square length 1."""
    mean = text.mean(axis=0)
    return TextFrame(mean, float(np.sqrt(((text - mean) ** 2).sum(axis=1).mean())) or 1.0)


def index_vectors(
    text: np.ndarray, collaborative: np.ndarray, collaborative_weight: float = 1.0, frame: TextFrame | None = None
) -> np.ndarray:
    """Join what is clustered: text vectors in their frame, and collaborative vectors.

    Args:
        text: [items, text dimensions].
        collaborative: [items, collaborative dimensions], rows of length 1 or 0.
        collaborative_weight: Factor of the collaborative part; 0 leaves it out.
        frame: Of the items the codebooks were made from; None for that of ``text`` itself.

    Returns:
        float32 [items, dimensions].

    Raises:
        ValueError: When the two do not have the same number of rows.
    """
    if text.ndim != 2 or collaborative.ndim != 2 or len(text) != len(collaborative):
        raise ValueError(
            f"expected [items, dimensions] twice, got text {text.shape} and collaborative {collaborative.shape}"
        )
    mean, scale = text_frame(text) if frame is None else frame
    parts = [(text - mean) / scale]
    if collaborative_weight:
        parts.append(collaborative_weight * collaborative)
    return np.concatenate(parts, axis=1, dtype=np.float32)


@changes_index
def build_index(
    folder: DataFolder,
    *,
    levels: int | None = None,
    codes: int | None = None,
    seed: int = 0,
    collaborative_weight: float = 1.0,
    embedding: EmbeddingSettings | None = None,
    engine: Engine = "local",
    unique: bool = False,
    collision_tokens: int | None = None,
) -> dict[str, Any]:
    """Give every item of ``folder`` a semantic ID.

    Writes ``<D>.emb.npy`` (what was clustered), ``<D>.codebooks.npz``, ``<D>.index-report.json`` (what is returned) and
    ``<D>.index.json``, that one last. Text embeddings are kept in ``cache_path`` for the next call. Semantic IDs
    that an earlier index retired go with it.

    Args:
        folder: Holds ``<D>.item.json`` and ``<D>.inter.json``.
        levels: Number of levels; None means that of ``default_shape``.
        codes: Codes a level; None means that of ``default_shape``.
        seed: Seed of the clustering.
        collaborative_weight: Weight of train co-occurrence beside text; 0 means text alone.
        embedding: How texts become vectors; None means the model that needs no network.
        engine: What runs the embedding model.
        unique: Whether the last level keeps all items apart, so that no collision token is needed.
        collision_tokens: Most items on one path; None means as many as there are codes.

    Returns:
        ``diagnose`` of the index, and the settings it was built with.

    Raises:
        InputError: When a file is missing or malformed, the model cannot be loaded, levels and codes do not fit, or too
            many items meet on one path.
    """
    items = folder.read_items()
    default_levels, default_codes = default_shape(len(items))
    levels = default_levels if levels is None else levels
    codes = default_codes if codes is None else codes
    _check_shape(folder, len(items), levels, codes)
    embedding = embedding or EmbeddingSettings()
    training = folder.read_training(items)
    text = cached_embeddings(list(items.values()), cache_path(folder, embedding), embedding, engine)
    row = {item: position for position, item in enumerate(items)}
    frame = text_frame(text)
    collaborative = np.zeros((len(items), 0), np.float32)
    if collaborative_weight:
        taken = [[row[item] for item in sequence] for sequence in training.values()]
        collaborative = collaborative_vectors(taken, len(items))
    vectors = index_vectors(text, collaborative, collaborative_weight, frame)
    del text, collaborative
    try:
        paths, codebooks = residual_codes(vectors, levels, codes, seed, unique=unique)
    except ValueError as error:
        remedy = "; raise --levels or --codes, or do without --unique" if "apart" in str(error) else ""
        raise InputError(f"{folder.item}: {error}{remedy}") from error
    tokens = codes if collision_tokens is None else collision_tokens
    index = ItemIndex.from_codes(list(items), resolve_collisions(paths, tokens))
    settings: dict[str, Any] = {
        "built": len(items),
        "levels": levels,
        "codes": codes,
        "seed": seed,
        "unique": unique,
        "collision_tokens": tokens,
        "collaborative_weight": collaborative_weight,
        "embedding": {**asdict(embedding), "model": None if embedding.model is None else os.fspath(embedding.model)},
    }
    report = diagnose(vectors, paths, codebooks, [item.categories for item in items.values()])
    report["settings"] = settings
    SavedIndex(list(items), vectors, paths, codebooks, frame.mean, frame.scale, settings).save(folder)
    forget_report(folder)
    write_json(report_files(folder)[0], report, indent=1)
    retired_file(folder.index).unlink(missing_ok=True)
    index.save(folder.index)
    return report


def _check_shape(folder: DataFolder, items: int, levels: int, codes: int) -> None:
    if not 1 <= levels < MAX_LEVELS:
        raise InputError(f"{levels} levels: expected 1 to {MAX_LEVELS - 1}, one letter being kept for collision tokens")
    if not 1 <= codes <= items:
        raise InputError(
            f"{folder.item}: {items} items cannot use {codes} codes a level; ask for between 1 and {items} codes"
        )
