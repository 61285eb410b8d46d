"""What an index was built from, kept beside it so that it can be examined and extended; checked each time it is read.

``<D>.emb.npy`` holds what was clustered, ``<D>.codebooks.npz`` all else. Both are written before ``<D>.index.json``,
and items are only ever appended to them: a call that is stopped in between leaves rows that nothing refers to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from data_processing.layout import DataFolder
from gream_verl.files import InputError, atomic_path, require_file
from gream_verl.semantic_ids import ItemIndex, SemanticId, format_token

REMEDY = "build the index anew with `gream index build`"


@dataclass(frozen=True)
class SavedIndex:
    """An index with what it was built from. Row ``i`` of every array belongs to ``items[i]``.

    Attributes:
        items: Items, in the order in which they came; those whose semantic ID is retired among them.
        vectors: float32 [items, dimensions], what was quantised.
        codes: int32 [items, levels], codes from 0, without collision tokens.
        codebooks: float32 [levels, codes, dimensions].
        text_mean: float32 [text dimensions], what was taken from the text embeddings.
        text_scale: What they were divided by after that.
        settings: How the index was built: levels, codes, seed, collisions, collaborative weight, embedding; and
            ``built``, the number of items at that time.
    """

    items: list[str]
    vectors: np.ndarray
    codes: np.ndarray
    codebooks: np.ndarray
    text_mean: np.ndarray
    text_scale: float
    settings: dict[str, Any]

    def save(self, folder: DataFolder) -> None:
        """Write ``<D>.emb.npy``, then ``<D>.codebooks.npz``, each atomically."""
        with atomic_path(folder.embeddings) as temporary:
            np.save(temporary, self.vectors)
        with atomic_path(codebooks_file(folder)) as temporary:
            np.savez(
                temporary,
                items=np.array(self.items, dtype=np.str_),
                codes=self.codes,
                codebooks=self.codebooks,
                text_mean=self.text_mean,
                text_scale=np.float64(self.text_scale),
                settings=np.array(json.dumps(self.settings, sort_keys=True)),
                fingerprint=np.array(fingerprint(self.vectors)),
            )


def codebooks_file(folder: DataFolder) -> Path:
    """Return ``<D>.codebooks.npz``."""
    return folder.root / f"{folder.name}.codebooks.npz"


def report_files(folder: DataFolder) -> tuple[Path, Path]:
    """Return ``<D>.index-report.json`` and ``<D>.index-report.html``, which tell of one index and no later one."""
    return folder.root / f"{folder.name}.index-report.json", folder.root / f"{folder.name}.index-report.html"


def fingerprint(vectors: np.ndarray) -> str:
    """Return a hash of the shape and bytes of ``vectors``."""
    digest = hashlib.sha256(f"{vectors.dtype}{vectors.shape}".encode())
    digest.update(np.ascontiguousarray(vectors).data)
    return digest.hexdigest()


def load_saved(folder: DataFolder) -> SavedIndex:
    """Read and check what the index of ``folder`` was built from.

    Raises:
        InputError: When a file is missing or broken, the vectors are not those that were clustered, or the semantic IDs
            in ``<D>.index.json`` are not those that the codes stand for.
    """
    file = require_file(codebooks_file(folder), REMEDY)
    try:
        with np.load(file, allow_pickle=False) as stored:
            parts = {name: stored[name] for name in stored.files}
        if "items" not in parts:
            raise InputError(f"{file}: was made by an earlier version; {REMEDY}")
        items, codes, codebooks = parts["items"].tolist(), parts["codes"], parts["codebooks"]
        settings, expected = json.loads(str(parts["settings"])), str(parts["fingerprint"])
        text_mean, text_scale = parts["text_mean"], float(parts["text_scale"])
        vectors = np.load(require_file(folder.embeddings, REMEDY), allow_pickle=False)[: len(items)]
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: cannot be read ({error}); {REMEDY}") from error
    if fingerprint(vectors) != expected:
        raise InputError(f"{folder.embeddings}: not the vectors that {file.name} was made from; {REMEDY}")
    saved = SavedIndex(items, vectors, codes, codebooks, text_mean, text_scale, settings)
    return _matched(saved, ItemIndex.load(folder.index).readable, folder)


def _matched(saved: SavedIndex, given: Mapping[str, SemanticId], folder: DataFolder) -> SavedIndex:
    """Return ``saved`` without the rows of a stopped call, each of the others proved to be that of its semantic ID."""
    rows = [row for row, item in enumerate(saved.items) if item in given]
    for row in rows:
        item, codes = saved.items[row], saved.codes[row]
        sid = given[item][: len(codes)]
        if sid != tuple(format_token(level, code + 1) for level, code in enumerate(codes.tolist())):
            raise InputError(
                f"{folder.index}: item {item!r} has the SID {''.join(sid)}, but codes {codes.tolist()} in "
                f"{codebooks_file(folder).name}; {REMEDY}"
            )
    if len(rows) < len(given):
        known = set(saved.items)
        unknown = next(item for item in given if item not in known)
        raise InputError(f"{folder.index}: item {unknown!r} is not in {codebooks_file(folder).name}; {REMEDY}")
    if len(rows) == len(saved.items):
        return saved
    dropped = next(row for row, item in enumerate(saved.items) if item not in given)
    if dropped < saved.settings["built"]:
        raise InputError(
            f"{folder.index}: item {saved.items[dropped]!r} of {codebooks_file(folder).name} is missing; "
            f"take items out by `gream index remove`, or {REMEDY}"
        )
    return SavedIndex(
        [saved.items[row] for row in rows],
        saved.vectors[rows],
        saved.codes[rows],
        saved.codebooks,
        saved.text_mean,
        saved.text_scale,
        saved.settings,
    )
