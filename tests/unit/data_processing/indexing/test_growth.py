from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_processing.indexing import growth, residual_index
from data_processing.indexing.embed import EmbeddingSettings, item_text
from data_processing.indexing.growth import (
    Paths,
    add_items,
    drift,
    nearby_paths,
    nearest_codes,
    place,
    remove_items,
    restore_items,
)
from data_processing.indexing.residual_index import build_index, residual_codes, resolve_collisions
from data_processing.indexing.saved_index import (
    load_saved,
    report_files,
)
from gream_verl.core.data_folder import DataFolder, Item
from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex, retired_file

OLD, NEW = [f"i{item}" for item in range(40)], [f"n{item}" for item in range(6)]


def fake_embeddings(items: list[Item], cache: Path, settings: EmbeddingSettings, engine: str) -> np.ndarray:
    rows = [np.random.default_rng(list(item_text(item).encode())).normal(size=6) for item in items]
    return np.stack(rows).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataFolder:
    monkeypatch.setattr(residual_index, "cached_embeddings", fake_embeddings)
    monkeypatch.setattr(growth, "cached_embeddings", fake_embeddings)
    data = DataFolder(tmp_path, "toy")
    write_data(data, OLD)
    build_index(data, levels=2, codes=8)
    return data


def write_data(folder: DataFolder, items: list[str]) -> None:
    random = np.random.default_rng(0)
    folder.item.write_text(json.dumps({item: {"title": f"Film {item}"} for item in items}))
    users = {f"u{user}": [items[item] for item in random.permutation(len(items))[:12]] for user in range(30)}
    folder.inter.write_text(json.dumps(users))


def index_of(vectors: np.ndarray, levels: int, codes: int) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    found = residual_codes(vectors, levels, codes)
    return found.codebooks, resolve_collisions(found.codes)


@given(st.integers(0, 2**32 - 1), st.integers(0, 20))
@settings(max_examples=15, deadline=None)
def test_new_items_leave_the_index_as_it_is_and_two_calls_give_what_one_gives(seed: int, first: int) -> None:
    random = np.random.default_rng(seed)
    vectors = random.normal(size=(60, 4)).astype(np.float32)
    codebooks, given_paths = index_of(vectors[:40], 3, 4)
    items = [str(item) for item in range(60)]
    built = ItemIndex.from_codes(items[:40], given_paths)
    together, _ = place(vectors[40:], codebooks, Paths(built.sids.values(), 3))
    paths = Paths(built.sids.values(), 3)
    apart = place(vectors[40 : 40 + first], codebooks, paths)[0]
    grown = ItemIndex({**built.sids, **ItemIndex.from_codes(items[40 : 40 + first], apart).sids}) if first else built
    apart += place(vectors[40 + first :], codebooks, Paths(grown.sids.values(), 3))[0]
    assert apart == together
    whole = ItemIndex({**built.sids, **ItemIndex.from_codes(items[40:], together).sids})  # proves it prefix-free
    assert set(whole.tokens) == set(built.tokens)
    assert len(whole.items) == 60


def test_a_new_item_gets_its_nearest_codes_where_they_are_free() -> None:
    vectors = np.random.default_rng(0).normal(size=(40, 4)).astype(np.float32)
    codebooks, _ = index_of(vectors, 2, 8)
    placed, moved = place(vectors[:3], codebooks, Paths([], 2))
    assert moved == 0
    assert placed == [tuple(path) for path in nearest_codes(vectors[:3], codebooks).tolist()]


def test_a_taken_path_gives_way_to_the_nearest_that_is_free() -> None:
    vectors = np.random.default_rng(1).normal(size=(40, 4)).astype(np.float32)
    codebooks, _ = index_of(vectors, 2, 8)
    distances = {
        (first, last): float(((vectors[0] - codebooks[0][first] - codebooks[1][last]) ** 2).sum())
        for first in range(8)
        for last in range(8)
    }
    nearest = nearby_paths(vectors[0], codebooks, beams=8)
    assert nearest == sorted(distances, key=lambda path: distances[path])
    greedy = tuple(nearest_codes(vectors[:1], codebooks)[0].tolist())
    sid = ItemIndex.from_codes(["0"], [greedy]).sids["0"]
    assert place(vectors[:1], codebooks, Paths([sid], 2)) == ([next(path for path in nearest if path != greedy)], 1)


def test_an_item_joins_a_collision_only_while_the_model_knows_a_token_for_it() -> None:
    sids = ItemIndex.from_codes(list("abcde"), [(0, 0, 0), (0, 0, 1), (0, 0, 2), (1, 1, 0), (1, 1, 1)]).sids.values()
    paths = Paths(sids, 2)
    assert paths.take((0, 0)) is None
    assert paths.take((1, 1)) == (1, 1, 2)
    assert paths.take((1, 1)) is None
    assert paths.take((1, 0)) == (1, 0)
    assert paths.take((1, 0)) is None


def test_an_index_without_a_free_path_says_what_to_do() -> None:
    codebooks = np.random.default_rng(0).normal(size=(1, 3, 2)).astype(np.float32)
    sids = ItemIndex.from_codes(list("abc"), [(0,), (1,), (2,)]).sids.values()
    with pytest.raises(InputError, match="every path of the index is taken; build it anew"):
        place(np.zeros((1, 2), np.float32), codebooks, Paths(sids, 1))


def test_added_items_leave_every_byte_of_the_semantic_ids_that_are_there(folder: DataFolder) -> None:
    before, vectors = folder.index.read_text(), np.load(folder.embeddings)
    write_data(folder, [*NEW[:3], *OLD, *NEW[3:]])
    made = add_items(folder)
    assert made["new"] == 6
    assert folder.index.read_text().startswith(before.rstrip().removesuffix("}"))
    np.testing.assert_array_equal(np.load(folder.embeddings)[:40], vectors)
    saved = load_saved(folder)
    assert saved.items == [*OLD, *NEW]
    assert made["drift"] == drift(saved)
    assert made["drift"]["added"] == 6
    folder.read_index(folder.read_items())
    kept = {file.name: file.read_bytes() for file in folder.root.iterdir()}
    assert add_items(folder) == {"new": 0}
    assert kept == {file.name: file.read_bytes() for file in folder.root.iterdir()}


def test_a_crowd_of_equal_items_finds_free_paths_one_after_the_other() -> None:
    vectors = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    codebooks, given_paths = index_of(vectors, 3, 8)
    sids = ItemIndex.from_codes([str(item) for item in range(200)], given_paths).sids.values()
    crowd = np.repeat(vectors[:1], 150, axis=0)
    together, moved = place(crowd, codebooks, Paths(sids, 3))
    assert len(set(together)) == 150
    assert moved >= 149
    paths = Paths(sids, 3)
    assert together == [place(vector[None], codebooks, paths)[0][0] for vector in crowd]


def test_the_collaborative_part_of_new_items_has_the_weight_of_the_index(folder: DataFolder) -> None:
    build_index(folder, levels=2, codes=8, collaborative_weight=0.5)
    write_data(folder, [*OLD, *NEW])
    add_items(folder)
    lengths = np.linalg.norm(load_saved(folder).vectors[40:, -64:], axis=1)
    assert set(np.round(lengths, 4).tolist()) <= {0.0, 0.5}
    assert lengths.max() > 0


def test_new_items_are_seen_in_the_frame_of_the_old(folder: DataFolder) -> None:
    saved = load_saved(folder)
    write_data(folder, [*OLD, "n0"])
    items = folder.read_items()
    text = fake_embeddings([items["n0"]], folder.root, EmbeddingSettings(), "local")
    add_items(folder)
    expected = (text - saved.text_mean) / saved.text_scale
    np.testing.assert_allclose(load_saved(folder).vectors[40:, :6], expected, rtol=1e-5)
    assert not list(folder.root.glob("*new-text-emb*"))


def test_a_new_item_is_placed_by_what_it_is_taken_with(folder: DataFolder) -> None:
    write_data(folder, [*OLD, *NEW])
    users = json.loads(folder.inter.read_text())
    users["x"] = ["n0", "i7", "i7", "i7", "i1", "i2"]
    folder.inter.write_text(json.dumps(users))
    add_items(folder)
    saved = load_saved(folder)
    collaborative = saved.vectors[:, -64:]
    lengths = np.linalg.norm(collaborative[40:], axis=1)
    assert set(np.round(lengths, 5).tolist()) <= {0.0, 1.0}
    assert lengths[0] == pytest.approx(1)


class KilledError(Exception):
    """What stands for a kill."""


def stop_at(monkeypatch: pytest.MonkeyPatch, write: int) -> None:
    """Stop at the write of that number, from 0: nothing of it takes place."""
    real, count = Path.replace, itertools.count()

    def replace_or_stop(self: Path, target: Path) -> Path:
        if next(count) == write:
            raise KilledError
        return real(self, target)

    monkeypatch.setattr(Path, "replace", replace_or_stop)


@pytest.mark.parametrize("write", range(5))
def test_a_stopped_addition_changes_nothing_and_is_made_up_for(
    folder: DataFolder, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    index = folder.index.read_bytes()
    write_data(folder, [*OLD, *NEW[:2]])
    with monkeypatch.context() as patch:
        stop_at(patch, write)
        if write < 4:
            with pytest.raises(KilledError):
                add_items(folder)
            assert folder.index.read_bytes() == index
            assert load_saved(folder).items == OLD
        else:
            add_items(folder)
    write_data(folder, [*OLD, *NEW])  # what is added then is something else
    with monkeypatch.context() as patch:
        stop_at(patch, 1)
        with pytest.raises(KilledError):
            add_items(folder)
    add_items(folder)
    assert load_saved(folder).items == [*OLD, *NEW]


@pytest.mark.parametrize("write", range(2))
@pytest.mark.parametrize("change", [remove_items, restore_items])
def test_a_stopped_removal_or_return_can_be_made_again(
    folder: DataFolder, monkeypatch: pytest.MonkeyPatch, write: int, change: Callable[..., None]
) -> None:
    sids = dict(ItemIndex.load(folder.index).sids)
    remove_items(folder, ["i3"])
    if change is remove_items:
        restore_items(folder, ["i3"])
    with monkeypatch.context() as patch:
        stop_at(patch, write)
        with pytest.raises(KilledError):
            change(folder, ["i3"])
    assert ItemIndex.load(folder.index).readable == sids
    load_saved(folder)


def test_a_removed_item_keeps_its_semantic_id_for_its_return(folder: DataFolder) -> None:
    sids = dict(ItemIndex.load(folder.index).sids)
    remove_items(folder, ["i3", "i5"])
    assert list(ItemIndex.load(folder.index).sids) == [item for item in OLD if item not in ("i3", "i5")]
    assert ItemIndex.load(folder.index).retired == {item: sids[item] for item in ("i3", "i5")}
    write_data(folder, [*OLD, *NEW])
    add_items(folder)
    grown = ItemIndex.load(folder.index).sids
    assert not {"i3", "i5"} & set(grown)
    assert not {sids["i3"], sids["i5"]} & set(grown.values())
    load_saved(folder)
    restore_items(folder, ["i5"])
    assert ItemIndex.load(folder.index).sids["i5"] == sids["i5"]
    assert list(ItemIndex.load(folder.index).retired) == ["i3"]
    remove_items(folder, ["i7"])
    assert list(ItemIndex.load(folder.index).retired) == ["i3", "i7"]
    restore_items(folder, ["i3", "i7"])
    assert ItemIndex.load(folder.index).retired == {}


def test_only_what_is_there_can_be_removed_or_restored(folder: DataFolder) -> None:
    with pytest.raises(InputError, match="no item 'i444'; check the id, and whether it is retired already"):
        remove_items(folder, ["i444"])
    with pytest.raises(InputError, match="no item would be left"):
        remove_items(folder, OLD)
    with pytest.raises(InputError, match="no item 'i4'"):
        restore_items(folder, ["i4"])
    assert not retired_file(folder.index).exists()


def test_a_new_build_forgets_what_was_retired(folder: DataFolder) -> None:
    remove_items(folder, ["i3"])
    build_index(folder, levels=2, codes=8)
    assert "i3" in ItemIndex.load(folder.index).sids
    assert not retired_file(folder.index).exists()


def test_items_unlike_those_it_was_built_from_call_for_a_new_index(
    folder: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert drift(load_saved(folder))["rebuild"] == []
    write_data(folder, [*OLD, *(f"n{item}" for item in range(15))])

    def far_when_new(items: list[Item], *rest: object) -> np.ndarray:
        scale = [9 if item.title.startswith("Film n") else 1 for item in items]
        return np.array(scale)[:, None] * fake_embeddings(items, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(growth, "cached_embeddings", far_when_new)
    monkeypatch.setattr(growth, "REBUILD_ITEMS", 40)
    reasons = add_items(folder)["drift"]["rebuild"]
    assert any("times as far from their codes" in reason for reason in reasons)
    assert any("38% as many items were added" in reason for reason in reasons)


@pytest.mark.parametrize(
    "changed", [lambda *given: fake_embeddings(*given)[:, :5], lambda *given: fake_embeddings(*given)[:, ::-1]]
)
def test_another_embedding_model_is_refused(
    folder: DataFolder, monkeypatch: pytest.MonkeyPatch, changed: Callable[..., np.ndarray]
) -> None:
    write_data(folder, [*OLD, *NEW])
    before = folder.index.read_bytes()
    monkeypatch.setattr(growth, "cached_embeddings", changed)
    with pytest.raises(InputError, match="no longer gives the vectors that toy"):
        add_items(folder)
    assert folder.index.read_bytes() == before


def test_new_texts_of_a_few_items_are_no_new_model(folder: DataFolder) -> None:
    write_data(folder, [*OLD, *NEW])
    items = json.loads(folder.item.read_text())
    items["i1"]["title"] = "another text"
    folder.item.write_text(json.dumps(items))
    assert add_items(folder)["new"] == 6


def test_a_report_of_the_index_as_it_was_does_not_stay(folder: DataFolder) -> None:
    for change in (
        lambda: remove_items(folder, ["i1"]),
        lambda: restore_items(folder, ["i1"]),
        lambda: add_items(folder),
    ):
        write_data(folder, [*OLD, *NEW])
        for file in report_files(folder):
            file.write_text("{}")
        change()
        assert not any(file.exists() for file in report_files(folder))
