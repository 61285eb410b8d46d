from __future__ import annotations

import math
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gream_verl.evaluation.metrics import (
    CUTOFFS,
    bootstrap_mean,
    coverage,
    paired_difference,
    paired_test,
    pass_at_k,
    rank_of,
    ranking_metrics,
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.permutations("abcdefghijkl"), st.sampled_from("abcdefghijklm")), min_size=1, max_size=8))
def test_ranking_metrics_equal_their_definitions(users: list[tuple[list[str], str]]) -> None:
    metrics = ranking_metrics([rank_of(target, ranking) for ranking, target in users])
    for k in CUTOFFS:
        recall = ndcg = precision = mrr = 0.0
        for ranking, target in users:
            relevance = [float(item == target) for item in ranking[:k]]
            recall += sum(relevance) / 1
            precision += sum(relevance) / k
            ndcg += sum(gain / math.log2(place + 2) for place, gain in enumerate(relevance)) / (1 / math.log2(2))
            mrr += next((1 / (place + 1) for place, gain in enumerate(relevance) if gain), 0.0)
        slow = {"recall": recall, "ndcg": ndcg, "precision": precision, "mrr": mrr}
        for name, total in slow.items():
            assert metrics[f"{name}@{k}"] == pytest.approx(total / len(users))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_hit(correct: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(correct)))
    draws = list(combinations(correct, k))
    expected = sum(any(draw) for draw in draws) / len(draws)
    assert pass_at_k([len(correct)], [sum(correct)], k)[0] == pytest.approx(expected)


def test_pass_at_k_does_not_overflow_on_many_samples() -> None:
    assert pass_at_k([100_000], [10], 100)[0] == pytest.approx(1 - (1 - 1e-3) ** 10, rel=1e-2)


def test_the_bootstrap_interval_is_near_that_of_the_normal_distribution_and_repeats() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 300)
    low, high = bootstrap_mean(values, seed=5)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert bootstrap_mean(values, seed=5) == (low, high)
    assert bootstrap_mean(values, seed=6) != (low, high)


def test_a_paired_difference_is_sharper_than_its_sides() -> None:
    generator = np.random.default_rng(2)
    users = generator.normal(0, 5, 500)
    left, right = users + 0.5 + generator.normal(0, 0.1, 500), users
    low, high = bootstrap_mean(left - right)
    assert 0.45 < low < 0.5 < high < 0.55


def test_the_bootstrap_of_equal_values_is_that_of_users_drawn_one_by_one() -> None:
    values = np.random.default_rng(3).choice([0.0, 0.3, 1.0], 40, p=[0.7, 0.2, 0.1])
    drawn = np.random.default_rng(4).choice(values, size=(40_000, 40)).mean(axis=1)
    assert bootstrap_mean(values, resamples=40_000) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.006)


lists = st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=6, unique=True), min_size=1, max_size=6)


@settings(max_examples=25, deadline=None)
@given(lists, st.integers(1, 7), st.sets(st.sampled_from("abcdefghij"), min_size=1))
def test_coverage_equals_a_loop_over_all_ranks(recommended: list[list[str]], k: int, catalogue: set[str]) -> None:
    covered = {item for items in recommended for rank, item in enumerate(items) if rank < k and item in catalogue}
    assert coverage(recommended, catalogue, k) == pytest.approx(len(covered) / len(catalogue))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8))
def test_the_paired_test_approaches_the_count_of_all_signs(users: list[tuple[int, int]]) -> None:
    left, right = np.array(users, dtype=float).T / 3
    difference = left - right
    sums = [abs(np.dot(signs, difference)) for signs in product([-1, 1], repeat=len(users))]
    exact = np.mean([total >= abs(difference.sum()) - 1e-9 for total in sums])
    assert paired_test(left, right, resamples=20_000) == pytest.approx(exact, abs=0.015)
    assert paired_test(left, right) == paired_test(right, left)


def test_without_a_difference_p_values_are_uniform_and_with_one_they_are_small() -> None:
    generator = np.random.default_rng(7)
    null = []
    for seed in range(100):
        users, noise = generator.normal(size=60), generator.normal(size=(2, 60))
        null.append(paired_test(users + noise[0], users + noise[1], resamples=400, seed=seed))
    for level in (0.05, 0.25, 0.5, 0.75):
        deviation = math.sqrt(level * (1 - level) / 100)
        assert abs(np.mean(np.array(null) <= level) - level) < 3.5 * deviation
    users, noise = generator.normal(size=200), generator.normal(size=(2, 200))
    assert paired_test(users + 1 + noise[0], users + noise[1], resamples=999) == 1 / 1000


def test_the_paired_test_sees_hits_that_moved_and_ignores_users_without_a_difference() -> None:
    left, right = np.array([1.0] * 9 + [0.0]), np.array([0.0] * 9 + [1.0])  # 9 users better, 1 worse
    exact = 2 * (1 + 10) / 2**10
    assert paired_test(left, right, resamples=100_000) == pytest.approx(exact, abs=0.002)
    same = np.ones(500)
    padded = paired_test(np.append(left, same), np.append(right, same), resamples=100_000)
    assert padded == paired_test(left, right, resamples=100_000)
    assert paired_test(same, same) == 1.0
    found = paired_difference(left, right)
    assert found["difference"] == pytest.approx(0.8)
    assert (found["low"], found["high"]) == bootstrap_mean(left - right)
    assert found["p"] == paired_test(left, right)


def test_blocks_of_resamples_are_drawn_as_all_at_once() -> None:
    values, other = np.random.default_rng(1).normal(size=(2, 50))
    generator = np.random.default_rng(3)
    means = generator.multinomial(50, np.full(50, 1 / 50), size=250) @ np.unique(values) / 50
    assert bootstrap_mean(values, resamples=250, seed=3) == tuple(np.quantile(means, [0.025, 0.975]))
    generator, distances = np.random.default_rng(3), np.unique(np.abs(values - other))
    sums = (2 * generator.binomial(np.ones(50, dtype=int), 0.5, size=(250, 50)) - 1) @ distances
    extreme = int((np.abs(sums) >= abs((values - other).sum()) - 1e-9).sum())
    assert paired_test(values, other, resamples=250, seed=3) == (extreme + 1) / 251
