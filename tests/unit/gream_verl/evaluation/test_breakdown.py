from __future__ import annotations

import json
from math import log2
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gream_verl.core.errors import InputError
from gream_verl.evaluation.breakdown import BOUNDS, Catalogue, break_down, describe, labels
from gream_verl.evaluation.metrics import bootstrap_mean, ranking_metrics
from gream_verl.evaluation.results import Evaluation

ITEMS = [str(item) for item in range(12)]
CATALOGUE = Catalogue({item: number**2 for number, item in enumerate(ITEMS)})


def evaluation(rows: list[dict[str, Any]], **settings: Any) -> Evaluation:
    made = Evaluation({}, {"mode": "direct", "users": len(rows)} | settings, rows)
    return Evaluation(ranking_metrics(made.ranks), made.settings, rows)


@st.composite
def evaluations(draw: st.DrawFn) -> Evaluation:
    users = draw(st.integers(1, 8))
    rows = [
        {
            "user": str(user),
            "target": draw(st.sampled_from(ITEMS)),
            "recommended": draw(st.permutations(ITEMS))[: draw(st.integers(10, 12))],
            "history_length": draw(st.integers(0, 70)),
            "rsvr": draw(st.sampled_from([0.0, 0.5, 1.0])),
        }
        for user in range(users)
    ]
    return evaluation(rows)


@given(evaluations())
def test_buckets_hold_every_user_once_and_their_weighted_mean_is_the_metric(made: Evaluation) -> None:
    described = describe(made, CATALOGUE)
    assert list(described.breakdown) == list(BOUNDS)
    for heading, buckets in described.breakdown.items():
        assert sum(bucket["users"] for bucket in buckets) == len(made.rows)
        names = [bucket["bucket"] for bucket in buckets]
        assert names == [label for label in labels(heading) if label in names]
        for metric in ("recall@10", "ndcg@10", "rsvr"):
            total = sum(bucket["users"] * bucket[metric] for bucket in buckets)
            overall = made.values(metric)
            assert overall is not None
            assert total / len(made.rows) == pytest.approx(overall.mean())
            assert all(
                low - 1e-9 <= bucket[metric] <= high + 1e-9
                for bucket in buckets
                for low, high in [bucket["intervals"][metric]]
                if bucket["users"] == 1
            )


@given(evaluations())
def test_every_user_is_in_the_bucket_that_its_label_says(made: Evaluation) -> None:
    def holds(label: str, value: int) -> bool:
        if label.endswith("+"):
            return value >= int(label[:-1])
        first, _, last = label.partition("-")
        return int(first) <= value <= int(last or first)

    described = describe(made, CATALOGUE)
    popularity = {row["user"]: CATALOGUE.popularity[row["target"]] for row in made.rows}
    lengths = {row["user"]: row["history_length"] for row in made.rows}
    for heading, values in (("history length", lengths), ("popularity of the target", popularity)):
        for bucket in described.breakdown[heading]:
            assert bucket["users"] == sum(holds(bucket["bucket"], value) for value in values.values())


@given(evaluations())
def test_coverage_novelty_and_popularity_equal_their_definitions(made: Evaluation) -> None:
    metrics = describe(made, CATALOGUE).metrics
    shown = [item for row in made.rows for item in row["recommended"][:10]]
    interactions = sum(number**2 for number in range(12))
    information = [-log2((int(item) ** 2 + 1) / (interactions + 12)) for item in shown]
    assert metrics["coverage@10"] == pytest.approx(len(set(shown)) / 12)
    assert metrics["novelty@10"] == pytest.approx(sum(information) / len(shown))
    assert metrics["popularity@10"] == pytest.approx(sum(int(item) ** 2 for item in shown) / len(shown))


def test_the_chances_of_all_items_sum_to_one_and_unknown_items_are_the_most_novel() -> None:
    assert sum(2 ** -CATALOGUE.information(item) for item in ITEMS) == pytest.approx(1)
    assert CATALOGUE.information("new") == CATALOGUE.information("0") > CATALOGUE.information("1")


def test_intervals_are_of_the_values_of_users() -> None:
    rows = [
        {"user": str(user), "target": "3", "recommended": ["1", "3"][: 1 + user % 2], "rsvr": user / 9}
        for user in range(10)
    ]
    described = describe(evaluation(rows, beams=30), CATALOGUE, seed=4)
    assert described.intervals["recall@10"] == bootstrap_mean([user % 2 for user in range(10)], seed=4)
    assert described.intervals["rsvr"] == bootstrap_mean([user / 9 for user in range(10)], seed=4)
    assert list(described.breakdown) == ["popularity of the target"]  # these rows do not tell their histories
    assert break_down(evaluation(rows)) == {}


def test_free_answers_without_a_ranking_are_described_by_their_reward() -> None:
    rows = [{"user": str(user), "target": "3", "rsvr": 0.5, "history_length": user} for user in range(9)]
    described = describe(Evaluation({"rsvr": 0.5}, {"mode": "reasoning", "users": 9}, rows), CATALOGUE)
    assert described.metrics == {"rsvr": 0.5}
    assert described.intervals == {"rsvr": (0.5, 0.5)}
    assert [bucket["rsvr"] for bucket in described.breakdown["history length"]] == [0.5] * 3


def test_the_catalogue_counts_training_only(tmp_path: Path) -> None:
    file = tmp_path / "D.inter.json"
    file.write_text(json.dumps({"u": ["a", "b", "a", "c", "d"], "v": ["a", "e"]}))
    assert Catalogue.load(file).popularity == {"a": 2, "b": 1, "c": 0, "d": 0, "e": 0}
    file.write_text("{}")
    with pytest.raises(InputError, match="no interaction"):
        Catalogue.load(file)


def test_coverage_is_of_what_may_be_recommended(tmp_path: Path) -> None:
    file = tmp_path / "D.inter.json"
    file.write_text(json.dumps({"u": ["retired", "b", "retired", "c", "d"], "v": ["retired", "e", "b"]}))
    catalogue = Catalogue.load(file, ["b", "c", "new", "newer"])
    assert catalogue.popularity == {"retired": 3, "b": 1, "c": 0, "d": 0, "e": 0, "new": 0, "newer": 0}
    assert sum(2 ** -catalogue.information(item) for item in catalogue.popularity) == pytest.approx(1)
    rows = [{"user": "u", "target": "b", "recommended": ["b", "new", "retired"]}]
    assert describe(evaluation(rows), catalogue).metrics["coverage@10"] == 2 / 4
    assert describe(evaluation(rows), Catalogue.load(file)).metrics["coverage@10"] == 2 / 5


def test_results_are_kept_whole_and_older_files_still_load(tmp_path: Path) -> None:
    rows = [{"user": "1", "target": "3", "recommended": ["3"], "history_length": 3}]
    described = describe(evaluation(rows, protocol={"split": "test"}), CATALOGUE)
    described.save(tmp_path / "e.json")
    assert Evaluation.load(tmp_path / "e.json") == described
    content = json.loads((tmp_path / "e.json").read_text())
    (tmp_path / "e.json").write_text(json.dumps({key: content[key] for key in ("metrics", "settings")}))
    older = Evaluation.load(tmp_path / "e.json")
    assert (older.intervals, older.breakdown, older.metrics) == ({}, {}, described.metrics)
    (tmp_path / "e.rows.jsonl").write_text('{"user": "1"}\n')
    with pytest.raises(InputError, match="not the result of an evaluation"):
        Evaluation.load(tmp_path / "e.json")


def test_values_of_users_are_those_of_the_chains() -> None:
    chains = [[1, 0, 0], [0, 0, 0], [1, 1, 1]]
    rows = [
        {"user": str(user), "target": "3", "chains": [{"acc": float(hit), "valid_item": 1.0 - hit} for hit in hits]}
        for user, hits in enumerate(chains)
    ]
    made = Evaluation({}, {"mode": "reasoning"}, rows)
    found = {metric: made.values(metric) for metric in ("pass@1", "pass@2", "valid_item", "pass@4", "recall@1", "x")}
    values = {metric: None if some is None else some.tolist() for metric, some in found.items()}
    assert values["pass@1"] == pytest.approx([1 / 3, 0, 1])
    assert values["pass@2"] == pytest.approx([2 / 3, 0, 1])
    assert values["valid_item"] == pytest.approx([2 / 3, 1, 0])
    assert values["pass@4"] is values["recall@1"] is values["x"] is None
