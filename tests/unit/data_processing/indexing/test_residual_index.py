from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from index_data import fake_embeddings

import data_processing.indexing.residual_index as residual_index
from data_processing.indexing.balanced_kmeans import size_bounds
from data_processing.indexing.residual_index import (
    IndexSettings,
    build_index,
    default_shape,
    residual_codes,
    resolve_collisions,
)
from data_processing.indexing.saved_index import load_saved
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataFolder:
    random = np.random.default_rng(0)
    items = {str(item): {"title": f"Film {item}"} for item in range(40)}
    users = {f"u{user}": [str(item) for item in random.permutation(40)[:12]] for user in range(30)}
    data = DataFolder(tmp_path, "toy")
    data.item.write_text(json.dumps(items))
    data.inter.write_text(json.dumps(users))
    monkeypatch.setattr(residual_index, "cached_embeddings", lambda folder, *given: fake_embeddings(*given))
    return data


@given(arrays(np.int64, st.tuples(st.integers(1, 30), st.integers(1, 3)), elements=st.integers(0, 2)))
@settings(max_examples=25, deadline=None)
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


def test_the_shape_follows_the_catalogue() -> None:
    for items in (*range(1, 99), *range(99, 20_000, 997)):
        levels, codes = default_shape(items)
        assert 1 <= codes <= items
        assert codes**levels >= items


def test_text_is_centred_and_scaled_to_the_collaborative_part(folder: DataFolder) -> None:
    build_index(folder, IndexSettings(levels=2, codes=5, collaborative_weight=0.5))
    vectors = load_saved(folder, ItemIndex.load(folder.index)).vectors
    assert vectors.shape == (40, 6 + 64)
    np.testing.assert_allclose(vectors[:, :6].mean(axis=0), 0, atol=1e-5)
    assert (vectors[:, :6] ** 2).sum(axis=1).mean() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors[:, 6:], axis=1), 0.5, rtol=1e-5)
    build_index(folder, IndexSettings(levels=2, codes=5, collaborative_weight=0))
    assert load_saved(folder, ItemIndex.load(folder.index)).vectors.shape == (40, 6)


def test_a_built_index_loads_again_and_twice_built_is_the_same_bytes(folder: DataFolder) -> None:
    settings = IndexSettings(levels=2, codes=5, seed=1)
    build_index(folder, settings)
    index = folder.read_index(folder.read_items())
    assert (index.base_levels, len(index)) == (2, 40)
    files = [folder.index, folder.root / "toy.codebooks.npz"]
    first = [file.read_bytes() for file in files]
    build_index(folder, settings)
    assert first == [file.read_bytes() for file in files]
    saved = load_saved(folder, index)
    assert {**saved.settings, "embedding": None} == {
        "levels": 2, "codes": 5, "seed": 1, "collaborative_weight": 1.0, "unique": False, "built": 40, "embedding": None
    }  # fmt: skip
    assert ItemIndex.from_codes(saved.items, resolve_collisions(saved.codes)).sids == index.sids


def test_a_unique_index_has_no_collision_token(folder: DataFolder) -> None:
    index = build_index(folder, IndexSettings(levels=2, codes=7, unique=True))
    assert {len(sid) for sid in index.sids.values()} == {2}


def test_items_can_be_left_out(folder: DataFolder) -> None:
    index = build_index(folder, IndexSettings(levels=2, codes=5), without={"3", "17"})
    assert list(index.sids) == [str(item) for item in range(40) if item not in (3, 17)]
    with pytest.raises(InputError, match="holds no item '99' that could be left out"):
        build_index(folder, without=["99"])


def test_held_out_interactions_do_not_reach_the_index(folder: DataFolder) -> None:
    build_index(folder, IndexSettings(levels=2, codes=5))
    before = folder.index.read_bytes()
    users = json.loads(folder.inter.read_text())
    folder.inter.write_text(json.dumps({user: [*taken[:-2], "0", "1"] for user, taken in users.items()}))
    build_index(folder, IndexSettings(levels=2, codes=5))
    assert folder.index.read_bytes() == before


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"codes": 41}, "40 items cannot use 41 codes per level; lower --codes"),
        ({"levels": 26}, "26 levels: ask for at most 25"),
        (
            {"levels": 1, "codes": 5, "unique": True},
            "40 items cannot be kept apart by 5 codes of a level; raise --levels or --codes",
        ),
        (
            {"levels": 1, "codes": 6},
            "7 items share one path, and there are 6 collision tokens; raise --levels or --codes",
        ),
    ],
)
def test_settings_that_the_catalogue_cannot_fill_leave_the_earlier_index(
    folder: DataFolder, wrong: dict[str, int], message: str
) -> None:
    build_index(folder, IndexSettings(levels=2, codes=5))
    before = folder.index.read_bytes()
    with pytest.raises(InputError, match=message):
        build_index(folder, IndexSettings(**wrong))
    assert folder.index.read_bytes() == before
