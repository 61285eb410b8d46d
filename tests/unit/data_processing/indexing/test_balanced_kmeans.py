from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.optimize import linear_sum_assignment

from data_processing.indexing import assignment
from data_processing.indexing.assignment import assign_apart, assign_balanced
from data_processing.indexing.balanced_kmeans import assignment_costs, balanced_kmeans, raise_crowded, size_bounds
from gream_verl.core.errors import InputError

COSTS = st.tuples(st.integers(1, 24), st.integers(1, 6)).flatmap(
    lambda shape: arrays(np.float32, shape, elements=st.integers(-50, 50).map(float))
)


def total_cost(costs: np.ndarray, labels: np.ndarray) -> float:
    return float(costs[np.arange(len(labels)), labels].astype(np.float64).sum())


def least_cost_by_hungarian(costs: np.ndarray, lower: int, upper: int) -> float:
    cluster = np.repeat(np.arange(costs.shape[1]), lower), np.repeat(np.arange(costs.shape[1]), upper - lower)
    columns = np.concatenate([costs[:, cluster[0]] - 1e4, costs[:, cluster[1]]], axis=1).astype(np.float64)
    _, chosen = linear_sum_assignment(columns)
    return total_cost(costs, np.concatenate(cluster)[chosen])


def least_cost_by_trying_all(costs: np.ndarray, lower: int, upper: int) -> float:
    rows, clusters = costs.shape
    allowed = (
        np.array(labels)
        for labels in itertools.product(range(clusters), repeat=rows)
        if all(lower <= size <= upper for size in np.bincount(labels, minlength=clusters))
    )
    return min(total_cost(costs, labels) for labels in allowed)


@given(COSTS)
@settings(max_examples=40, deadline=None)
def test_assignment_is_as_cheap_as_the_hungarian_method_and_keeps_the_bounds(costs: np.ndarray) -> None:
    rows, clusters = costs.shape
    lower, upper = max(0, rows // clusters - 1), rows // clusters + 1
    labels, _ = assign_balanced(costs, lower, upper)
    sizes = np.bincount(labels, minlength=clusters)
    assert sizes.min() >= lower
    assert sizes.max() <= upper
    assert total_cost(costs, labels) == pytest.approx(least_cost_by_hungarian(costs, lower, upper), abs=1e-6)


@pytest.mark.parametrize("seed", range(2))
def test_assignment_is_as_cheap_as_the_best_of_all_assignments(seed: int) -> None:
    costs = np.random.default_rng(seed).normal(size=(7, 3)).astype(np.float32)
    labels, _ = assign_balanced(costs, 1, 3)
    assert total_cost(costs, labels) == pytest.approx(least_cost_by_trying_all(costs, 1, 3), abs=1e-5)


@given(COSTS, st.integers(0, 2**32 - 1), st.floats(0, 1e4))
@settings(max_examples=15, deadline=None)
def test_first_prices_change_the_way_but_not_the_cost(costs: np.ndarray, seed: int, scale: float) -> None:
    rows, clusters = costs.shape
    lower, upper = max(0, rows // clusters - 1), rows // clusters + 1
    prices = np.random.default_rng(seed).normal(scale=scale, size=clusters)
    free, _ = assign_balanced(costs, lower, upper)
    warm, _ = assign_balanced(costs, lower, upper, prices)
    assert total_cost(costs, warm) == pytest.approx(total_cost(costs, free), abs=1e-6)


def test_returned_prices_make_the_same_assignment_without_any_flow() -> None:
    costs = np.random.default_rng(0).normal(size=(400, 8)).astype(np.float32)
    labels, prices = assign_balanced(costs, 49, 51)
    assert ((costs + prices).argmin(axis=1) == labels).mean() > 0.95  # rows on a border may tie


@pytest.mark.parametrize(("lower", "upper"), [(6, 7), (0, 1), (3, 2), (-1, 9)])
def test_bounds_that_cannot_be_met_are_refused(lower: int, upper: int) -> None:
    with pytest.raises(ValueError, match="cannot fill"):
        assign_balanced(np.zeros((10, 2), np.float32), lower, upper)


@given(
    st.tuples(st.integers(1, 60), st.integers(1, 5)).flatmap(
        lambda shape: arrays(np.float32, shape, elements=st.integers(-4, 4).map(float))
    ),
    st.data(),
)
@settings(max_examples=12, deadline=None)
def test_sizes_keep_their_bounds_whatever_the_vectors(vectors: np.ndarray, data: st.DataObject) -> None:
    clusters = data.draw(st.integers(1, len(vectors)))
    found = balanced_kmeans(vectors, clusters)
    lower, upper = size_bounds(len(vectors), clusters)
    sizes = np.bincount(found.labels, minlength=clusters)
    assert max(1, len(vectors) // clusters - 1) == lower <= sizes.min()
    assert sizes.max() <= upper == len(vectors) // clusters + 1
    means = np.stack([vectors[found.labels == cluster].mean(axis=0) for cluster in range(clusters)])
    np.testing.assert_allclose(found.centroids, means, atol=1e-4)
    assert found.inertia == pytest.approx(float(((vectors - means[found.labels]) ** 2).sum()), rel=1e-3, abs=1e-2)


def test_same_seed_gives_the_same_bytes_and_another_seed_does_not() -> None:
    vectors = np.random.default_rng(0).normal(size=(500, 16)).astype(np.float32)
    first, again, other = (balanced_kmeans(vectors, 16, seed=seed) for seed in (3, 3, 4))
    assert first.labels.tobytes() == again.labels.tobytes()
    assert first.centroids.tobytes() == again.centroids.tobytes()
    assert first.labels.tobytes() != other.labels.tobytes()


@pytest.mark.parametrize("seed", range(3))
def test_clear_groups_are_found_in_any_order_of_the_rows(seed: int) -> None:
    random = np.random.default_rng(seed)
    group = np.repeat(np.arange(6), 20)
    vectors = (10 * np.eye(6)[group] + random.normal(size=(120, 6)) * 0.1).astype(np.float32)
    order = random.permutation(120)
    labels = balanced_kmeans(vectors[order], 6, seed=seed).labels
    assert len({(a, b) for a, b in zip(group[order], labels, strict=True)}) == 6


def test_distortion_is_close_to_plain_kmeans_and_far_below_one_random_split() -> None:
    vectors = np.random.default_rng(0).normal(size=(600, 8)).astype(np.float32)
    found = balanced_kmeans(vectors, 12)
    split = np.arange(600) % 12
    random_means = np.stack([vectors[split == cluster].mean(axis=0) for cluster in range(12)])
    assert found.inertia < 0.75 * ((vectors - random_means[split]) ** 2).sum()
    labels, _ = assign_balanced(assignment_costs(vectors, found.centroids), *size_bounds(600, 12))
    assert (labels == found.labels).mean() > 0.9  # close to a fixed point


@pytest.mark.parametrize("rows", [64, 1000])
def test_equal_vectors_are_spread_evenly(rows: int) -> None:
    sizes = np.bincount(balanced_kmeans(np.ones((rows, 4)), 16).labels, minlength=16)
    lower, upper = size_bounds(rows, 16)
    assert lower <= sizes.min() <= sizes.max() <= upper


def test_costs_order_clusters_as_squared_distances_do() -> None:
    random = np.random.default_rng(0)
    vectors, centroids = random.normal(size=(30, 5)).astype("f4"), random.normal(size=(4, 5)).astype("f4")
    squared = ((vectors[:, None] - centroids[None]) ** 2).sum(axis=2)
    expected = squared - (vectors**2).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(assignment_costs(vectors, centroids), expected, atol=1e-4)


def test_crowded_clusters_get_dearer_and_empty_ones_cheaper() -> None:
    moved = raise_crowded(np.zeros(3, np.float32), np.array([9, 3, 0]), 0.5)
    np.testing.assert_allclose(moved, [0.5, -0.125, -0.5])


@pytest.mark.parametrize("vectors", [np.array([[1.0], [np.nan], [2.0]]), np.zeros((1, 3))])
def test_vectors_that_cannot_be_clustered_are_refused(vectors: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected at least 2 finite vectors"):
        balanced_kmeans(vectors, 2)


@given(
    st.integers(1, 5).flatmap(
        lambda clusters: st.tuples(
            arrays(
                np.float32,
                st.tuples(st.integers(clusters, 24), st.just(clusters)),
                elements=st.integers(-9, 9).map(float),
            ),
            st.integers(0, 2**32 - 1),
        )
    )
)
@settings(max_examples=25, deadline=None)
def test_rows_of_a_group_are_kept_apart_within_the_bounds(problem: tuple[np.ndarray, int]) -> None:
    costs, seed = problem
    rows, clusters = costs.shape
    bounds = size_bounds(rows, clusters)
    # Groups of at most half as many rows as there are clusters: closing clusters always finds a way.
    groups = np.random.default_rng(seed).permutation(np.arange(rows) // max(clusters // 2, 1))
    labels = assign_apart(costs, groups, *bounds)
    sizes = np.bincount(labels, minlength=clusters)
    assert bounds[0] <= sizes.min() <= sizes.max() <= bounds[1]
    assert len({*zip(groups.tolist(), labels.tolist(), strict=True)}) == rows
    assert total_cost(costs, labels) >= total_cost(costs, assign_balanced(costs, *bounds)[0]) - 1e-3


def test_keeping_apart_costs_nothing_where_no_rows_meet() -> None:
    costs = np.random.default_rng(0).normal(size=(60, 6)).astype(np.float32)
    labels, _ = assign_balanced(costs, 9, 11)
    np.testing.assert_array_equal(assign_apart(costs, np.arange(60), 9, 11), labels)


def test_groups_that_cannot_be_kept_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="5 items cannot be kept apart by 4 codes"):
        assign_apart(np.zeros((8, 4), np.float32), np.array([0, 0, 0, 0, 0, 1, 1, 1]), 1, 3)
    monkeypatch.setattr(assignment, "APART_ROUNDS", 1)
    with pytest.raises(InputError, match="4 items cannot be kept apart by 4 codes"):
        assign_apart(np.tile(np.arange(4, dtype=np.float32), (16, 1)), np.arange(16) // 4, 3, 5)


def test_loops_are_compiled_where_machine_code_cannot_be_kept() -> None:
    def double(number: int) -> int:
        return 2 * number

    double.__code__ = double.__code__.replace(co_filename="<no such file>")
    assert assignment.compiled(double)(21) == 42


def test_the_number_of_processors_changes_no_byte() -> None:
    vectors = np.random.default_rng(0).normal(size=(9_000, 12)).astype(np.float32)
    processors = os.sched_getaffinity(0)
    found = balanced_kmeans(vectors, 16)
    try:
        os.sched_setaffinity(0, {min(processors)})
        alone = balanced_kmeans(vectors, 16)
    finally:
        os.sched_setaffinity(0, processors)
    assert found.centroids.tobytes() == alone.centroids.tobytes()
    assert found.labels.tobytes() == alone.labels.tobytes()


def test_vectors_far_from_the_origin_are_clustered_as_well() -> None:
    vectors = np.random.default_rng(0).normal(size=(400, 6)).astype(np.float32)
    assert balanced_kmeans(vectors + 1_000, 8).inertia == pytest.approx(balanced_kmeans(vectors, 8).inertia, rel=0.02)
