"""The file next to an index that holds its vectors, codebooks and settings, to examine and extend it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.files import atomic_path, require_file
from gream_verl.core.semantic_ids import ItemIndex

REMEDY = "build the index again with `gream index build`"


@dataclass(frozen=True)
class SavedIndex:
    """Content of ``<D>.codebooks.npz``. Row ``i`` of every array of items belongs to ``items[i]``.

    Attributes:
        items: Item ids, in the order of ``<D>.index.json``.
        vectors: float32 [items, dimensions], text and then co-occurrence, as quantised.
        codes: int32 [items, levels], codes from 0, without collision tokens.
        codebooks: float32 [levels, codes, dimensions].
        text_mean: float32 [text dimensions], subtracted from the text embeddings.
        text_scale: float64 [], their divisor after that.
        settings: ``IndexSettings`` as a dictionary, and ``built``, the number of items at the time of the build.
    """

    items: list[str]
    vectors: np.ndarray
    codes: np.ndarray
    codebooks: np.ndarray
    text_mean: np.ndarray
    text_scale: np.ndarray
    settings: dict[str, Any]

    def save(self, folder: DataFolder) -> None:
        """Write ``<D>.codebooks.npz`` atomically. ``<D>.index.json`` is written after it."""
        texts = {name: np.frombuffer(json.dumps(vars(self)[name]).encode(), np.uint8) for name in ("items", "settings")}
        with atomic_path(folder.codebooks) as temporary:
            np.savez(temporary, **(vars(self) | texts))


def load_saved(folder: DataFolder, index: ItemIndex) -> SavedIndex:
    """Read ``<D>.codebooks.npz`` without rows of a stopped call that the index lacks; refuse that of another index."""
    file, rows = require_file(folder.codebooks, REMEDY), len(index)
    try:
        with np.load(file, allow_pickle=False) as stored:
            parts: dict[str, Any] = {name: stored[name] for name in stored.files}
        parts |= {name: json.loads(parts[name].tobytes()) for name in ("items", "settings")}
        parts |= {name: parts[name][:rows] for name in ("items", "vectors", "codes")}
        saved = SavedIndex(**parts)
        built = saved.settings["built"]
    except Exception as error:  # a broken file leads numpy to errors of any kind
        raise InputError(f"{file}: cannot be read ({type(error).__name__}: {error}); {REMEDY}") from error
    same_items = saved.items == list(index.sids) and len(saved.items) >= built
    if not same_items or not np.array_equal(index_codes(index, saved.codes.shape[1]), saved.codes):
        raise InputError(f"{folder.index}: not the index that {file.name} was made with; {REMEDY}")
    return saved


def index_codes(index: ItemIndex, levels: int) -> np.ndarray:
    """Return the codes of the first ``levels`` tokens of every item, from 0, int32 [items, levels]."""
    code = {token: int(token[4:-2]) - 1 for token in index.tokens}  # <|a_12|> is code 11
    return np.array([[code[token] for token in sid[:levels]] for sid in index.sids.values()], np.int32)
