"""What an index was built from, kept beside it so that it can be examined and extended; checked each time it is read.

``<D>.emb.npy`` holds what was clustered, ``<D>.codebooks.npz`` all else. Both are written before ``<D>.index.json``,
and items are only ever appended to them: a call that is stopped in between leaves rows that nothing refers to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np

from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.files import atomic_path, hold, require_file
from gream_verl.core.semantic_ids import ItemIndex, SemanticId, format_token

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
        self.save_codebooks(folder)

    def save_codebooks(self, folder: DataFolder) -> None:
        """Write ``<D>.codebooks.npz``; it fits an ``<D>.emb.npy`` with more rows, too."""
        with atomic_path(codebooks_file(folder)) as temporary:
            np.savez(temporary, **self._arrays(), fingerprint=np.array(self.fingerprint()))

    def fingerprint(self) -> str:
        """Return a hash of everything."""
        digest = hashlib.sha256()
        for name, array in sorted({**self._arrays(), "vectors": self.vectors}.items()):
            digest.update(f"{name} {array.dtype} {array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def _arrays(self) -> dict[str, Any]:
        return {
            "items": _bytes(self.items),  # as text of one width, one long id would cost as much a million times
            "codes": self.codes,
            "codebooks": self.codebooks,
            "text_mean": self.text_mean,
            "text_scale": np.array([self.text_scale], np.float64),
            "settings": _bytes(self.settings),
        }


def _bytes(value: Any) -> np.ndarray:
    return np.frombuffer(json.dumps(value, sort_keys=True).encode(), np.uint8)


def codebooks_file(folder: DataFolder) -> Path:
    """Return ``<D>.codebooks.npz``."""
    return folder.root / f"{folder.name}.codebooks.npz"


def report_files(folder: DataFolder) -> tuple[Path, Path]:
    """Return ``<D>.index-report.json`` and ``<D>.index-report.html``, which tell of one index and no later one."""
    return folder.root / f"{folder.name}.index-report.json", folder.root / f"{folder.name}.index-report.html"


def forget_report(folder: DataFolder) -> None:
    """Remove what ``gream index report`` said of the index before it changed."""
    for file in report_files(folder):
        file.unlink(missing_ok=True)


P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def changing(folder: DataFolder) -> Iterator[None]:
    """Hold the index of ``folder``: of two commands that change it at once, one would undo what the other does.

    Raises:
        InputError: When another command holds it.
    """
    if not folder.root.is_dir():  # what is missing will be said
        yield
        return
    with (folder.root / f".{folder.name}.index.lock").open("w") as lock:
        hold(lock, f"{folder.index}: another command is changing it; wait for it and call again")
        yield


def changes_index(command: Callable[Concatenate[DataFolder, P], T]) -> Callable[Concatenate[DataFolder, P], T]:
    """Hold the index while ``command`` runs, whose first argument is the folder."""

    @wraps(command)
    def alone(folder: DataFolder, *arguments: P.args, **options: P.kwargs) -> T:
        with changing(folder):
            return command(folder, *arguments, **options)

    return alone


def load_saved(folder: DataFolder, index: ItemIndex | None = None) -> SavedIndex:
    """Read and check what the index of ``folder`` was built from.

    Args:
        folder: Where it lies.
        index: What ``<D>.index.json`` holds, to spare reading it again.

    Raises:
        InputError: When a file is missing, broken or changed, the vectors are not those that were clustered, or the
            semantic IDs in ``<D>.index.json`` are not those that the codes stand for.
    """
    file = require_file(codebooks_file(folder), REMEDY)
    try:
        with np.load(file, allow_pickle=False) as stored:
            parts = {name: stored[name] for name in stored.files}
        if "text_scale" not in parts:
            raise InputError(f"{file}: was made by an earlier version; {REMEDY}")
        items, settings = (json.loads(parts[name].tobytes()) for name in ("items", "settings"))
        vectors = np.load(require_file(folder.embeddings, REMEDY), allow_pickle=False)[: len(items)]
        saved = SavedIndex(
            items,
            vectors,
            parts["codes"],
            parts["codebooks"],
            parts["text_mean"],
            float(parts["text_scale"][0]),
            settings,
        )
        same = saved.fingerprint() == str(parts["fingerprint"])
    except InputError:
        raise
    except Exception as error:  # numpy raises whatever the bytes of a broken file lead it to
        raise InputError(f"{file}: cannot be read ({type(error).__name__}: {error}); {REMEDY}") from error
    if not same:
        raise InputError(f"{folder.embeddings}: not the vectors that {file.name} was made from; {REMEDY}")
    return _matched(saved, (index or ItemIndex.load(folder.index)).readable, folder)


def _matched(saved: SavedIndex, given: Mapping[str, SemanticId], folder: DataFolder) -> SavedIndex:
    """Return ``saved`` without the rows of a stopped call, each of the others proved to be that of its semantic ID."""
    rows = [row for row, item in enumerate(saved.items) if item in given]
    token = cache(format_token)
    for row in rows:
        item, codes = saved.items[row], saved.codes[row]
        sid = given[item][: len(codes)]
        if sid != tuple(token(level, code + 1) for level, code in enumerate(codes.tolist())):
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
    return replace(
        saved, items=[saved.items[row] for row in rows], vectors=saved.vectors[rows], codes=saved.codes[rows]
    )
