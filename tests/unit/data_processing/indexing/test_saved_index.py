from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_processing.indexing.saved_index import SavedIndex, load_saved
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex

CODES = np.array([[0, 1], [1, 0], [0, 1]], np.int32)
PATHS = [(0, 1, 0), (1, 0), (0, 1, 1)]


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    data, random = DataFolder(tmp_path, "toy"), np.random.default_rng(0)
    vectors, codebooks = random.normal(size=(3, 4)).astype("f4"), random.normal(size=(2, 2, 4)).astype("f4")
    SavedIndex(
        ["a", "b", "c"], vectors, CODES, codebooks, vectors.mean(axis=0), np.array(0.3), {"built": 3, "seed": 1}
    ).save(data)
    ItemIndex.from_codes(["a", "b", "c"], PATHS).save(data.index)
    return data


def load(folder: DataFolder) -> SavedIndex:
    return load_saved(folder, ItemIndex.load(folder.index))


def test_what_is_saved_is_what_is_loaded(folder: DataFolder) -> None:
    saved = load(folder)
    assert saved.items == ["a", "b", "c"]
    np.testing.assert_array_equal(saved.codes, CODES)
    assert saved.vectors.dtype == saved.codebooks.dtype == np.float32
    assert saved.settings == {"built": 3, "seed": 1}
    assert saved.text_scale == 0.3
    before = folder.codebooks.read_bytes()
    saved.save(folder)
    assert folder.codebooks.read_bytes() == before


def test_any_id_comes_back_as_it_was(folder: DataFolder) -> None:
    ids = ["a\0", "é\u2028", "x" * 500]
    replace(load(folder), items=ids).save(folder)
    ItemIndex.from_codes(ids, PATHS).save(folder.index)
    assert load(folder).items == ids


def change(folder: DataFolder, **sids: list[str] | None) -> None:
    raw = json.loads(folder.index.read_text()) | sids
    folder.index.write_text(json.dumps({item: sid for item, sid in raw.items() if sid}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: folder.codebooks.unlink(), r"codebooks\.npz: no such file"),
        (lambda folder: folder.codebooks.write_bytes(b""), r"codebooks\.npz: cannot be read"),
        (lambda folder: folder.codebooks.write_bytes(b"PK\x03\x04 no archive"), "cannot be read"),
        (lambda folder: np.savez(folder.codebooks, codes=CODES), "cannot be read"),
        (lambda folder: change(folder, b=["<|a_2|>", "<|b_2|>"]), "not the index that"),
        (lambda folder: change(folder, d=["<|a_2|>", "<|b_2|>"]), "not the index that"),
        (lambda folder: change(folder, c=None), "not the index that"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    folder: DataFolder, damage: Callable[[DataFolder], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(InputError, match=message) as caught:
        load(folder)
    assert "build the index again" in str(caught.value)
