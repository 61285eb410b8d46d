from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gream_verl.evaluation.metrics import (
    CUTOFFS,
    bootstrap_difference,
    bootstrap_mean,
    pass_at_k,
    rank_of,
    ranking_metrics,
)


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


@given(st.lists(st.booleans(), min_size=1, max_size=7), st.data())
def test_pass_at_k_is_the_share_of_draws_with_a_hit(correct: list[bool], data: st.DataObject) -> None:
    k = data.draw(st.integers(1, len(correct)))
    draws = list(combinations(correct, k))
    expected = sum(any(draw) for draw in draws) / len(draws)
    assert pass_at_k([len(correct)], [sum(correct)], k)[0] == pytest.approx(expected)


def test_pass_at_k_does_not_overflow_on_many_samples() -> None:
    assert pass_at_k([100_000], [10], 100)[0] == pytest.approx(1 - (1 - 1e-3) ** 10, rel=1e-2)


@pytest.mark.parametrize("k", [0, 4])
def test_pass_at_k_refuses_more_draws_than_samples(k: int) -> None:
    with pytest.raises(ValueError, match="between 1 and"):
        pass_at_k([5, 3], [1, 1], k)


def test_the_bootstrap_interval_is_near_that_of_the_normal_distribution_and_repeats() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 1000)
    low, high = bootstrap_mean(values, seed=5)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert bootstrap_mean(values, seed=5) == (low, high)
    assert bootstrap_mean(values, seed=6) != (low, high)


def test_a_paired_difference_is_sharper_than_its_sides() -> None:
    generator = np.random.default_rng(2)
    users = generator.normal(0, 5, 500)
    left, right = users + 0.5 + generator.normal(0, 0.1, 500), users
    low, high = bootstrap_difference(left, right)
    assert 0.45 < low < 0.5 < high < 0.55


def test_metrics_without_users_or_with_unpaired_users_are_refused() -> None:
    with pytest.raises(ValueError, match="no user"):
        ranking_metrics([])
    with pytest.raises(ValueError, match="no value"):
        bootstrap_mean([])
    with pytest.raises(ValueError, match="same users"):
        bootstrap_difference([1.0], [1.0, 2.0])
