from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from data_processing.indexing.neighbours import Neighbours, distance_by_depth, find_neighbours, neighbour_prefixes


def shared_depth(left: np.ndarray, right: np.ndarray) -> int:
    return next((depth for depth, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), len(left))


def test_neighbours_are_those_of_a_full_search_and_never_the_item_itself() -> None:
    vectors = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    found = find_neighbours(vectors, sample=20, count=7)
    assert found.items.shape == (20,)
    assert sorted(set(found.items)) == found.items.tolist()
    for item, nearest in zip(found.items, found.nearest, strict=True):
        order = np.argsort(((vectors - vectors[item]) ** 2).sum(axis=1))
        assert nearest.tolist() == [row for row in order if row != item][:7]


def test_the_draw_hangs_on_the_seed_alone() -> None:
    vectors = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    first, again, other = (find_neighbours(vectors, sample=20, seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.items, again.items)
    assert np.array_equal(first.nearest, again.nearest)
    assert not np.array_equal(first.items, other.items)


def test_items_that_are_all_alike_are_not_their_own_neighbours() -> None:
    found = find_neighbours(np.ones((30, 4), np.float32))
    assert found.nearest.shape == (30, 10)
    assert not (found.nearest == found.items[:, None]).any()


def test_a_small_catalogue_has_as_many_neighbours_as_other_items() -> None:
    assert find_neighbours(np.eye(3, dtype=np.float32)).nearest.shape == (3, 2)


def test_shared_prefixes_of_neighbours_are_counted_by_rank_and_by_depth() -> None:
    codes = np.array([[0, 0], [0, 0], [0, 1], [1, 0]])
    found = neighbour_prefixes(codes, Neighbours(np.array([0, 3]), np.array([[1, 2, 3], [2, 1, 0]])))
    assert (found["sample"], found["neighbours"]) == (2, 3)
    assert found["depth_by_rank"] == [1.0, 0.5, 0.0]  # (2 + 0) / 2, (1 + 0) / 2, 0
    assert found["sharing"] == [1.0, 0.5]  # of three: two and none share one code, one and none both
    assert found["sharing_random"] == pytest.approx([3 * 6 / 12, 3 * 2 / 12])
    assert found["depth_random"] == pytest.approx(8 / 12)


@given(hnp.arrays(np.int64, st.tuples(st.integers(2, 12), st.integers(1, 4)), elements=st.integers(0, 2)))
@settings(max_examples=60, deadline=None)
def test_random_pairs_share_what_all_pairs_share_on_average(codes: np.ndarray) -> None:
    items = range(len(codes))
    depths = [shared_depth(codes[left], codes[right]) for left in items for right in items if left != right]
    everyone = Neighbours(
        np.arange(len(codes)), np.array([[right for right in items if right != left] for left in items])
    )
    found = neighbour_prefixes(codes, everyone)
    assert found["depth_random"] == pytest.approx(np.mean(depths))
    assert np.mean(found["depth_by_rank"]) == pytest.approx(np.mean(depths))
    assert found["sharing"] == pytest.approx(found["sharing_random"])


@given(
    hnp.arrays(np.int64, st.tuples(st.integers(1, 12), st.integers(1, 3)), elements=st.integers(0, 2)),
    st.integers(0, 5),
)
@settings(max_examples=100, deadline=None)
def test_pairs_share_just_the_depth_they_are_drawn_for(codes: np.ndarray, seed: int) -> None:
    """A vector of its own for every item tells from the distance which two were paired."""
    vectors = (2.0 ** np.arange(len(codes)))[:, None]
    for item in range(len(codes)):
        others = {depth: set() for depth in range(codes.shape[1] + 1)}
        for other in range(len(codes)):
            if other != item:
                others[shared_depth(codes[item], codes[other])].add(abs(2.0**item - 2.0**other))
        found = distance_by_depth(vectors, codes, np.array([item]), seed=seed)
        assert found["pairs"] == [int(bool(apart)) for apart in others.values()]
        for apart, distance in zip(others.values(), found["distance"], strict=True):
            assert (distance in apart) if apart else distance is None


def test_every_item_of_a_depth_can_be_drawn() -> None:
    codes = np.array([[0, 0], [0, 1], [0, 2], [1, 0]])
    vectors = (2.0 ** np.arange(4))[:, None]
    drawn = {distance_by_depth(vectors, codes, np.array([1]), seed=seed)["distance"][1] for seed in range(40)}
    assert drawn == {1.0, 2.0}
