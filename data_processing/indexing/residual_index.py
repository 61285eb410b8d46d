"""The item index: embeddings to semantic IDs by residual balanced k-means (arXiv 2510.20815, section 3.1).

At each level the residuals are clustered into codes of equal use, and the centroids are subtracted before the next
level. Items that share a whole path get a collision token each.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from rich.progress import track

from data_processing.indexing.assignment import assign_apart
from data_processing.indexing.balanced_kmeans import assignment_costs, balanced_kmeans, cluster_means, size_bounds
from data_processing.indexing.collaborative import collaborative_vectors
from data_processing.indexing.diagnostics import prefix_numbers
from data_processing.indexing.embed import EmbeddingSettings, cached_embeddings
from data_processing.indexing.saved_index import SavedIndex
from gream_verl.core.data_folder import DataFolder, Item, has_texts
from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import MAX_LEVELS, ItemIndex


@dataclass(frozen=True)
class IndexSettings:
    """Settings of an index.

    Attributes:
        levels: Levels of a path; None for those of ``default_shape``.
        codes: Codes per level; None for those of ``default_shape``.
        seed: Seed of the clustering.
        collaborative_weight: Weight of train co-occurrence next to text; 0 means text alone.
        unique: Let the last level keep all items apart, so that no collision token is needed.
        embedding: Settings that turn texts into vectors.
    """

    levels: int | None = None
    codes: int | None = None
    seed: int = 0
    collaborative_weight: float = 1.0
    unique: bool = False
    embedding: EmbeddingSettings = field(default_factory=EmbeddingSettings)


def default_shape(items: int) -> tuple[int, int]:
    """Return ``(levels, codes)`` for a catalogue of ``items``.

    From 10,000 items on, the paper's 4 levels of 256 codes. Below, 3 levels of about sqrt(items) codes, a power of two:
    two codes nearly tell items apart, and training sees each token often.

    >>> [default_shape(items) for items in (20, 1_300, 9_000, 12_000)]
    [(3, 4), (3, 32), (3, 128), (4, 256)]
    """
    if items >= 10_000:
        return 4, 256
    return 3, min(items, 2 ** max(1, round(np.log2(items) / 2)))


def residual_codes(
    vectors: np.ndarray, levels: int, codes: int, seed: int = 0, *, unique: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Quantise ``vectors`` level by level; each code of a level is used equally often, give or take one item.

    Args:
        vectors: Finite array [items, dimensions].
        levels: Number of levels.
        codes: Codes per level, at most the number of items.
        seed: Seed of all levels.
        unique: Solve the last level again, within the same bounds, so that no two items have the same path.

    Returns:
        int32 [items, levels], the codes from 0, and float32 [levels, codes, dimensions], the codebooks.
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
        residual -= centroids[paths[level]]
        codebooks.append(centroids)
    return np.ascontiguousarray(paths.T), np.stack(codebooks)


def resolve_collisions(codes: np.ndarray, tokens: int | None = None) -> list[tuple[int, ...]]:
    """Return each item's path; items that share one all get one code more, in the order of the items.

    Args:
        codes: int [items, levels], codes from 0.
        tokens: Number of collision tokens; None for as many as needed.

    >>> resolve_collisions(np.array([[1, 2], [0, 0], [1, 2]]))
    [(1, 2, 0), (0, 0), (1, 2, 1)]
    """
    groups = prefix_numbers(codes)[-1]
    sizes = np.bincount(groups)
    if tokens is not None and sizes.max() > max(tokens, 1):
        raise InputError(
            f"{sizes.max()} items share one path, and there are {tokens} collision tokens; raise --levels or --codes"
        )
    # The rank of an item in its group: its position in the order by group, less the group's first position.
    order = np.argsort(groups, kind="stable")
    rank = np.empty(len(codes), np.int64)
    rank[order] = np.arange(len(codes)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    shared = (sizes > 1)[groups]
    return [
        (*path, token) if meets else tuple(path)
        for path, token, meets in zip(codes.tolist(), rank.tolist(), shared.tolist(), strict=True)
    ]


def refuse_unknown(without: Collection[str], items: Mapping[str, Item], folder: DataFolder) -> None:
    """Refuse to leave out what is no item of ``folder``."""
    if unknown := min(set(without) - items.keys(), default=None):
        raise InputError(f"{folder.item}: holds no item {unknown!r} that could be left out; check its id")


def build_index(folder: DataFolder, settings: IndexSettings | None = None, without: Collection[str] = ()) -> ItemIndex:
    """Give every item of ``folder`` a semantic ID, and write ``<D>.codebooks.npz``, then ``<D>.index.json``.

    Args:
        folder: Holds ``<D>.item.json`` and ``<D>.inter.json``.
        settings: Settings of the index; None for the defaults.
        without: Items to leave out.
    """
    settings, items = settings or IndexSettings(), folder.read_items()
    refuse_unknown(without, items, folder)
    training = folder.read_training(items)
    items = {item: known for item, known in items.items() if item not in without}
    levels, codes = default_shape(max(len(items), 1))
    levels, codes = settings.levels or levels, settings.codes or codes
    if levels >= MAX_LEVELS:
        raise InputError(f"{levels} levels: ask for at most {MAX_LEVELS - 1}; the last letter is for collision tokens")
    if codes > len(items):
        raise InputError(f"{folder.item}: {len(items)} items cannot use {codes} codes per level; lower --codes")
    # Text is centred and has rows of root mean square length 1; the collaborative part has rows of length 1 or 0.
    text = np.zeros((len(items), 0))
    if has_texts(items):
        text = cached_embeddings(folder, list(items.values()), settings.embedding)
    elif not settings.collaborative_weight:
        raise InputError(f"{folder.item}: without texts it takes a --collaborative-weight above 0")
    mean = text.mean(axis=0)
    scale = float(np.sqrt(((text - mean) ** 2).sum(axis=1).mean())) or 1.0
    parts = [(text - mean) / scale]
    if settings.collaborative_weight:
        row = {item: position for position, item in enumerate(items)}
        taken = [[row[item] for item in sequence if item in row] for sequence in training.values()]
        parts.append(settings.collaborative_weight * collaborative_vectors(taken, len(items)))
    vectors = np.concatenate(parts, axis=1, dtype=np.float32)
    paths, codebooks = residual_codes(vectors, levels, codes, settings.seed, unique=settings.unique)
    index = ItemIndex.from_codes(list(items), resolve_collisions(paths, codes))
    used = asdict(replace(settings, levels=levels, codes=codes)) | {"built": len(items)}
    SavedIndex(list(items), vectors, paths, codebooks, mean, np.array(scale), used).save(folder)
    index.save(folder.index)
    return index
