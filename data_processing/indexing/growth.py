"""New items in an index that a model has learnt: frozen codebooks, no semantic ID changed, no token added.

A new item takes the path of its nearest codes. Where that path belongs to an item alone, it takes the best free one
near by: to give both a collision token would change a semantic ID that the model knows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from data_processing.indexing.balanced_kmeans import assignment_costs
from data_processing.indexing.collaborative import fold_in
from data_processing.indexing.diagnostics import level_balance
from data_processing.indexing.embed import EmbeddingSettings, Engine, cached_embeddings
from data_processing.indexing.residual_index import TextFrame, index_vectors, subtract_centroids
from data_processing.indexing.saved_index import SavedIndex, changes_index, codebooks_file, forget_report, load_saved
from gream_verl.core.data_folder import DataFolder, Item
from gream_verl.core.errors import InputError
from gream_verl.core.files import write_json
from gream_verl.core.semantic_ids import ItemIndex, SemanticId, parse_token, retired_file

BEAMS = 8
PROBES = 8
SAME_MODEL = 0.1
"""How far, as a share of its length, a vector may be from what it was for the model to count as the same."""
REBUILD_ITEMS = 1_000
REBUILD_RATIO = 1.5
REBUILD_SHARE = 0.25
REBUILD_FULLEST = 5.0
"""Limits of :func:`drift` beyond which the index should be built anew. Measured with texts of Amazon Beauty and of
Debian's packages: a random tenth of the catalogue added has a ratio of 1.2, a kind of item not seen before 1.7 to 2.4.
Indexes of fewer than ``REBUILD_ITEMS`` fit their items too closely for the ratio to tell.
"""

Codes = tuple[int, ...]


class Paths:
    """Which paths are taken, and which a new item may still have.

    Attributes:
        levels: Codes of a path, without a collision token.
        tokens: Collision tokens that the index uses; a new item can have no other.
    """

    def __init__(self, sids: Iterable[SemanticId], levels: int) -> None:
        self.levels = levels
        self._taken: dict[Codes, int] = {}  # to the next collision token; 0 where the path is an item's whole SID
        self.tokens = 0
        for sid in sids:
            codes = [parsed[1] for token in sid if (parsed := parse_token(token))]
            path = tuple(code - 1 for code in codes[:levels])
            token = codes[levels] if len(codes) > levels else 0
            self.tokens = max(self.tokens, token)
            self._taken[path] = max(self._taken.get(path, 0), token)

    def take(self, path: Codes) -> Codes | None:
        """Take ``path`` for a new item; return it, with a collision token where needed, or None when it is full."""
        token = self._taken.get(path)
        if token is None:
            self._taken[path] = 0
            return path
        if 0 < token < self.tokens:
            self._taken[path] = token + 1
            return (*path, token)
        return None


def nearest_codes(vectors: np.ndarray, codebooks: np.ndarray) -> np.ndarray:
    """Quantise with frozen codebooks, the nearest code of each level in turn.

    Args:
        vectors: float32 [items, dimensions].
        codebooks: float32 [levels, codes, dimensions].

    Returns:
        int32 [items, levels].
    """
    residual = np.array(vectors, dtype=np.float32)
    codes = np.empty((len(vectors), len(codebooks)), np.int32)
    for level, codebook in enumerate(codebooks):
        codes[:, level] = assignment_costs(residual, codebook).argmin(axis=1)
        subtract_centroids(residual, codebook, codes[:, level])
    return codes


def nearby_paths(vector: np.ndarray, codebooks: np.ndarray, beams: int = BEAMS) -> list[Codes]:
    """Return paths for one vector [dimensions], nearest first, found by a beam search over the levels.

    All codes of the last level follow each of the ``beams`` best beginnings.
    """
    paths: list[Codes] = [()]
    residuals = np.asarray(vector, dtype=np.float32)[None]
    for level, codebook in enumerate(codebooks):
        last = level == len(codebooks) - 1
        costs = assignment_costs(residuals, codebook) + (residuals**2).sum(axis=1, keepdims=True)
        order = np.argsort(costs, axis=None, kind="stable")[: None if last else beams]
        begins, codes = np.unravel_index(order, costs.shape)
        paths = [(*paths[begin], int(code)) for begin, code in zip(begins, codes, strict=True)]
        if not last:
            residuals = residuals[begins] - codebook[codes]
    return paths


def place(vectors: np.ndarray, codebooks: np.ndarray, paths: Paths) -> tuple[list[Codes], int]:
    """Give each vector a path that is not taken, in order; placing in two calls gives the same as in one.

    Args:
        vectors: float32 [items, dimensions].
        codebooks: float32 [levels, codes, dimensions].
        paths: What is taken; what is given is added to it.

    Returns:
        Codes of every item, from 0, a collision token among them; and how many did not get their nearest codes.

    Raises:
        InputError: When there is no free path near an item.
    """
    placed, moved = [], 0
    exhausted: dict[bytes, int] = {}  # beams within which nothing is free: vectors that are alike need not look again
    for vector, nearest in zip(vectors, nearest_codes(vectors, codebooks).tolist(), strict=True):
        path = paths.take(tuple(nearest))
        beams = exhausted.get(vector.tobytes(), BEAMS) if path is None else BEAMS
        while path is None:
            candidates = nearby_paths(vector, codebooks, beams)
            path = next(filter(None, map(paths.take, candidates)), None)
            if path is None and len(candidates) == np.prod([len(codebook) for codebook in codebooks]):
                raise InputError("every path of the index is taken; build it anew with more levels or codes")
            if path is None:
                beams *= 4
                exhausted[vector.tobytes()] = beams
        moved += path[: len(nearest)] != tuple(nearest)
        placed.append(path)
    return placed, moved


@changes_index
def add_items(folder: DataFolder, *, engine: Engine = "local") -> dict[str, Any]:
    """Give every item of ``<D>.item.json`` that has none a semantic ID; what is there does not change.

    Args:
        folder: Holds an index that ``build_index`` made, and the new items among the others.
        engine: What runs the embedding model.

    Returns:
        ``new`` items; where there are any, how many of them were ``moved`` to a path that is not their nearest, and
        ``drift``.

    Raises:
        InputError: When what the index was built from is missing or does not fit it, the embedding model no longer
            gives the vectors it gave, or no path is free.
    """
    items = folder.read_items()
    index = ItemIndex.load(folder.index)
    saved = load_saved(folder, index)
    new = [item for item in items if item not in index.readable]
    if not new:
        return {"new": 0}
    vectors = _new_vectors(folder, saved, new, items, engine)
    levels = saved.codes.shape[1]
    paths, moved = place(vectors, saved.codebooks, Paths(index.readable.values(), levels))
    grown = replace(
        saved,
        items=[*saved.items, *new],
        vectors=np.concatenate([saved.vectors, vectors]),
        codes=np.concatenate([saved.codes, np.array([path[:levels] for path in paths], np.int32)]),
    )
    added = ItemIndex.from_codes(new, paths)
    saved.save_codebooks(folder)  # without the rows of a stopped call, which the next line overwrites
    grown.save(folder)
    forget_report(folder)
    replace(index, sids={**index.sids, **added.sids}).save(folder.index)
    _new_text_cache(folder).unlink(missing_ok=True)
    return {"new": len(new), "moved": moved, "drift": drift(grown)}


def _new_vectors(
    folder: DataFolder, saved: SavedIndex, new: Sequence[str], items: Mapping[str, Item], engine: Engine
) -> np.ndarray:
    """Return the vectors of new items, in the frame of the old ones, of which a few are embedded again as a check."""
    settings = EmbeddingSettings(
        **{**saved.settings["embedding"], "fields": tuple(saved.settings["embedding"]["fields"])}
    )
    probes = [row for row, item in enumerate(saved.items) if item in items][:PROBES]
    embedded = [items[item] for item in (*(saved.items[row] for row in probes), *new)]
    text = cached_embeddings(embedded, _new_text_cache(folder), settings, engine)
    known, width = len(saved.text_mean), saved.vectors.shape[1] - len(saved.text_mean)
    changed = text.shape[1] != known
    if not changed:
        text = index_vectors(text, np.zeros((len(text), 0)), 0.0, TextFrame(saved.text_mean, saved.text_scale))
        was = saved.vectors[probes, :known]
        apart = np.linalg.norm(text[: len(probes)] - was, axis=1) > SAME_MODEL * np.linalg.norm(was, axis=1)
        changed = apart.mean() > 0.5 if len(probes) else False  # the texts of a few may be new
    if changed:
        raise InputError(
            f"{settings.model or 'the embedding model'}: no longer gives the vectors that "
            f"{codebooks_file(folder).name} was built from; add items with the model as it was, or build the index anew"
        )
    collaborative = np.zeros((len(new), width), np.float32)
    if width:
        row = {item: position for position, item in enumerate([*saved.items, *new])}
        taken = [[row[item] for item in sequence] for sequence in folder.read_training().values()]
        weight = saved.settings["collaborative_weight"]
        collaborative = weight * fold_in(taken, saved.vectors[:, known:], len(new))
    return np.concatenate([text[len(probes) :], collaborative], axis=1, dtype=np.float32)


def _new_text_cache(folder: DataFolder) -> Path:
    return folder.root / f"{folder.name}.new-text-emb.npz"


@changes_index
def remove_items(folder: DataFolder, items: Sequence[str]) -> None:
    """Take ``items`` out of the index; their semantic IDs are retired to ``<D>.retired.json``, for no other item.

    Raises:
        InputError: When an item is not in the index, or none would be left.
    """
    index, gone = ItemIndex.load(folder.index), dict.fromkeys(items)
    _check_known(folder.index, items, index.sids, "retired already")
    if len(gone) == len(index):
        raise InputError(f"{folder.index}: no item would be left; remove the file instead")
    forget_report(folder)
    write_json(retired_file(folder.index), {**index.retired, **{item: index.sids[item] for item in gone}})
    ItemIndex({item: sid for item, sid in index.sids.items() if item not in gone}).save(folder.index)


@changes_index
def restore_items(folder: DataFolder, items: Sequence[str]) -> None:
    """Put retired ``items`` back into the index, each with the semantic ID that it had.

    Raises:
        InputError: When an item is not retired.
    """
    index, file = ItemIndex.load(folder.index), retired_file(folder.index)
    _check_known(file, items, index.retired, "in the index")
    forget_report(folder)
    ItemIndex({**index.sids, **{item: index.retired[item] for item in items}}).save(folder.index)
    write_json(file, {item: sid for item, sid in index.retired.items() if item not in items})


def _check_known(file: Path, items: Sequence[str], known: Mapping[str, SemanticId], elsewhere: str) -> None:
    for item in items:
        if item not in known:
            raise InputError(f"{file}: no item {item!r}; check the id, and whether it is {elsewhere}")


def drift(saved: SavedIndex) -> dict[str, Any]:
    """Say how far an index has grown away from the items it was built from.

    Args:
        saved: The index, with the items that were added.

    Returns:
        ``added`` and ``built`` items; ``distortion_built`` and ``distortion_added``: mean squared residual of each;
        ``distortion_ratio`` of the two; ``fullest``: items of the most used code as a multiple of an even share;
        ``entropy`` of the least evenly used level, 1 being perfectly even; ``rebuild``: reasons to build anew, if any.
    """
    left = np.array(saved.vectors)
    for codebook, codes in zip(saved.codebooks, saved.codes.T, strict=True):
        subtract_centroids(left, codebook, codes)
    residual = np.einsum("ij,ij->i", left, left, dtype=np.float64)
    built, added = np.split(residual, [saved.settings["built"]])
    size = saved.codebooks.shape[1]
    balance = [level_balance(codes, size) for codes in saved.codes.T]
    least = 1e-6 * float(np.einsum("ij,ij->", saved.vectors, saved.vectors, dtype=np.float64)) / len(saved.vectors)
    ratio = float(added.mean() / max(built.mean(), least)) if len(added) and least else 1.0
    fullest = max(level["max"] for level in balance) * size / len(saved.items)
    share = len(added) / len(built)
    reasons = {
        f"added items lie {ratio:.2f} times as far from their codes": ratio > REBUILD_RATIO
        and len(built) >= REBUILD_ITEMS,
        f"{share:.0%} as many items were added as it was built from": share > REBUILD_SHARE,
        f"a code has {fullest:.1f} times its even share of items": fullest > REBUILD_FULLEST,
    }
    return {
        "built": len(built),
        "added": len(added),
        "distortion_built": float(built.mean()),
        "distortion_added": float(added.mean()) if len(added) else 0.0,
        "distortion_ratio": ratio,
        "fullest": fullest,
        "entropy": min(level["entropy"] for level in balance),
        "rebuild": [reason for reason, holds in reasons.items() if holds],
    }
