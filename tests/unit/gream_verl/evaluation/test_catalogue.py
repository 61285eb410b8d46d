from __future__ import annotations

import json
from collections import Counter
from math import log2
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gream_verl.evaluation.metrics import bootstrap_mean, ranking_metrics
from gream_verl.evaluation.results import Evaluation, measure, training_counts

ITEMS = [str(item) for item in range(12)]
COUNTS = Counter({item: number**2 for number, item in enumerate(ITEMS)})


def evaluation(rows: list[dict[str, Any]], **more: Any) -> Evaluation:
    made = Evaluation({}, {"mode": "direct", "users": len(rows)} | more, rows)
    return Evaluation(ranking_metrics(made.ranks), made.settings, rows)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.permutations(ITEMS), st.integers(10, 12)), min_size=1, max_size=8))
def test_coverage_and_novelty_equal_their_definitions(lists: list[tuple[list[str], int]]) -> None:
    rows = [{"user": str(user), "target": "3", "recommended": one[:k]} for user, (one, k) in enumerate(lists)]
    metrics = measure(evaluation(rows), ITEMS, COUNTS).metrics
    shown = [item for row in rows for item in row["recommended"][:10]]
    interactions = sum(number**2 for number in range(12))
    information = [-log2((int(item) ** 2 + 1) / (interactions + 12)) for item in shown]
    assert metrics["coverage@10"] == pytest.approx(len(set(shown)) / 12)
    assert metrics["novelty@10"] == pytest.approx(sum(information) / len(shown))


def test_intervals_are_of_the_values_of_users() -> None:
    rows = [
        {"user": str(user), "target": "3", "recommended": ["1", "3"][: 1 + user % 2], "rsvr": user / 9}
        for user in range(10)
    ]
    measured = measure(evaluation(rows, beams=30), ITEMS, COUNTS, seed=4)
    assert measured.intervals["recall@10"] == bootstrap_mean([user % 2 for user in range(10)], seed=4)
    assert measured.intervals["rsvr"] == bootstrap_mean([user / 9 for user in range(10)], seed=4)


def test_only_what_the_lists_reach_is_measured() -> None:
    rows = [{"user": str(user), "target": "3", "recommended": ITEMS[user : user + 6]} for user in range(5)]
    measured = measure(evaluation(rows, beams=6), ITEMS, COUNTS, cutoffs=[2, 6])
    assert {metric.partition("@")[2] for metric in measured.metrics} == {"1", "2", "5", "6"}
    assert measured.intervals == {}


def test_free_answers_without_a_ranking_are_measured_by_their_reward() -> None:
    rows = [{"user": str(user), "target": "3", "rsvr": 0.5} for user in range(9)]
    measured = measure(
        Evaluation({"rsvr": 0.5, "pass@10": 0.1}, {"mode": "reasoning", "users": 9}, rows), ITEMS, COUNTS
    )
    assert measured.metrics == {"rsvr": 0.5, "pass@10": 0.1}
    assert measured.intervals == {"rsvr": (0.5, 0.5)}


def test_training_alone_is_counted_and_coverage_is_of_the_index(tmp_path: Path) -> None:
    file = tmp_path / "D.inter.json"
    file.write_text(json.dumps({"u": ["old", "b", "old", "c", "d"], "v": ["old", "e", "b"]}))
    index = ["b", "c", "new", "newer"]
    counts = training_counts(file, index)
    assert counts == {"old": 3, "b": 1, "c": 0, "d": 0, "e": 0, "new": 0, "newer": 0}
    rows = [{"user": "u", "target": "b", "recommended": ["b", "new", "old"]}]
    metrics = measure(evaluation(rows, beams=10), index, counts).metrics
    assert metrics["coverage@10"] == 2 / 4
    assert metrics["novelty@10"] == pytest.approx((log2(11 / 2) + log2(11) + log2(11 / 4)) / 3)
