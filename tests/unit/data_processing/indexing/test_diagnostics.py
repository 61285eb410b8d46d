from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_processing.indexing import diagnostics
from data_processing.indexing.diagnostics import (
    UBIQUITOUS,
    collisions,
    diagnose,
    distortion,
    level_balance,
    prefix_numbers,
    prefix_purity,
    telling_categories,
)

ITEMS = st.integers(1, 20).flatmap(
    lambda items: st.tuples(
        st.lists(st.tuples(*[st.integers(0, 3)] * 3), min_size=items, max_size=items),
        st.lists(st.lists(st.sampled_from("abcdeé"), max_size=4), min_size=items, max_size=items),
    )
)
"""Codes and categories of up to 20 items."""


def slow_purity(prefixes: np.ndarray, categories: Sequence[Collection[str]]) -> float:
    """The definition in plain Python."""
    carried = Counter(category for names in categories for category in set(names))
    ubiquitous = {category for category, items in carried.items() if items >= UBIQUITOUS * len(categories)}
    groups: dict[tuple[int, ...], list[set[str]]] = {}
    for prefix, names in zip(prefixes.tolist(), categories, strict=True):
        if telling := set(names) - ubiquitous:
            groups.setdefault(tuple(prefix), []).append(telling)
    pure = sum(max(Counter(name for names in group for name in names).values()) for group in groups.values())
    return pure / max(sum(map(len, groups.values())), 1)


def test_balance_is_one_when_even_and_lower_when_not() -> None:
    even, uneven = level_balance(np.array([0, 1, 2, 3]), 4), level_balance(np.array([0, 0, 0, 1]), 4)
    assert even == {"min": 1, "mean": 1.0, "max": 1, "used": 4, "entropy": 1.0, "perplexity": pytest.approx(4.0)}
    assert (uneven["min"], uneven["mean"], uneven["max"], uneven["used"]) == (0, 1.0, 3, 2)
    entropy = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    assert uneven["entropy"] == pytest.approx(entropy / np.log(4))
    assert uneven["perplexity"] == pytest.approx(np.exp(entropy))


def test_one_code_alone_is_even() -> None:
    assert level_balance(np.zeros(3, int), 1)["entropy"] == 1.0


def test_distortion_is_the_share_of_variance_left_and_ends_at_zero_when_codes_say_all() -> None:
    vectors = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    codes = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    codebooks = np.array([[[1.0, 0.0], [-1.0, 0.0]], [[0.0, 1.0], [0.0, -1.0]]])
    shares, errors = distortion(vectors, codes, codebooks)
    assert shares == pytest.approx([0.5, 0.0])
    assert errors == pytest.approx([1.0, 0.0])


def test_distortion_in_blocks_is_that_of_all_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    vectors = (random.normal(size=(50, 3)) + 100).astype(np.float32)
    codes, codebooks = random.integers(0, 4, (50, 2)), random.normal(size=(2, 4, 3))
    kept = vectors.copy()
    whole = distortion(vectors, codes, codebooks)
    left = vectors - codebooks[0][codes[:, 0]] - codebooks[1][codes[:, 1]]
    assert whole[0][1] == pytest.approx((left**2).sum() / ((vectors - vectors.mean(axis=0)) ** 2).sum(), rel=1e-4)
    assert whole[1][1] == pytest.approx((left**2).sum() / 50)
    monkeypatch.setattr(diagnostics, "BLOCK", 7)
    assert distortion(vectors, codes, codebooks) == (pytest.approx(whole[0]), pytest.approx(whole[1]))
    assert np.array_equal(vectors, kept)


def test_vectors_that_are_all_alike_leave_nothing() -> None:
    assert distortion(np.ones((3, 2)), np.zeros((3, 1), int), np.ones((1, 1, 2))) == ([0.0], [0.0])


@given(st.lists(st.tuples(*[st.integers(0, 10**9)] * 3), min_size=1, max_size=20))
@settings(max_examples=60, deadline=None)
def test_prefixes_are_numbered_without_gaps_in_the_order_of_their_codes(paths: list[tuple[int, ...]]) -> None:
    numbers = prefix_numbers(np.array(paths))
    for depth, found in enumerate(numbers):
        order = {prefix: number for number, prefix in enumerate(sorted({path[:depth] for path in paths}))}
        assert found.tolist() == [order[path[:depth]] for path in paths]


def test_collisions_count_every_item_that_shares_its_path() -> None:
    assert collisions(np.array([0, 0, 0, 1, 2, 3, 3])) == {
        "items": 5, "rate": pytest.approx(5 / 7), "groups": 2, "largest": 3
    }  # fmt: skip
    assert collisions(np.array([1, 0])) == {"items": 0, "rate": 0.0, "groups": 0, "largest": 1}


@given(ITEMS)
@settings(max_examples=200, deadline=None)
def test_purity_is_that_of_the_plain_definition_at_every_depth(
    data: tuple[list[tuple[int, ...]], list[list[str]]],
) -> None:
    codes, categories = np.array(data[0]), data[1]
    carried = telling_categories(categories)
    for depth, prefixes in enumerate(prefix_numbers(codes)):
        assert prefix_purity(prefixes, carried) == pytest.approx(slow_purity(codes[:, :depth], categories))


def test_purity_is_the_share_of_items_with_their_prefix_s_most_common_category() -> None:
    carried = telling_categories(
        [["Action", "Crime"], ["Action"], ["Comedy"], ["Comedy"], ["Drama"], ["Comedy", "Drama"]]
    )
    assert prefix_purity(np.array([0, 0, 0, 1, 1, 1]), carried) == pytest.approx(4 / 6)
    assert prefix_purity(np.zeros(6, int), carried) == pytest.approx(3 / 6)


def test_purity_ignores_categories_that_all_items_carry_and_items_without_any() -> None:
    carried = telling_categories([["Beauty", "Hair"], ["Beauty", "Skin"], ["Beauty"], ["Beauty", "Hair", "Hair"]])
    assert carried.toarray().tolist() == [[1, 0], [0, 1], [0, 0], [1, 0]]
    assert prefix_purity(np.zeros(4, int), carried) == pytest.approx(2 / 3)
    assert prefix_purity(np.array([0]), telling_categories([[]])) == 0.0


def test_the_diagnosis_is_plain_json_and_names_every_level() -> None:
    random = np.random.default_rng(0)
    codes, codebooks = random.integers(0, 4, (10, 3)), random.normal(size=(3, 4, 2))
    given = (random.normal(size=(10, 2)), codes, codebooks, [["A"], ["B"]] * 5)
    found = diagnose(*given)
    assert found == json.loads(json.dumps(found)) == diagnose(*given)
    assert (found["items"], found["levels"], found["codes"], found["purity_items"]) == (10, 3, 4, 10)
    assert [len(found[name]) for name in ("balance", "distortion", "mean_squared_error")] == [3, 3, 3]
    assert [len(found[name]) for name in ("prefixes", "items_a_prefix", "purity", "purity_random")] == [4, 4, 4, 4]
    assert found["prefixes"][3] == len({tuple(path) for path in codes.tolist()})
    assert found["items_a_prefix"][:2] == [10.0, 10 / found["prefixes"][1]]


def test_prefixes_that_follow_categories_are_purer_than_random_ones_of_the_same_sizes() -> None:
    categories = [[str(item // 20)] for item in range(200)]
    telling, blind = (
        diagnose(None, codes[:, None], None, categories)
        for codes in (np.arange(200) // 20, np.random.default_rng(5).permutation(200) // 20)
    )
    assert telling["purity"] == [0.1, 1.0]
    assert telling["purity_random"][0] == 0.1
    assert telling["purity_random"][1] == pytest.approx(blind["purity"][1], abs=0.03)
    assert blind["purity_random"][1] == pytest.approx(blind["purity"][1], abs=0.03)
    assert blind["purity"][1] < 0.3


def test_what_hangs_on_vectors_codebooks_or_categories_is_none_without_them() -> None:
    codes = np.array([[0, 1], [0, 6], [2, 1]])
    found = diagnose(None, codes, None, [[]] * 3)
    assert [found[name] for name in ("distortion", "mean_squared_error", "purity", "purity_random")] == [None] * 4
    assert (found["codes"], found["purity_items"]) == (7, 0)
    assert found["balance"][0]["used"] == 2


@pytest.mark.parametrize(
    ("vectors", "levels", "labelled", "message"),
    [(4, 2, 5, "5 items need as many vectors"), (5, 2, 4, "5 items need as many cat"), (5, 3, 5, "2 levels need as")],
)
def test_shapes_that_do_not_fit_are_refused(vectors: int, levels: int, labelled: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diagnose(np.zeros((vectors, 3)), np.zeros((5, 2), int), np.zeros((levels, 4, 3)), [[]] * labelled)
