"""New items in an index that a model has learnt: frozen codebooks, no semantic ID changed, no token added.

A new item takes the path of its nearest codes. Where another item has that path for itself, the new one takes the
nearest free path: a collision token for both would change a semantic ID that the model knows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from data_processing.indexing.balanced_kmeans import assignment_costs
from data_processing.indexing.collaborative import fold_in
from data_processing.indexing.embed import EmbeddingSettings, embed_items
from data_processing.indexing.residual_index import refuse_unknown, resolve_collisions
from data_processing.indexing.saved_index import REMEDY, SavedIndex, load_saved
from gream_verl.core.data_folder import DataFolder, Item
from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex

BEAMS = 8
PROBES = 8
SAME_MODEL = 0.1
"""Distance, as a share of its length, at which a vector still counts as one of the same model."""
MANY_ITEMS, FAR, MANY_ADDED, CROWDED = 1_000, 1.5, 0.25, 5.0
"""Limits of :func:`drift`. On Amazon Beauty, a random tenth of the items added lies 1.2 times as far from its codes, an
unknown kind of item 1.7 to 2.4 times. Indexes of fewer than ``MANY_ITEMS`` fit their items too closely to tell."""

Codes = tuple[int, ...]


def nearest_codes(vectors: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    """Quantise float32 [items, dimensions] with codebooks [levels, codes, dimensions]; return int32 [items, levels]."""
    residual = np.array(vectors, dtype=np.float32)
    codes = np.empty((len(vectors), len(codebooks)), np.int32)
    for level, codebook in enumerate(codebooks):
        codes[:, level] = assignment_costs(residual, codebook).argmin(axis=1)
        residual -= codebook[codes[:, level]]
    return codes


def nearby_paths(vector: np.ndarray, codebooks: np.ndarray, beams: int = BEAMS) -> list[Codes]:
    """Return paths for one vector [dimensions], nearest first: all codes after the ``beams`` best beginnings."""
    paths: list[Codes] = [()]
    residuals = np.asarray(vector, dtype=np.float32)[None]
    for level, codebook in enumerate(codebooks):
        last = level == len(codebooks) - 1
        costs = assignment_costs(residuals, codebook) + (residuals**2).sum(axis=1, keepdims=True)
        order = np.argsort(costs, axis=None, kind="stable")[: None if last else beams]
        begins, codes = np.unravel_index(order, costs.shape)
        paths = [(*paths[begin], int(code)) for begin, code in zip(begins, codes, strict=True)]
        residuals = residuals[begins] - codebook[codes]
    return paths


def choose_paths(vectors: np.ndarray, codebooks: np.ndarray, taken: np.ndarray) -> list[Codes]:
    """Give each vector a path that is free: no item has it, or items share it and a collision token is left.

    Args:
        vectors: float32 [items, dimensions].
        codebooks: float32 [levels, codes, dimensions].
        taken: int [known items, levels], the codes of the items that the index has, in its order.

    Returns:
        Codes of every item, from 0, with its collision token.
    """
    levels = len(codebooks)
    # From each taken path to its next collision token; 0 where the path is the whole semantic ID of an item.
    next_token: dict[Codes, int] = {}
    for path in resolve_collisions(taken):
        next_token[path[:levels]] = path[levels] + 1 if len(path) > levels else 0
    tokens = max(next_token.values(), default=0)

    def take(path: Codes) -> Codes | None:
        token = next_token.get(path)
        if token is None:
            next_token[path] = 0
            return path
        if 0 < token < tokens:
            next_token[path] = token + 1
            return (*path, token)
        return None

    chosen: list[Codes] = []
    for vector, nearest in zip(vectors, nearest_codes(vectors, codebooks).tolist(), strict=True):
        free, beams = take(tuple(nearest)), BEAMS
        while free is None:
            candidates = nearby_paths(vector, codebooks, beams)
            free = next(filter(None, map(take, candidates)), None)
            if free is None and len(candidates) == codebooks.shape[1] ** levels:
                raise InputError("every path of the index is taken; build it again with more levels or codes")
            beams *= 4
        chosen.append(free)
    return chosen


def add_items(folder: DataFolder, without: Collection[str] = ()) -> dict[str, Any]:
    """Give every item of ``<D>.item.json`` that has none a semantic ID; the others do not change.

    Args:
        folder: Holds an index that ``build_index`` made, and the new items among the others.
        without: Items to leave out.

    Returns:
        ``new`` items, and :func:`drift` where there are any.
    """
    items, index = folder.read_items(), ItemIndex.load(folder.index)
    saved = load_saved(folder, index)
    refuse_unknown(without, items, folder)
    new = [item for item in items if item not in index.sids and item not in without]
    if not new:
        return {"new": 0}
    vectors = _new_vectors(folder, items, saved, new)
    paths = choose_paths(vectors, saved.codebooks, saved.codes)
    codes = np.array([path[: len(saved.codebooks)] for path in paths], np.int32)
    rows = {"vectors": np.concatenate([saved.vectors, vectors]), "codes": np.concatenate([saved.codes, codes])}
    grown = replace(saved, items=[*saved.items, *new], **rows)
    grown.save(folder)
    replace(index, sids={**index.sids, **ItemIndex.from_codes(new, paths).sids}).save(folder.index)
    return {"new": len(new)} | drift(grown)


def _new_vectors(folder: DataFolder, items: Mapping[str, Item], saved: SavedIndex, new: Sequence[str]) -> np.ndarray:
    """Return the vectors of new items, scaled as the old ones; a few old ones are embedded again as a check."""
    stored = saved.settings["embedding"]
    settings = EmbeddingSettings(**stored | {"fields": tuple(stored["fields"]), "devices": ()})
    probes = [row for row, item in enumerate(saved.items) if item in items][:PROBES]
    known, embedded = len(saved.text_mean), [*(saved.items[row] for row in probes), *new]
    # an index of a data set without texts has no text part
    text = embed_items([items[item] for item in embedded], settings) if known else np.zeros((len(embedded), 0))
    same = text.shape[1] == known
    if same:
        text, old = (text - saved.text_mean) / float(saved.text_scale), saved.vectors[probes, :known]
        far = np.linalg.norm(text[: len(probes)] - old, axis=1) > SAME_MODEL * np.linalg.norm(old, axis=1)
        same = far.sum() <= len(probes) / 2  # a few items may have new texts
    if not same:
        raise InputError(f"{settings.model or 'the embedding model'}: gives other vectors than at the build; {REMEDY}")
    parts = [text[len(probes) :]]
    if saved.vectors.shape[1] > known:
        row = {item: position for position, item in enumerate([*saved.items, *new])}
        taken = [[row[item] for item in user if item in row] for user in folder.read_training(items).values()]
        parts.append(saved.settings["collaborative_weight"] * fold_in(taken, saved.vectors[:, known:], len(new)))
    return np.concatenate(parts, axis=1, dtype=np.float32)


def drift(saved: SavedIndex) -> dict[str, Any]:
    """Measure the distance of an index from the items it was built from.

    Returns:
        ``added`` and ``built`` items; ``distortion_ratio`` of their mean squared residuals; ``fullest``, items of the
        most used code as a multiple of an even share; ``rebuild``, the reasons to build the index again.
    """
    residual = np.array(saved.vectors)
    for codebook, codes in zip(saved.codebooks, saved.codes.T, strict=True):
        residual -= codebook[codes]
    built, added = np.split(np.einsum("ij,ij->i", residual, residual, dtype=np.float64), [saved.settings["built"]])
    share = len(added) / len(built)
    ratio = float(added.mean() / max(built.mean(), np.finfo(np.float32).tiny)) if len(added) else 1.0
    fullest = float(max(np.bincount(codes).max() for codes in saved.codes.T) * saved.codebooks.shape[1] / len(residual))
    reasons = {
        f"added items lie {ratio:.2f} times as far from their codes": ratio > FAR and len(built) >= MANY_ITEMS,
        f"{share:.0%} as many items were added as it was built from": share > MANY_ADDED,
        f"a code has {fullest:.1f} times its even share of items": fullest > CROWDED,
    }
    found = {"built": len(built), "added": len(added), "distortion_ratio": ratio, "fullest": fullest}
    return found | {"rebuild": [reason for reason, holds in reasons.items() if holds]}
