from __future__ import annotations

import json

import numpy as np
import pytest

from data_processing.indexing.diagnostics import collisions, diagnose, distortion, level_balance, prefix_purity


def test_balance_is_one_when_even_and_lower_when_not() -> None:
    even, uneven = level_balance(np.array([0, 1, 2, 3]), 4), level_balance(np.array([0, 0, 0, 1]), 4)
    assert even == {"min": 1, "max": 1, "entropy": pytest.approx(1.0), "counts": [1, 1, 1, 1]}
    assert uneven["counts"] == [3, 1, 0, 0]
    assert uneven["min"] == 0
    assert 0 < uneven["entropy"] < 0.5


def test_one_code_alone_is_even() -> None:
    assert level_balance(np.zeros(3, int), 1)["entropy"] == 1.0


def test_distortion_is_the_share_of_variance_left_and_ends_at_zero_when_codes_say_all() -> None:
    vectors = np.array([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    codes = np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    codebooks = np.array([[[1.0, 0.0], [-1.0, 0.0]], [[0.0, 1.0], [0.0, -1.0]]])
    assert distortion(vectors, codes, codebooks) == pytest.approx([0.5, 0.0])


def test_collisions_count_every_item_that_shares_its_path() -> None:
    found = collisions(np.array([[0, 1], [0, 1], [0, 1], [2, 2], [2, 3]]))
    assert found == {"items": 3, "rate": pytest.approx(0.6), "largest": 3}


def test_purity_is_the_share_of_items_with_their_prefix_s_most_common_category() -> None:
    categories = [["Action", "Crime"], ["Action"], ["Comedy"], ["Comedy"], ["Drama"], ["Comedy", "Drama"]]
    codes = np.array([[0], [0], [0], [1], [1], [1]])
    assert prefix_purity(codes, categories) == pytest.approx(4 / 6)
    assert prefix_purity(codes[:, :0], categories) == pytest.approx(3 / 6)


def test_purity_ignores_categories_that_all_items_carry_and_items_without_any() -> None:
    categories = [["Beauty", "Hair"], ["Beauty", "Skin"], ["Beauty"], ["Beauty", "Hair"]]
    assert prefix_purity(np.array([[0], [0], [0], [0]]), categories) == pytest.approx(2 / 3)
    assert prefix_purity(np.array([[0]]), [[]]) == 0.0


def test_the_diagnosis_is_plain_json_and_names_every_level() -> None:
    random = np.random.default_rng(0)
    codes, codebooks = random.integers(0, 4, (10, 3)), random.normal(size=(3, 4, 2))
    found = json.loads(json.dumps(diagnose(random.normal(size=(10, 2)), codes, codebooks, [["A"]] * 10)))
    assert (found["items"], found["levels"], found["codes"]) == (10, 3, 4)
    assert [len(found[name]) for name in ("balance", "distortion", "purity")] == [3, 3, 4]


@pytest.mark.parametrize(("rows", "labelled"), [(4, 5), (5, 4)])
def test_shapes_that_do_not_fit_are_refused(rows: int, labelled: int) -> None:
    with pytest.raises(ValueError, match="5 vectors and 2 levels"):
        diagnose(np.zeros((5, 3)), np.zeros((rows, 2), int), np.zeros((2, 4, 3)), [[]] * labelled)
