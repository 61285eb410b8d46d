from __future__ import annotations

import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gream_verl.cli.main import main as cli
from gream_verl.core.errors import InputError
from gream_verl.evaluation.breakdown import Catalogue, describe
from gream_verl.evaluation.compare import compare, comparison_table, read_results, write_comparison
from gream_verl.evaluation.metrics import bootstrap_difference, paired_test, rank_of, ranking_metrics
from gream_verl.evaluation.results import DECISIVE, Evaluation, read_folder

ITEMS = [str(item) for item in range(40)]
CATALOGUE = Catalogue({item: int(item) for item in ITEMS})
PROTOCOL = {"split": "test", "history": 20, "drop_history": True, "template": "a"}


def make(
    path: Path, mode: str, *, skill: float, users: int = 60, first: int = 0, protocol: dict[str, Any] | None = None,
    shuffled: bool = False, shift: int = 0,
) -> Evaluation:  # fmt: skip
    """Save the evaluation of a model that finds a target with the chance ``skill`` and is else random."""
    rows = []
    for user in range(first, first + users):
        draw = random.Random(f"{user}{skill}{mode}")
        target = ITEMS[(user * 7 + shift) % 40]
        recommended = draw.sample(ITEMS, 20)
        if draw.random() < skill:
            recommended = [target, *(item for item in recommended if item != target)][:20]
        row = {"user": str(user), "target": target, "recommended": recommended, "history_length": user % 30}
        rows.append(row | ({"rsvr": draw.choice([0.0, 0.5, 1.0])} if mode == "direct" else {}))
    if shuffled:
        random.Random(1).shuffle(rows)
    settings = {"mode": mode, "users": users, "seed": 0, "drop_history": True}
    settings |= {"protocol": protocol} if protocol else {}
    made = Evaluation({}, settings, rows)
    made = describe(Evaluation(ranking_metrics(made.ranks), settings, rows), CATALOGUE)
    made.save(path)
    return made


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two runs on the same users; the second one's rows have another order."""
    for run, skill in (("a", 0.2), ("b", 0.6)):
        folder = tmp_path / run / "evaluation"
        make(folder / "popularity.json", "popularity", skill=0.1, protocol=PROTOCOL)
        make(folder / "sft-direct.json", "direct", skill=skill, protocol=PROTOCOL, shuffled=run == "b")
    return tmp_path


def show(summary: dict[str, Any], width: int = 80) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(comparison_table(summary))
    return console.export_text()


def test_floors_of_the_same_data_are_there_once_and_models_by_run(runs: Path) -> None:
    results = read_results([str(runs / "a"), str(runs / "b" / "evaluation")])
    assert list(results) == ["popularity", "a/sft-direct", "b/sft-direct"]
    assert list(read_results([str(runs / "a")])) == ["popularity", "sft-direct"]
    single = read_results([f"one={runs / 'a'}", f"two={runs / 'b' / 'evaluation' / 'sft-direct.json'}"])
    assert list(single) == ["popularity", "one/sft-direct", "two"]
    make(runs / "b" / "evaluation" / "popularity.json", "popularity", skill=0.3, protocol=PROTOCOL)
    different = read_results([str(runs / "a"), str(runs / "b")])
    assert list(different) == ["a/popularity", "b/popularity", "a/sft-direct", "b/sft-direct"]


def test_differences_are_those_of_the_same_users_whatever_the_order_of_the_rows(runs: Path) -> None:
    results = read_results([str(runs / "a"), str(runs / "b")])
    summary = compare(results)
    assert summary["baseline"] == "a/sft-direct"
    assert summary["warnings"] == []
    hits = {
        name: {row["user"]: float(0 < rank_of(row["target"], row["recommended"]) <= 10) for row in one.rows}
        for name, one in results.items()
    }
    left = [hits["b/sft-direct"][row["user"]] for row in results["b/sft-direct"].rows]
    right = [hits["a/sft-direct"][row["user"]] for row in results["b/sft-direct"].rows]
    found = summary["results"]["b/sft-direct"]["differences"]["recall@10"]
    assert found["difference"] == pytest.approx((sum(left) - sum(right)) / 60)
    assert (found["low"], found["high"]) == pytest.approx(bootstrap_difference(left, right))
    assert found["p"] == pytest.approx(paired_test(left, right))
    assert found["p"] < 0.05
    assert "recall@10" in summary["results"]["b/sft-direct"]["best"]
    assert "differences" not in summary["results"]["a/sft-direct"]
    shown = show(summary)
    assert max(map(len, shown.splitlines())) <= 80
    assert "WARNING" not in shown
    other = compare(results, baseline="b/sft-direct")["results"]["a/sft-direct"]["differences"]["recall@10"]
    assert other["difference"] == pytest.approx(-found["difference"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"protocol": PROTOCOL | {"history": 50}}, "history is 50, not 20"),
        ({"protocol": PROTOCOL | {"drop_history": False}}, "drop history is False, not True"),
        ({"protocol": PROTOCOL | {"split": "val"}}, "split is 'val', not 'test'"),
        ({"protocol": PROTOCOL | {"candidates": "x"}, "users": 50}, "50 of 60 users in common"),
        ({"protocol": PROTOCOL, "first": 10}, "50 of 60 users in common"),
        ({"protocol": PROTOCOL, "shift": 1}, "60 users have another target"),
    ],
)
def test_what_was_measured_in_another_way_is_shown_but_never_paired(
    runs: Path, change: dict[str, Any], reason: str
) -> None:
    make(runs / "b" / "evaluation" / "sft-direct.json", "direct", skill=0.6, **change)
    summary = compare(read_results([str(runs / "a"), str(runs / "b")]))
    entry = summary["results"]["b/sft-direct"]
    assert "differences" not in entry
    assert entry["best"] == []
    assert reason in entry["not_paired"]
    shown = " ".join(show(summary).split())
    assert "WARNING: b/sft-direct cannot be compared with a/sft-direct" in shown
    assert reason in shown


DIFFERENT: dict[str, tuple[Any, Any]] = {
    "split": ("test", "val"),
    "held_out": ("leave-one-out", "temporal"),
    "history": (20, 5),
    "seen": ("all items before the target", "the items that the prompt shows"),
    "drop_history": (True, False),
    "candidates": ("all items", "some"),
    "items": (40, 41),
}


@pytest.mark.parametrize("key", [*DIFFERENT, *sorted(set(DECISIVE) - DIFFERENT.keys())])
def test_what_is_decisive_must_agree_and_for_baselines_less(runs: Path, key: str) -> None:
    here, there = DIFFERENT[key]
    for run, value in (("a", here), ("b", there)):
        for name, mode in (("sft-direct", "direct"), ("popularity", "popularity")):
            make(runs / run / "evaluation" / f"{name}.json", mode, skill=0.1, protocol=PROTOCOL | {key: value})
    a, b = (read_folder(runs / run / "evaluation") for run in "ab")
    told = [f"{key.replace('_', ' ')} is {there!r}, not {here!r}"]
    assert a["sft-direct"].disagreements(b["sft-direct"]) == told
    for one, other in (("sft-direct", "popularity"), ("popularity", "sft-direct"), ("popularity", "popularity")):
        assert a[one].disagreements(b[other]) == (told if key in ("drop_history", "items") else [])


def test_the_same_prompts_are_one_protocol_from_whatever_file(runs: Path) -> None:
    named = PROTOCOL | {"split": "as in the file", "held_out": "as in the file", "prompts_digest": "1"}
    for digest, disagreements in (("1", 0), ("2", 2)):
        made = PROTOCOL | {"split": "test", "held_out": "leave-one-out", "prompts_digest": digest}
        one, other = (make(runs / "x.json", "direct", skill=0.1, protocol=protocol) for protocol in (named, made))
        assert len(one.disagreements(other)) == disagreements


def test_warnings_of_one_reason_are_one_sentence(runs: Path) -> None:
    for name in ("x", "y"):
        make(runs / "b" / "evaluation" / f"{name}.json", "direct", skill=0.6, protocol=PROTOCOL | {"split": "val"})
    summary = compare(read_results([str(runs / "a"), str(runs / "b")]))
    assert summary["warnings"] == ["b/x and b/y cannot be compared with a/sft-direct: split is 'val', not 'test'"]
    # popularity has 2 tests (no reward), b/sft-direct has 3.
    assert summary["tests"] == 5
    assert "5 tests, not corrected" in " ".join(show(summary).split())


def test_the_protocol_is_told_once_and_by_name_where_it_differs(runs: Path) -> None:
    make(runs / "b" / "evaluation" / "sft-direct.json", "direct", skill=0.6, protocol=PROTOCOL | {"history": 5})
    shown = show(compare(read_results([str(runs / "a"), str(runs / "b")])))
    assert re.search(r"split +│ test ", shown)
    assert re.search(r"history +│ 20; b/sft-direct: 5 ", shown)


def test_labels_are_unique_and_given_names_are_kept(runs: Path) -> None:
    floor, model = (runs / "a" / "evaluation" / name for name in ("popularity.json", "sft-direct.json"))
    with pytest.raises(InputError, match="'popularity' is there twice; name the arguments, NAME=PATH"):
        read_results([str(floor), f"popularity={model}"])
    assert list(read_results([f"MyPop={floor}", str(model)])) == ["MyPop", "a/sft-direct"]
    assert list(read_results([str(runs / "b"), f"MyPop={floor}"])) == ["MyPop", "b/sft-direct"]
    make(runs / "c" / "a" / "evaluation" / "popularity.json", "popularity", skill=0.9, protocol=PROTOCOL)
    with pytest.raises(InputError, match="'a/popularity' is there twice"):
        read_results([str(runs / "a"), str(runs / "c" / "a")])


def test_equal_floors_are_there_once_whatever_their_protocol_and_order(runs: Path) -> None:
    make(runs / "b" / "evaluation" / "popularity.json", "popularity", skill=0.1,
         protocol=PROTOCOL | {"history": 5}, shuffled=True)  # fmt: skip
    assert list(read_results([str(runs / "a"), str(runs / "b")])) == ["popularity", "a/sft-direct", "b/sft-direct"]


def test_what_lists_do_not_reach_is_not_measured(runs: Path) -> None:
    made = make(runs / "a" / "evaluation" / "sft-direct.json", "direct", skill=0.2, protocol=PROTOCOL)
    short = Evaluation(made.metrics, {**made.settings, "beams": 20}, made.rows)
    assert short.values("recall@20") is not None
    assert short.values("recall@21") is None
    exhausted = Evaluation(made.metrics, {**made.settings, "beams": 30}, made.rows)
    values = exhausted.values("recall@30")
    assert values is not None
    assert values.tolist() == (exhausted.ranks > 0).tolist()


def damage_rows(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        rows = path.with_suffix(".rows.jsonl")
        rows.write_text("".join(change(rows.read_text().splitlines(keepends=True))))

    return damage


def damage_content(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_rows(lambda rows: rows[:-1]), "rows.jsonl: 59 rows, but the result is of 60 users; evaluate anew"),
        (damage_rows(lambda rows: [*rows[:-1], rows[0]]), "rows.jsonl: user '0' has 2 rows; evaluate anew"),
        (damage_rows(lambda rows: [rows[0].replace("recommended", "x"), *rows[1:]]), "recommended"),
        (damage_rows(lambda rows: [row.replace("recommended", "x") for row in rows]), "recommended"),
        (damage_rows(lambda rows: [*rows[:-1], rows[-1][:20]]), "not the result of an evaluation"),
        (damage_rows(lambda rows: [*rows[:-1], "3\n"]), "not the result of an evaluation"),
        (damage_content(lambda content: content["settings"].pop("users")), "users"),
        (damage_content(lambda content: content.update(metrics=[1])), "not the result of an evaluation"),
        (damage_content(lambda content: content.update(metrics={"recall@10": "x"})), "a metric is not a number"),
        (damage_content(lambda content: content.update(settings=[1])), "not the result of an evaluation"),
        (damage_content(lambda content: content.update(breakdown={"history length": [{}]})), "breakdown"),
        (damage_content(lambda content: content.pop("settings")), "settings"),
        (lambda path: path.with_suffix(".rows.jsonl").unlink(), "rows.jsonl: no such file; evaluate anew"),
    ],
)
def test_a_damaged_result_is_told_in_one_sentence(runs: Path, damage: Callable[[Path], None], message: str) -> None:
    path = runs / "a" / "evaluation" / "sft-direct.json"
    damage(path)
    with pytest.raises(InputError, match=message):
        Evaluation.load(path)
    with pytest.raises(InputError, match=message):
        read_folder(path.parent)


def test_json_files_that_are_no_results_are_passed_over(runs: Path) -> None:
    write_comparison(runs / "a" / "evaluation", compare(read_results([str(runs / "a")])))
    (runs / "a" / "evaluation" / "other.json").write_text("[1]")
    assert list(read_folder(runs / "a" / "evaluation")) == ["popularity", "sft-direct"]


def test_another_template_is_part_of_the_model(runs: Path) -> None:
    protocol = PROTOCOL | {"template": "b"}
    make(runs / "b" / "evaluation" / "sft-direct.json", "direct", skill=0.6, protocol=protocol)
    assert compare(read_results([str(runs / "a"), str(runs / "b")]))["warnings"] == []


def test_common_users_are_compared_when_asked_and_all_numbers_are_theirs(runs: Path) -> None:
    made = make(runs / "b" / "evaluation" / "sft-direct.json", "direct", skill=0.6, first=20, protocol=PROTOCOL)
    results = read_results([str(runs / "a" / "evaluation"), str(runs / "b" / "evaluation" / "sft-direct.json")])
    summary = compare(results, common_users=True)
    assert summary["common_users"] == 40
    assert summary["warnings"] == []
    entry = summary["results"]["b/sft-direct"]
    assert entry["settings"]["users"] == 40
    part = ranking_metrics([rank_of(row["target"], row["recommended"]) for row in made.rows if int(row["user"]) < 60])
    assert {metric: entry["metrics"][metric] for metric in part} == pytest.approx(part)
    assert "coverage@10" not in entry["metrics"]  # of all users, and so not of these
    assert sum(bucket["users"] for bucket in entry["breakdown"]["history length"]) == 40
    assert "recall@10" in entry["differences"]
    assert "40 users that all results have" in " ".join(show(summary).split())

    make(runs / "b" / "evaluation" / "sft-direct.json", "direct", skill=0.6, first=90, protocol=PROTOCOL)
    with pytest.raises(InputError, match="no user with the same target"):
        compare(read_results([str(runs / "a"), str(runs / "b")]), common_users=True)


def test_older_files_are_computed_from_their_rows(runs: Path) -> None:
    for path in runs.glob("*/evaluation/*.json"):
        content = json.loads(path.read_text())
        content["settings"].pop("protocol")
        kept = {key: value for key, value in content["metrics"].items() if "coverage" not in key}
        path.write_text(json.dumps({"metrics": kept, "settings": content["settings"]}))
        rows = [json.loads(line) for line in path.with_suffix(".rows.jsonl").read_text().splitlines()]
        old = [{key: row[key] for key in ("user", "target", "recommended", "rsvr") if key in row} for row in rows]
        path.with_suffix(".rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in old))
    summary = compare(read_results([str(runs / "a"), str(runs / "b")]))
    entry = summary["results"]["b/sft-direct"]
    assert set(entry["intervals_95"]) == {"recall@10", "ndcg@10", "rsvr"}
    assert set(entry["differences"]) == {"recall@10", "ndcg@10", "rsvr"}
    assert entry["breakdown"] == {}
    assert len(summary["warnings"]) == 1
    assert "the file tells no protocol" in summary["warnings"][0]
    write_comparison(runs / "out", summary)
    assert (runs / "out" / "compare.svg").read_text().startswith("<svg")


def test_other_lengths_are_measured_where_the_lists_are_long_enough(runs: Path) -> None:
    results = read_results([str(runs / "a"), str(runs / "b")])
    summary = compare(results, k=20)
    ranks = results["b/sft-direct"].ranks
    assert summary["results"]["b/sft-direct"]["metrics"]["recall@20"] == pytest.approx((ranks > 0).mean())
    assert "R@20" in show(summary)
    with pytest.raises(InputError, match=r"popularity: its lists hold 20 items, but recall@30"):
        compare(results, k=30)


def test_the_command_prints_the_table_and_writes_the_same_files_each_time(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for output in ("1", "2"):
        arguments = ["gream", "compare", str(runs / "a"), f"better={runs / 'b'}", "--output", str(runs / output)]
        monkeypatch.setattr("sys.argv", arguments)
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert not caught.value.code
    shown = capsys.readouterr().out
    assert "popularity" in shown
    assert "p=" in shown or "p<" in shown
    for name in ("compare.json", "compare.svg"):
        assert (runs / "1" / name).read_bytes() == (runs / "2" / name).read_bytes()
    picture = (runs / "1" / "compare.svg").read_text()
    for text in ("better/sft-direct", "recall@10 by history length", "recall@10 by popularity of the target"):
        assert text in picture


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (["a", "nowhere"], {}, "nowhere"),
        (["."], {}, "no result of an evaluation"),
        (["a", "a"], {}, "there twice"),
        (["a", "b"], {"baseline": "c"}, "no such result; there are popularity, a/sft-direct, b/sft-direct"),
    ],
)
def test_wrong_arguments_are_named(runs: Path, arguments: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        compare(read_results([str(runs / argument) for argument in arguments]), **options)
