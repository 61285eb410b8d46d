from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_processing.indexing.saved_index import SavedIndex, changing, codebooks_file, load_saved
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex, retired_file

CODES = np.array([[0, 1], [1, 0], [0, 1]], np.int32)


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    data = DataFolder(tmp_path, "toy")
    random = np.random.default_rng(0)
    vectors, codebooks = random.normal(size=(3, 4)).astype("f4"), random.normal(size=(2, 2, 4)).astype("f4")
    saved = SavedIndex(["a", "b", "c"], vectors, CODES, codebooks, vectors.mean(axis=0), 0.3, {"built": 3, "seed": 1})
    saved.save(data)
    ItemIndex.from_codes(saved.items, [(0, 1, 0), (1, 0), (0, 1, 1)]).save(data.index)
    return data


def rewrite(folder: DataFolder, **parts: object) -> None:
    with np.load(codebooks_file(folder)) as stored:
        kept = {name: stored[name] for name in stored.files}
    np.savez(codebooks_file(folder), **{**kept, **parts})  # type: ignore[arg-type]


def test_what_is_saved_is_what_is_loaded(folder: DataFolder) -> None:
    saved = load_saved(folder)
    assert saved.items == ["a", "b", "c"]
    np.testing.assert_array_equal(saved.codes, CODES)
    assert saved.vectors.dtype == saved.codebooks.dtype == np.float32
    assert saved.settings == {"built": 3, "seed": 1}
    assert saved.text_scale == 0.3
    files = folder.embeddings, codebooks_file(folder)
    before = [file.read_bytes() for file in files]
    saved.save(folder)
    assert before == [file.read_bytes() for file in files]


def test_other_vectors_are_refused(folder: DataFolder) -> None:
    np.save(folder.embeddings, np.load(folder.embeddings) + 1)
    with pytest.raises(InputError, match=r"emb\.npy: not the vectors that toy\.codebooks\.npz was made from; build"):
        load_saved(folder)


@pytest.mark.parametrize("missing", ["codebooks.npz", "emb.npy", "index.json"])
def test_a_missing_file_is_named(folder: DataFolder, missing: str) -> None:
    (folder.root / f"toy.{missing}").unlink()
    with pytest.raises(InputError, match=missing):
        load_saved(folder)


@pytest.mark.parametrize("broken", [b"", b"PK\x03\x04 no archive", b"\x93NUMPY"])
def test_a_broken_file_is_named(folder: DataFolder, broken: bytes) -> None:
    codebooks_file(folder).write_bytes(broken)
    with pytest.raises(InputError, match=r"codebooks\.npz: cannot be read"):
        load_saved(folder)


def test_a_file_of_an_earlier_version_is_refused(folder: DataFolder) -> None:
    np.savez(codebooks_file(folder), codes=CODES, codebooks=np.zeros((2, 2, 4)))
    with pytest.raises(InputError, match=r"codebooks\.npz: was made by an earlier version; build the index anew"):
        load_saved(folder)


@pytest.mark.parametrize("part", ["codes", "codebooks", "text_mean", "text_scale", "settings", "items"])
def test_a_changed_part_is_refused(folder: DataFolder, part: str) -> None:
    with np.load(codebooks_file(folder)) as stored:
        changed = np.roll(stored[part], 1)
    rewrite(folder, **{part: changed if part not in ("items", "settings", "text_scale") else as_text(part)})
    with pytest.raises(InputError, match=r"emb\.npy: not the vectors that toy\.codebooks\.npz was made from"):
        load_saved(folder)


def as_text(part: str) -> np.ndarray:
    changed = {"items": b'["a", "c", "b"]', "settings": b'{"built": 2}'}
    return np.frombuffer(changed[part], np.uint8) if part in changed else np.array([0.4])


def test_an_index_with_other_codes_is_refused(folder: DataFolder) -> None:
    raw = json.loads(folder.index.read_text())
    folder.index.write_text(json.dumps({**raw, "b": ["<|a_2|>", "<|b_2|>"]}))
    with pytest.raises(InputError, match=r"item 'b' has the SID <\|a_2\|><\|b_2\|>, but codes \[1, 0\]"):
        load_saved(folder)


def test_any_id_comes_back_as_it_was(folder: DataFolder) -> None:
    saved = load_saved(folder)
    ids = ["a\0", "é\u2028", "x" * 500]
    replace(saved, items=ids).save(folder)
    ItemIndex.from_codes(ids, [(0, 1, 0), (1, 0), (0, 1, 1)]).save(folder.index)
    assert load_saved(folder).items == ids


def test_two_commands_do_not_change_an_index_at_once(folder: DataFolder) -> None:
    again = pytest.raises(InputError, match=r"toy\.index\.json: another command is changing it")
    with changing(folder), again, changing(folder):
        pass
    with changing(folder):
        pass


def test_items_that_were_not_built_from_anything_are_refused(folder: DataFolder) -> None:
    raw = json.loads(folder.index.read_text())
    folder.index.write_text(json.dumps({**raw, "d": ["<|a_2|>", "<|b_2|>"]}))
    with pytest.raises(InputError, match="item 'd' is not in toy"):
        load_saved(folder)


def test_a_built_item_may_be_retired_but_not_vanish(folder: DataFolder) -> None:
    raw = json.loads(folder.index.read_text())
    gone = {"b": raw.pop("b")}
    folder.index.write_text(json.dumps(raw))
    with pytest.raises(
        InputError, match=r"item 'b' of toy\.codebooks\.npz is missing; take items out by `gream index remove`"
    ):
        load_saved(folder)
    retired_file(folder.index).write_text(json.dumps(gone))
    assert load_saved(folder).items == ["a", "b", "c"]
