from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from index_data import fake_embeddings

from data_processing.indexing import growth, residual_index
from data_processing.indexing.embed import EmbeddingSettings
from data_processing.indexing.growth import add_items, choose_paths, drift, nearby_paths, nearest_codes
from data_processing.indexing.residual_index import IndexSettings, build_index, residual_codes, resolve_collisions
from data_processing.indexing.saved_index import SavedIndex, load_saved
from gream_verl.core.data_folder import DataFolder, Item
from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex

OLD, NEW = [f"i{item}" for item in range(40)], [f"n{item}" for item in range(6)]
SHAPE = IndexSettings(levels=2, codes=8)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataFolder:
    monkeypatch.setattr(residual_index, "cached_embeddings", lambda folder, *given: fake_embeddings(*given))
    monkeypatch.setattr(growth, "embed_items", fake_embeddings)
    data = DataFolder(tmp_path, "toy")
    write_data(data, OLD)
    build_index(data, SHAPE)
    return data


def write_data(folder: DataFolder, items: list[str]) -> None:
    random = np.random.default_rng(0)
    folder.item.write_text(json.dumps({item: {"title": f"Film {item}"} for item in items}))
    users = {f"u{user}": [items[item] for item in random.permutation(len(items))[:12]] for user in range(30)}
    folder.inter.write_text(json.dumps(users))


def load(folder: DataFolder) -> SavedIndex:
    return load_saved(folder, ItemIndex.load(folder.index))


@given(st.integers(0, 2**32 - 1), st.integers(0, 20))
@settings(max_examples=5, deadline=None)
def test_new_items_leave_the_index_as_it_is_and_two_calls_give_what_one_gives(seed: int, first: int) -> None:
    vectors = np.random.default_rng(seed).normal(size=(60, 4)).astype(np.float32)
    codes, codebooks = residual_codes(vectors[:40], 3, 4)
    items = [str(item) for item in range(60)]
    built = ItemIndex.from_codes(items[:40], resolve_collisions(codes))
    together = choose_paths(vectors[40:], codebooks, codes)
    apart = choose_paths(vectors[40 : 40 + first], codebooks, codes)
    grown = np.array([*codes.tolist(), *(path[:3] for path in apart)])
    apart += choose_paths(vectors[40 + first :], codebooks, grown)
    assert apart == together
    whole = ItemIndex({**built.sids, **ItemIndex.from_codes(items[40:], together).sids})  # proves it prefix-free
    assert set(whole.tokens) == set(built.tokens)
    assert len(whole.items) == 60


def test_a_taken_path_gives_way_to_the_nearest_that_is_free() -> None:
    vectors = np.random.default_rng(1).normal(size=(40, 4)).astype(np.float32)
    _, codebooks = residual_codes(vectors, 2, 8)
    distances = {
        (first, last): float(((vectors[0] - codebooks[0][first] - codebooks[1][last]) ** 2).sum())
        for first in range(8)
        for last in range(8)
    }
    nearest = nearby_paths(vectors[0], codebooks, beams=8)
    assert nearest == sorted(distances, key=lambda path: distances[path])
    greedy = nearest_codes(vectors[:1], codebooks)
    assert choose_paths(vectors[:1], codebooks, 7 - greedy) == [tuple(greedy[0].tolist())]
    free = next(path for path in nearest if path != tuple(greedy[0].tolist()))
    assert choose_paths(vectors[:1], codebooks, greedy) == [free]


def test_an_item_joins_a_collision_only_while_the_model_knows_a_token_for_it() -> None:
    codebooks = np.array([[[0.0], [10.0]], [[0.0], [1.0]]], np.float32)
    taken = np.array([(0, 0), (0, 0), (0, 0), (1, 1), (1, 1)])  # three collision tokens are known
    found = choose_paths(np.array([[11.0], [11.0], [0.0]], np.float32), codebooks, taken)
    assert found == [(1, 1, 2), (1, 0), (0, 1)]


def test_an_index_without_a_free_path_says_what_to_do() -> None:
    codebooks = np.random.default_rng(0).normal(size=(1, 3, 2)).astype(np.float32)
    with pytest.raises(InputError, match="every path of the index is taken; build it again"):
        choose_paths(np.zeros((1, 2), np.float32), codebooks, np.array([[0], [1], [2]]))


def test_a_crowd_of_equal_items_finds_free_paths_one_after_the_other() -> None:
    vectors = np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32)
    codes, codebooks = residual_codes(vectors, 3, 8)
    assert len(set(choose_paths(np.repeat(vectors[:1], 60, axis=0), codebooks, codes))) == 60


def test_added_items_leave_every_byte_of_the_semantic_ids_that_are_there(folder: DataFolder) -> None:
    before, saved = folder.index.read_text(), load(folder)
    write_data(folder, [*NEW[:3], *OLD, *NEW[3:]])
    with pytest.raises(InputError, match="holds no item 'n50'"):
        add_items(folder, without=["n5", "n50"])
    made = add_items(folder, without=["n5"])
    assert (made["new"], made["added"], made["built"]) == (5, 5, 40)
    assert folder.index.read_text().startswith(before.rstrip().removesuffix("}"))
    grown = load(folder)
    np.testing.assert_array_equal(grown.vectors[:40], saved.vectors)
    assert grown.items == [*OLD, *NEW[:5]]
    assert add_items(folder)["added"] == 6
    kept = {file.name: file.read_bytes() for file in folder.root.iterdir()}
    assert add_items(folder) == {"new": 0}
    assert kept == {file.name: file.read_bytes() for file in folder.root.iterdir()}


def test_a_new_item_has_the_scale_of_the_old_and_the_weight_of_what_it_is_taken_with(folder: DataFolder) -> None:
    build_index(folder, IndexSettings(levels=2, codes=8, collaborative_weight=0.5))
    saved = load(folder)
    write_data(folder, [*OLD, *NEW])
    add_items(folder)
    vectors = load(folder).vectors[40:]
    text = fake_embeddings([folder.read_items()[item] for item in NEW])
    np.testing.assert_allclose(vectors[:, :6], (text - saved.text_mean) / saved.text_scale, rtol=1e-4, atol=1e-6)
    lengths = np.linalg.norm(vectors[:, 6:], axis=1)
    assert set(np.round(lengths, 4).tolist()) <= {0.0, 0.5}
    assert lengths.max() > 0


@pytest.mark.parametrize("write", range(2))
def test_a_stopped_addition_changes_nothing_and_can_be_made_again(
    folder: DataFolder, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    index, real, count = folder.index.read_bytes(), Path.replace, itertools.count()

    def replace_or_stop(self: Path, target: Path) -> Path:
        if next(count) == write:
            raise KeyboardInterrupt
        return real(self, target)

    write_data(folder, [*OLD, *NEW[:2]])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", replace_or_stop)
        add_items(folder)
    assert folder.index.read_bytes() == index
    assert load(folder).items == OLD
    write_data(folder, [*OLD, *NEW])  # other items are added than those of the stopped call
    add_items(folder)
    assert load(folder).items == [*OLD, *NEW]


def test_items_unlike_those_it_was_built_from_call_for_a_new_index(
    folder: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert drift(load(folder))["rebuild"] == []
    write_data(folder, [*OLD, *(f"n{item}" for item in range(15))])

    def far_when_new(items: list[Item], *rest: object) -> np.ndarray:
        scale = [9 if item.title.startswith("Film n") else 1 for item in items]
        return np.array(scale)[:, None] * fake_embeddings(items)

    monkeypatch.setattr(growth, "embed_items", far_when_new)
    monkeypatch.setattr(growth, "MANY_ITEMS", 40)
    reasons = add_items(folder)["rebuild"]
    assert any("times as far from their codes" in reason for reason in reasons)
    assert any("38% as many items were added" in reason for reason in reasons)


@pytest.mark.parametrize("changed", [lambda vectors: vectors[:, :5], lambda vectors: vectors[:, ::-1]])
def test_another_embedding_model_is_refused(
    folder: DataFolder, monkeypatch: pytest.MonkeyPatch, changed: Callable[[np.ndarray], np.ndarray]
) -> None:
    write_data(folder, [*OLD, *NEW])
    before = folder.index.read_bytes()
    monkeypatch.setattr(growth, "embed_items", lambda *given: changed(fake_embeddings(*given)))
    with pytest.raises(InputError, match="gives other vectors than at the build"):
        add_items(folder)
    assert folder.index.read_bytes() == before


def test_an_index_embedded_on_several_devices_grows_on_one(folder: DataFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    build_index(folder, IndexSettings(levels=2, codes=8, embedding=EmbeddingSettings(devices=("cuda:0", "cuda:7"))))
    write_data(folder, [*OLD, *NEW])
    used = []
    monkeypatch.setattr(growth, "embed_items", lambda items, asked: used.append(asked) or fake_embeddings(items))
    assert add_items(folder)["new"] == 6
    assert used == [EmbeddingSettings()]


def test_new_texts_of_a_few_items_are_no_new_model(folder: DataFolder) -> None:
    write_data(folder, [*OLD, *NEW])
    items = json.loads(folder.item.read_text())
    items["i1"]["title"] = "another text"
    folder.item.write_text(json.dumps(items))
    assert add_items(folder)["new"] == 6
