from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from rich.console import Console

from data_processing.indexing import diagnostics
from data_processing.indexing.diagnostics import (
    collisions,
    distortion,
    level_balance,
    neighbour_sharing,
    prefix_numbers,
    report_index,
    report_table,
)
from data_processing.indexing.saved_index import SavedIndex
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex


def shared_depth(left: np.ndarray, right: np.ndarray) -> int:
    return next((depth for depth, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), len(left))


def test_balance_is_one_when_even_and_lower_when_not() -> None:
    assert level_balance(np.array([0, 1, 2, 3]), 4) == {"used": 4, "min": 1, "max": 1, "entropy": 1.0}
    uneven = level_balance(np.array([0, 0, 0, 1]), 4)
    assert (uneven["used"], uneven["min"], uneven["max"]) == (2, 0, 3)
    assert uneven["entropy"] == pytest.approx(-(0.75 * np.log(0.75) + 0.25 * np.log(0.25)) / np.log(4))
    assert level_balance(np.zeros(3, int), 1)["entropy"] == 1.0


def test_distortion_is_the_share_of_variance_left() -> None:
    random = np.random.default_rng(0)
    vectors = (random.normal(size=(50, 3)) + 9).astype(np.float32)
    codes, codebooks = random.integers(0, 4, (50, 2)), random.normal(size=(2, 4, 3)).astype(np.float32)
    kept = vectors.copy()
    left = vectors - codebooks[0][codes[:, 0]]
    variance = ((vectors - vectors.mean(axis=0)) ** 2).sum()
    expected = [(left**2).sum() / variance, ((left - codebooks[1][codes[:, 1]]) ** 2).sum() / variance]
    assert distortion(vectors, codes, codebooks) == pytest.approx(expected, rel=1e-4)
    assert np.array_equal(vectors, kept)
    alike = np.ones((3, 2), np.float32)
    assert distortion(alike, np.zeros((3, 1), int), np.ones((1, 1, 2), np.float32)) == [0.0]


@given(st.lists(st.tuples(*[st.integers(0, 10**9)] * 3), min_size=1, max_size=20))
@settings(max_examples=25, deadline=None)
def test_prefixes_are_numbered_without_gaps_in_the_order_of_their_codes(paths: list[tuple[int, ...]]) -> None:
    numbers = prefix_numbers(np.array(paths))
    for depth, found in enumerate(numbers):
        order = {prefix: number for number, prefix in enumerate(sorted({path[:depth] for path in paths}))}
        assert found.tolist() == [order[path[:depth]] for path in paths]


def test_collisions_count_every_item_that_shares_its_path() -> None:
    assert collisions(np.array([[0], [0], [0], [1], [2], [3], [3]])) == {"items": 5, "groups": 2, "largest": 3}
    assert collisions(np.array([[1], [0]])) == {"items": 0, "groups": 0, "largest": 1}


@pytest.mark.parametrize("seed", range(3))
def test_neighbours_share_what_a_full_search_says(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "NEIGHBOURS", 4)
    random = np.random.default_rng(seed)
    vectors, codes = random.normal(size=(30, 5)).astype(np.float32), random.integers(0, 2, (30, 3))
    depths = []
    for item, vector in enumerate(vectors):
        order = np.argsort(((vectors - vector) ** 2).sum(axis=1))
        depths.append([shared_depth(codes[item], codes[other]) for other in order if other != item][:4])
    found = neighbour_sharing(vectors, codes)
    assert (found["sample"], found["neighbours"]) == (30, 4)
    assert found["sharing"] == pytest.approx([(np.array(depths) >= depth).sum() / 30 for depth in (1, 2, 3)])


@given(hnp.arrays(np.int64, st.tuples(st.integers(2, 10), st.integers(1, 4)), elements=st.integers(0, 2)))
@settings(max_examples=25, deadline=None)
def test_chance_is_what_all_pairs_share_and_equals_are_not_their_own_neighbours(codes: np.ndarray) -> None:
    # All vectors are alike, and everybody is a neighbour of everybody else.
    found = neighbour_sharing(np.ones((len(codes), 4), np.float32), codes)
    assert found["neighbours"] == len(codes) - 1
    assert found["sharing"] == pytest.approx(found["by_chance"])


def test_the_draw_hangs_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnostics, "SAMPLE", 20)
    random = np.random.default_rng(0)
    given = random.normal(size=(60, 5)).astype(np.float32), random.integers(0, 3, (60, 2))
    first, again, other = (neighbour_sharing(*given, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first["sharing"] != other["sharing"]


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    """An index of 80 items on 64 paths: 32 items share theirs with one other."""
    data, random, numbers = DataFolder(tmp_path, "D"), np.random.default_rng(0), np.arange(80) % 64
    codes = np.stack([numbers % 4, numbers // 4 % 4, numbers // 16], axis=1).astype(np.int32)
    codebooks = random.normal(size=(3, 4, 6)).astype(np.float32) / 2.0 ** np.arange(3, dtype="f4")[:, None, None]
    vectors = sum(codebooks[level][codes[:, level]] for level in range(3)) + random.normal(size=(80, 6)) / 10
    paths = [(*path, item // 64) if item % 64 < 16 else path for item, path in enumerate(codes.tolist())]
    items = [str(item) for item in range(80)]
    mean, scale = np.zeros(6, np.float32), np.array(1.0)
    SavedIndex(items, vectors.astype("f4"), codes, codebooks, mean, scale, {"built": 80}).save(data)
    ItemIndex.from_codes(items, paths).save(data.index)
    return data


def text_of(report: dict[str, object]) -> str:
    console = Console(width=80, record=True, quiet=False)
    with console.capture() as captured:
        console.print(report_table("D", report))
    return captured.get()


def test_the_report_holds_all_figures_as_json_and_as_a_table(folder: DataFolder) -> None:
    report = report_index(folder)
    assert json.loads((folder.root / "D.index-report.json").read_text()) == report
    assert (report["items"], report["levels"], report["codes"]) == (80, 3, 4)
    assert report["collisions"] == {"items": 32, "groups": 16, "largest": 2}
    assert report["distortion"] == sorted(report["distortion"], reverse=True)
    assert report["neighbours"]["sharing"][0] > 2 * report["neighbours"]["by_chance"][0]
    text = text_of(report)
    assert "4 of 4" in text
    assert "80 items; 32 collide on 16 paths, 2 at most" in text
    assert f"{report['distortion'][2]:.3g}" in text


def test_an_imported_index_has_no_figures_that_need_vectors(folder: DataFolder) -> None:
    whole = report_index(folder)
    folder.codebooks.unlink()
    report = report_index(folder)
    assert [report[name] for name in ("distortion", "neighbours", "settings")] == [None] * 3
    assert [report[name] for name in ("collisions", "balance")] == [whole[name] for name in ("collisions", "balance")]
    assert "–" in text_of(report)


def test_an_index_of_another_build_is_refused(folder: DataFolder) -> None:
    ItemIndex.from_codes(["0", "1"], [(0, 0, 0), (0, 0, 1)]).save(folder.index)
    with pytest.raises(InputError, match=r"not the index that D\.codebooks\.npz was made with"):
        report_index(folder)


def test_the_smallest_index_has_a_report(tmp_path: Path) -> None:
    data = DataFolder(tmp_path, "D")
    ItemIndex({"x": ("<|a_1|>",)}).save(data.index)
    assert report_index(data)["balance"] == [{"used": 1, "min": 1, "max": 1, "entropy": 1.0}]
