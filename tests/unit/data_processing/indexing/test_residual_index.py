from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import data_processing.indexing.residual_index as residual_index
from data_processing.indexing.balanced_kmeans import size_bounds
from data_processing.indexing.diagnostics import prefix_numbers
from data_processing.indexing.embed import EmbeddingSettings, item_text
from data_processing.indexing.residual_index import (
    build_index,
    default_shape,
    index_vectors,
    residual_codes,
    resolve_collisions,
)
from gream_verl.core.data_folder import DataFolder, Item
from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex, retired_file


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataFolder:
    random = np.random.default_rng(0)
    items = {str(item): {"title": f"Film {item}", "categories": [f"Genre {item % 3}"]} for item in range(40)}
    users = {f"u{user}": [str(item) for item in random.permutation(40)[:12]] for user in range(30)}
    data = DataFolder(tmp_path, "toy")
    data.item.write_text(json.dumps(items))
    data.inter.write_text(json.dumps(users))
    monkeypatch.setattr(residual_index, "cached_embeddings", fake_embeddings)
    return data


def fake_embeddings(items: list[Item], cache: Path, settings: EmbeddingSettings, engine: str) -> np.ndarray:
    rows = [np.random.default_rng(list(item_text(item).encode())).normal(size=6) for item in items]
    return np.stack(rows).astype(np.float32)


@given(arrays(np.int64, st.tuples(st.integers(1, 30), st.integers(1, 3)), elements=st.integers(0, 2)))
@settings(deadline=None)
def test_resolved_paths_are_unique_and_no_path_is_a_prefix_of_another(codes: np.ndarray) -> None:
    paths = resolve_collisions(codes)
    index = ItemIndex.from_codes([str(item) for item in range(len(codes))], paths)
    assert len(index.items) == len(codes)
    assert [path[: codes.shape[1]] for path in paths] == [tuple(row) for row in codes.tolist()]
    groups = [paths[item] for item in range(len(codes)) if (codes == codes[item]).all(axis=1).sum() > 1]
    assert all(len(path) == codes.shape[1] + 1 for path in groups)


def test_residuals_shrink_level_by_level_and_every_level_is_balanced() -> None:
    vectors = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    codes, codebooks = residual_codes(vectors, 3, 16)
    assert codes.shape == (300, 3)
    assert codebooks.shape == (3, 16, 8)
    lower, upper = size_bounds(300, 16)
    residual, lengths = vectors, [float((vectors**2).sum())]
    for level in range(3):
        sizes = np.bincount(codes[:, level], minlength=16)
        assert lower <= sizes.min() <= sizes.max() <= upper
        residual = residual - codebooks[level][codes[:, level]]
        lengths.append(float((residual**2).sum()))
    assert lengths == sorted(lengths, reverse=True)


def test_a_unique_last_level_leaves_no_collision_and_keeps_the_bounds() -> None:
    vectors = np.random.default_rng(0).normal(size=(300, 8)).astype(np.float32)
    met, _ = residual_codes(vectors, 2, 24)
    codes, codebooks = residual_codes(vectors, 2, 24, unique=True)
    assert len({*map(tuple, met.tolist())}) < 300
    assert len({*map(tuple, codes.tolist())}) == 300
    np.testing.assert_array_equal(codes[:, 0], met[:, 0])
    lower, upper = size_bounds(300, 24)
    sizes = np.bincount(codes[:, 1], minlength=24)
    assert lower <= sizes.min() <= sizes.max() <= upper
    residual = vectors - codebooks[0][codes[:, 0]]
    for code in range(24):
        np.testing.assert_allclose(codebooks[1][code], residual[codes[:, 1] == code].mean(axis=0), atol=1e-5)


def test_too_many_items_on_one_path_are_refused_with_the_setting_to_raise() -> None:
    codes = np.array([[0, 1], [0, 1], [0, 1], [1, 1]])
    assert resolve_collisions(codes, 3)[2] == (0, 1, 2)
    with pytest.raises(InputError, match=r"3 items share one path .* 2 collision tokens; raise --collision-tokens"):
        resolve_collisions(codes, 2)


@given(arrays(np.int64, st.tuples(st.integers(1, 30), st.integers(1, 3)), elements=st.integers(0, 3)))
@settings(deadline=None)
def test_rows_are_in_one_group_exactly_when_their_codes_are_equal(codes: np.ndarray) -> None:
    groups = prefix_numbers(codes)[-1]
    assert sorted(set(groups.tolist())) == list(range(groups.max() + 1))
    for row, other in itertools.combinations(range(len(codes)), 2):
        assert (groups[row] == groups[other]) == (codes[row] == codes[other]).all()


def test_the_shape_follows_the_catalogue() -> None:
    assert default_shape(1349) == (3, 32)
    assert default_shape(12_101) == (4, 256)
    for items in range(1, 20_000, 37):
        levels, codes = default_shape(items)
        assert 1 <= codes <= items
        assert codes**levels >= items


def test_text_is_centred_and_scaled_to_the_collaborative_part() -> None:
    random = np.random.default_rng(0)
    text, collaborative = random.normal(3, 5, (50, 4)), random.normal(size=(50, 2))
    vectors = index_vectors(text, collaborative, 0.5)
    np.testing.assert_allclose(vectors[:, :4].mean(axis=0), 0, atol=1e-5)
    assert (vectors[:, :4] ** 2).sum(axis=1).mean() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(vectors[:, 4:], 0.5 * collaborative, rtol=1e-5)
    assert index_vectors(text, collaborative, 0).shape == (50, 4)
    assert np.isfinite(index_vectors(np.ones((3, 2)), np.zeros((3, 1)))).all()


@pytest.mark.parametrize(("text", "collaborative"), [((5,), (5, 2)), ((5, 2), (4, 2))])
def test_vectors_of_the_wrong_shape_are_refused(text: tuple[int, ...], collaborative: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected \\[items, dimensions\\] twice"):
        index_vectors(np.zeros(text), np.zeros(collaborative))


def test_a_built_index_loads_again_and_twice_built_is_the_same_bytes(folder: DataFolder) -> None:
    report = build_index(folder, levels=2, codes=5, seed=1)
    index = folder.read_index(folder.read_items())
    assert index.base_levels == 2
    assert len(index) == 40
    assert report["balance"][0]["min"] >= 7
    assert report["balance"][0]["max"] <= 9
    assert np.load(folder.embeddings).shape == (40, 6 + 64)
    names = ["index.json", "emb.npy", "codebooks.npz", "index-report.json"]
    first = {name: (folder.root / f"toy.{name}").read_bytes() for name in names}
    build_index(folder, levels=2, codes=5, seed=1)
    assert first == {name: (folder.root / f"toy.{name}").read_bytes() for name in names}


def test_saved_codebooks_lead_to_the_saved_index(folder: DataFolder) -> None:
    build_index(folder, levels=2, codes=5)
    with np.load(folder.root / "toy.codebooks.npz") as stored:
        residual = np.load(folder.embeddings) - stored["codebooks"][0][stored["codes"][:, 0]]
        paths = resolve_collisions(stored["codes"])
    assert ItemIndex.from_codes(list(folder.read_items()), paths).sids == ItemIndex.load(folder.index).sids
    assert (residual**2).sum() < (np.load(folder.embeddings) ** 2).sum()


def test_a_unique_index_has_no_collision_token_and_says_so(folder: DataFolder) -> None:
    report = build_index(folder, levels=2, codes=7, unique=True)
    assert report["settings"]["unique"]
    assert report["collisions"]["items"] == 0
    assert {len(sid) for sid in ItemIndex.load(folder.index).sids.values()} == {2}


def test_an_index_that_cannot_be_unique_is_refused_with_the_setting_to_raise(folder: DataFolder) -> None:
    with pytest.raises(InputError, match="raise --levels or --codes, or do without --unique"):
        build_index(folder, levels=1, codes=5, unique=True)
    assert not folder.index.exists()


def test_held_out_interactions_do_not_reach_the_index(folder: DataFolder) -> None:
    build_index(folder, levels=2, codes=5)
    before = folder.index.read_bytes()
    users = json.loads(folder.inter.read_text())
    folder.inter.write_text(json.dumps({user: [*taken[:-2], "0", "1"] for user, taken in users.items()}))
    build_index(folder, levels=2, codes=5)
    assert folder.index.read_bytes() == before


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"codes": 41}, "40 items cannot use 41 codes a level"),
        ({"codes": 0}, "cannot use 0 codes"),
        ({"levels": 0}, "0 levels"),
        ({"levels": 26}, "26 levels"),
    ],
)
def test_shapes_that_the_catalogue_cannot_fill_are_refused(
    folder: DataFolder, shape: dict[str, int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build_index(folder, **shape)
    assert not folder.index.exists()


def test_an_item_without_text_is_refused_by_name(folder: DataFolder) -> None:
    items = json.loads(folder.item.read_text())
    items["7"]["title"] = " "
    folder.item.write_text(json.dumps(items))
    with pytest.raises(InputError, match="item '7' has no title"):
        build_index(folder)


def test_a_failed_build_leaves_the_earlier_index(folder: DataFolder) -> None:
    build_index(folder, levels=2, codes=5)
    before = folder.index.read_bytes()
    with pytest.raises(InputError):
        build_index(folder, codes=1000)
    assert folder.index.read_bytes() == before


@pytest.mark.parametrize("write", range(4))
def test_a_stopped_build_does_not_give_a_retired_sid_away(
    folder: DataFolder, monkeypatch: pytest.MonkeyPatch, write: int
) -> None:
    build_index(folder, levels=2, codes=5)
    retired = retired_file(folder.index)
    retired.write_text(json.dumps({"gone": ["<|a_1|>", "<|b_1|>", "<|c_9|>"]}))
    real, count = Path.replace, itertools.count()

    def replace_or_stop(self: Path, target: Path) -> Path:
        if next(count) == write:
            raise KeyboardInterrupt
        return real(self, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", replace_or_stop)
        build_index(folder, levels=2, codes=4)
    assert retired.exists() == (write < 3)


def test_collision_tokens_bound_the_items_of_a_path(folder: DataFolder) -> None:
    with pytest.raises(InputError, match="2 collision tokens; raise --collision-tokens"):
        build_index(folder, levels=1, codes=10, collision_tokens=2)
    assert not folder.index.exists()


def test_vectors_that_cannot_be_clustered_are_refused_without_a_false_remedy(
    folder: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residual_index, "cached_embeddings", lambda *given: np.full((40, 6), np.nan, np.float32))
    with pytest.raises(InputError, match=r"not finite; embed the items anew$"):
        build_index(folder, levels=2, codes=5)
