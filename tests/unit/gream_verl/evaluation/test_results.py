from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation_files import PROTOCOL, make_evaluation
from hypothesis import given, settings
from hypothesis import strategies as st

from gream_verl.core.errors import InputError
from gream_verl.evaluation.results import DECISIVE, Evaluation, merged, read_folder


@pytest.fixture
def result(tmp_path: Path) -> Path:
    path = tmp_path / "sft-direct.json"
    make_evaluation("direct", users=60).save(path)
    return path


def test_a_result_is_read_as_it_was_saved(result: Path) -> None:
    made = make_evaluation("direct", users=60)
    assert Evaluation.load(result) == made
    assert made.intervals


DIFFERENT: dict[str, tuple[Any, Any]] = {
    "seen": ("all items before the target", "the items that the prompt shows"),
    "drop_history": (True, False),
    "history": (20, 5),
    "items": (40, 41),
}


@pytest.mark.parametrize("key", [*DIFFERENT, *sorted(set(DECISIVE) - DIFFERENT.keys())])
def test_what_is_decisive_must_agree_and_for_baselines_less(key: str) -> None:
    here, there = DIFFERENT[key]
    a, b = (
        {mode: make_evaluation(mode, protocol=PROTOCOL | {key: value}) for mode in ("direct", "popularity")}
        for value in (here, there)
    )
    told = [f"{key.replace('_', ' ')} is {there!r}, not {here!r}"]
    assert a["direct"].disagreements(b["direct"]) == told
    for one, other in (("direct", "popularity"), ("popularity", "direct"), ("popularity", "popularity")):
        assert a[one].disagreements(b[other]) == (told if key in ("drop_history", "items") else [])


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ({"users": 50}, ["50 of 60 users in common"]),
        ({"shift": 1}, ["60 users have another target"]),
        ({"protocol": PROTOCOL | {"template": "b"}}, []),  # it is part of the model
        ({"protocol": {}}, []),
    ],
)
def test_users_and_targets_must_be_the_same(change: dict[str, Any], reasons: list[str]) -> None:
    assert make_evaluation("direct").disagreements(make_evaluation("direct", **change)) == reasons


def test_what_lists_do_not_reach_is_not_known() -> None:
    made = make_evaluation("direct")
    short = Evaluation(made.metrics, {**made.settings, "beams": 20}, made.rows)
    assert short.values("recall@20") is not None
    assert short.values("recall@21") is short.values("nothing") is None
    exhausted = Evaluation(made.metrics, {**made.settings, "beams": 30}, made.rows)
    values = exhausted.values("recall@30")
    assert values is not None
    assert values.tolist() == (exhausted.ranks > 0).tolist()


def rows(change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        file = path.with_suffix(".rows.jsonl")
        file.write_text("".join(change(file.read_text().splitlines(keepends=True))))

    return damage


def content(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        kept = json.loads(path.read_text())
        change(kept)
        path.write_text(json.dumps(kept))

    return damage


@pytest.mark.parametrize(
    "damage",
    [
        rows(lambda rows: rows[:-1]),
        rows(lambda rows: [*rows[:-1], rows[0]]),
        rows(lambda rows: [rows[0].replace("recommended", "x"), *rows[1:]]),
        rows(lambda rows: [*rows[:-1], rows[-1][:20]]),
        rows(lambda rows: [*rows[:-1], "3\n"]),
        rows(lambda rows: [json.dumps(json.loads(rows[0]) | {"recommended": ["1", "1"]}) + "\n", *rows[1:]]),
        content(lambda kept: kept["settings"].pop("users")),
        content(lambda kept: kept["metrics"].update({"recall@10": kept["metrics"]["recall@10"] + 0.001})),
        content(lambda kept: kept.update(metrics=[1])),
        content(lambda kept: kept.update(metrics={"recall@10": "x"})),
        content(lambda kept: kept.update(settings=[1])),
        content(lambda kept: kept.pop("settings")),
        lambda path: path.write_text("{"),
    ],
)
def test_a_damaged_result_is_named(result: Path, damage: Callable[[Path], None]) -> None:
    damage(result)
    with pytest.raises(InputError, match=r"sft-direct\.json: not "):
        Evaluation.load(result)
    with pytest.raises(InputError, match=r"sft-direct\.json: not "):
        read_folder(result.parent)


def test_a_folder_is_read_baselines_first_and_other_files_are_passed_over(result: Path) -> None:
    for name in ("gru4rec", "co-occurrence", "popularity-val", "popularity"):
        make_evaluation(name).save(result.parent / f"{name}.json")
    (result.parent / "other.json").write_text("[1]")
    assert list(read_folder(result.parent)) == [
        "popularity", "popularity-val", "co-occurrence", "gru4rec", "sft-direct",
    ]  # fmt: skip
    result.with_suffix(".rows.jsonl").unlink()
    with pytest.raises(InputError, match=r"rows\.jsonl: no such file"):
        Evaluation.load(result)


@settings(max_examples=25)
@given(st.lists(st.permutations("abcdefgh"), min_size=2, max_size=2), st.integers(2, 6), st.integers(2, 6))
def test_merged_lists_take_both_in_turn_and_no_item_twice(lists, one, other):
    first, second = lists[0][:one], lists[1][:other]
    results = [
        Evaluation({}, {"mode": mode, "users": 1}, [{"user": "u", "target": "c", "recommended": some}])
        for mode, some in (("direct", first), ("reasoning", second))
    ]
    both = merged(*results)
    (row,) = both.rows
    assert len(row["recommended"]) == len(set(row["recommended"])) == min(one, other)
    assert row["recommended"][:1] == first[:1]
    assert set(row["recommended"]) <= {*first, *second}
    in_turn = [item for pair in zip(first, second, strict=False) for item in pair]
    assert row["recommended"] == sorted(row["recommended"], key=in_turn.index)
    found = row["recommended"].index("c") + 1 if "c" in row["recommended"] else 99
    assert both.metrics["recall@5"] == (found <= 5)
    assert not both.is_baseline
