from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from evaluation_files import PROTOCOL, make_evaluation
from rich.console import Console
from typer.testing import CliRunner

from gream_verl.cli.evaluate import evaluate_app
from gream_verl.core.errors import InputError
from gream_verl.evaluation.compare import (
    paired_differences,
    protocol_table,
    read_results,
    results_table,
    warning_texts,
)
from gream_verl.evaluation.metrics import paired_difference, rank_of
from gream_verl.evaluation.results import Evaluation


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs on the same users; the second one's rows have another order."""
    for run, skill in (("a", 0.2), ("b", 0.6)):
        folder = tmp_path / run / "evaluation"
        make_evaluation("popularity", skill=0.1).save(folder / "popularity.json")
        make_evaluation("direct", skill=skill, shuffled=run == "b").save(folder / "sft-direct.json")
    return tmp_path


def shown(*parts: Any, width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(*parts)
    return console.export_text()


def test_floors_of_the_same_data_are_there_once_and_models_by_run(runs: Path) -> None:
    results = read_results([str(runs / "a"), str(runs / "b" / "evaluation")])
    assert list(results) == ["popularity", "a/sft-direct", "b/sft-direct"]
    assert list(read_results([str(runs / "a")])) == ["popularity", "sft-direct"]
    single = read_results([f"one={runs / 'a'}", f"two={runs / 'b' / 'evaluation' / 'sft-direct.json'}"])
    assert list(single) == ["popularity", "one/sft-direct", "two"]
    make_evaluation("popularity", skill=0.3).save(runs / "b" / "evaluation" / "popularity.json")
    different = read_results([str(runs / "a"), str(runs / "b")])
    assert list(different) == ["popularity", "b/popularity", "a/sft-direct", "b/sft-direct"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["a", "nowhere.json"], "nowhere.json: no such file"),
        (["."], "no result of an evaluation"),
        (["a", "a"], "'a/sft-direct' is there twice; name the arguments, NAME=PATH"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(runs: Path, arguments: list[str], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        read_results([str(runs / argument) for argument in arguments])


def test_differences_are_those_of_the_same_users_whatever_the_order_of_the_rows(runs: Path) -> None:
    results = read_results([str(runs / "a"), str(runs / "b")])
    found = paired_differences(results, results["a/sft-direct"])
    assert list(found) == ["popularity", "b/sft-direct"]
    assert list(found["popularity"]) == ["recall@10", "ndcg@10"]  # it has no reward
    hits = {
        name: {row["user"]: float(0 < rank_of(row["target"], row["recommended"]) <= 10) for row in one.rows}
        for name, one in results.items()
    }
    users = [row["user"] for row in results["b/sft-direct"].rows]
    left, right = ([hits[name][user] for user in users] for name in ("b/sft-direct", "a/sft-direct"))
    assert found["b/sft-direct"]["recall@10"] == paired_difference(left, right)
    assert found["b/sft-direct"]["recall@10"]["p"] < 0.05


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"protocol": PROTOCOL | {"history": 50}}, "history is 50, not 20"), ({"users": 50}, "50 of 60 users in common")],
)
def test_what_was_measured_in_another_way_is_shown_but_never_paired(change: dict[str, Any], reason: str) -> None:
    results = {"a": make_evaluation("direct"), "x": make_evaluation("direct", skill=0.6, **change)}
    results["y"] = results["x"]
    assert paired_differences(results, results["a"]) == {}
    assert [text.plain for text in warning_texts(results, "a")] == [
        f"WARNING: x and y cannot be compared with a: {reason}."
    ]


def test_the_protocol_is_told_once_and_by_name_where_it_differs() -> None:
    other = make_evaluation("direct", protocol=PROTOCOL | {"history": 5, "template": "[b]{history}[/b]"})
    text = shown(protocol_table({"a": make_evaluation("direct"), "b": other}))
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines()]
    assert ["split", "test"] in lines
    assert lines[lines.index(["history", "a: 20"]) + 1] == ["", "b: 5"]
    assert ["", "b: [b]{history}[/b]"] in lines


def test_a_cell_has_half_of_the_interval_and_the_difference() -> None:
    rows = [{"user": str(user), "target": "1", "recommended": ["1"]} for user in range(4)]
    metrics = {"recall@10": 0.5, "novelty@10": 10.5}
    one = Evaluation(metrics, {"mode": "reasoning"}, rows, {"recall@10": (0.25, 0.7)})
    difference = {"difference": -0.25, "low": 0.0, "high": 0.0, "p": 0.0312}
    text = shown(results_table({"[b]m": one}, {"[b]m": {"recall@10": difference}}, "base"))
    assert text.split()[:2] == ["R@10", "Nov@10"]
    for part in ("[b]m", ".5000", "±.2250", "-.2500", "p=.031", "10.5"):
        assert part in text.split()
    assert "difference from base" in " ".join(text.split())


def test_answers_have_a_table_of_their_own_that_fits_a_terminal() -> None:
    measured = {
        "rsvr": 0.1, "greedy_rsvr": 0.15, "expected_rsvr": 0.125, "target_logprob": -5.25,
        "target_logprob_without_chain": -5.5, "chain_gain": 0.25,
    }  # fmt: skip
    rows = [{"user": str(user), "target": "1"} | {name: value * user for name, value in measured.items()} for user in
            range(3)]  # fmt: skip
    given = {"valid_item": 0.75, "pass@8": 0.5, **measured}
    results = {
        "popularity": Evaluation({"recall@10": 0.5}, {"mode": "popularity"}, []),
        "srpo-direct": Evaluation({"rsvr": 0.1}, {"mode": "direct"}, []),
    }
    results |= {name: Evaluation(given, {"mode": "reasoning"}, rows, {"rsvr": (0, 1)}) for name in ("a", "b")}
    differences = paired_differences({"b": results["b"]}, results["a"])
    assert list(differences["b"]) == list(measured)
    lines = shown(results_table(results, differences, "a")).splitlines()
    assert max(map(len, lines)) <= 80
    number, line = next((number, line) for number, line in enumerate(lines) if "Greedy" in line)
    assert line.split() == ["Valid", "Pass@8", "RSVR", "Greedy", "Expect", "LogP", "Alone", "Gain"]
    cells = {line.split()[0]: line.split()[1:] for line in lines[number + 1 :] if line[:1].strip()}
    assert cells["a"] == [".7500", ".5000", ".1000", ".1500", ".1250", "-5.2500", "-5.5000", ".2500"]
    assert cells["srpo-direct"] == ["1", "–", ".1000", *"–––––"]
    assert "popularity" not in cells


def test_the_command_prints_the_same_table_each_time(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    monkeypatch.setattr("gream_verl.cli.evaluate.console", console)
    texts = []
    for _ in range(2):
        result = CliRunner().invoke(evaluate_app, ["compare", str(runs / "a"), f"better={runs / 'b'}"])
        assert result.exit_code == 0, result.output
        texts.append(console.export_text())
    assert texts[0] == texts[1]
    assert max(map(len, texts[0].splitlines())) <= 80
    for part in ("popularity", "better/", "p<.001", "Protocol"):
        assert part in texts[0]
    assert "difference from a/sft-direct" in " ".join(texts[0].split())
    assert "WARNING" not in texts[0]
    result = CliRunner().invoke(evaluate_app, ["compare", str(runs / "a"), "--baseline", "c"])
    assert "no such result; there are popularity, sft-direct" in str(result.exception)
