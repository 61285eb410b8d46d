from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import data_processing.indexing.residual_index as residual_index
from data_processing.indexing.balanced_kmeans import size_bounds
from data_processing.indexing.residual_index import (
    build_index,
    default_shape,
    index_vectors,
    residual_codes,
    resolve_collisions,
)
from data_processing.layout import DataFolder
from gream_verl.files import InputError
from gream_verl.semantic_ids import ItemIndex


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


def fake_embeddings(texts: list[str], cache: Path, model: object = None) -> np.ndarray:
    rows = [np.random.default_rng(list(text.encode())).normal(size=6) for text in texts]
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
