from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from datetime import date
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from data_processing import interactions
from data_processing.interactions import TimeSplit, deduplicate, k_core, ordered, prepare, sort_ids, statistics
from data_processing.sources.common import INTERACTIONS, SourceTables, items_frame
from gream_verl.core.data_folder import DataFolder, Item
from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, write_json

Rows = list[tuple[str, str, int]]
interaction_rows = st.lists(
    st.tuples(st.sampled_from("uvwxyz"), st.sampled_from("abcdef"), st.integers(0, 3)), max_size=60
)
FULL: Rows = [(user, item, number) for user in "uvw" for number, item in enumerate("abcdefgh")]


def frame(rows: Rows) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=INTERACTIONS, orient="row")


def tables(rows: Rows, items: str = "abcdefgh") -> SourceTables:
    catalogue = {key: Item(f"Title {key}", categories=("Drama",)) for key in items}
    return SourceTables(frame(rows), items_frame(catalogue), {"rows": len(rows)}, [])


def slow_k_core(rows: Rows, core: int, shortest: int) -> Rows:
    while True:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        kept = [row for row in rows if users[row[0]] >= max(core, shortest) and items[row[1]] >= core]
        if kept == rows:
            return rows
        rows = kept


@settings(max_examples=25)
@given(interaction_rows, st.integers(1, 4), st.integers(1, 4))
def test_k_core_equals_the_slow_one(rows: Rows, core: int, shortest: int) -> None:
    assert k_core(frame(rows), core, shortest).rows() == slow_k_core(rows, core, shortest)


@settings(max_examples=25)
@given(interaction_rows)
def test_deduplication_keeps_the_earliest_and_the_order(rows: Rows) -> None:
    times: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for number, (user, item, time) in enumerate(rows):
        times.setdefault((user, item), []).append((time, number))
    kept = sorted(min(pairs)[1] for pairs in times.values())
    assert deduplicate(frame(rows)).rows() == [rows[number] for number in kept]


@settings(max_examples=25)
@given(
    st.lists(st.tuples(st.sampled_from(["9", "10", "010", "x"]), st.sampled_from("ab"), st.integers(-(2**60), 2**60)))
)
def test_ordered_is_by_user_then_time_then_row(rows: Rows) -> None:
    users = sort_ids({row[0] for row in rows})
    assert ordered(frame(rows)).rows() == sorted(rows, key=lambda row: (users.index(row[0]), row[2]))


def test_ids_sort_as_numbers_only_where_all_are() -> None:
    assert sort_ids(["10", "9", "1"]) == ["1", "9", "10"]
    assert sort_ids(["10", "9", "a"]) == ["10", "9", "a"]
    assert sort_ids(["²", "1"]) == ["1", "²"]


def test_prepare_writes_filtered_ordered_files_and_counts_what_it_dropped(tmp_path: Path) -> None:
    rows: Rows = [(user, item, 10 - number) for user in "uvw" for number, item in enumerate("abc")]
    rows += [("u", "a", 1), ("x", "a", 1), ("x", "untitled", 2), ("w", "d", 3)]
    folder = DataFolder(tmp_path, "D")
    report = prepare(tables(rows, "fcbad"), folder, core=3)
    assert folder.read_inter() == {"u": ["a", "c", "b"], "v": ["c", "b", "a"], "w": ["c", "b", "a"]}
    assert list(folder.read_items()) == ["a", "b", "c"]
    assert report == read_json(folder.report)
    assert report["dropped"] == {
        "items without a title, such as untitled": 1,
        "interactions with an item that has no title": 1,
        "repeated interactions": 1,
        "interactions outside the core": 2,
        "users outside the core": 1,
        "items outside the core": 2,
    }
    assert report["statistics"] == statistics(folder.read_inter())
    contents = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    prepare(tables(rows, "fcbad"), folder, core=3)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == contents


def test_rejects_lie_next_to_the_report_and_go_when_there_are_none(tmp_path: Path) -> None:
    rejects: list[dict[str, str | int]] = [
        {"file": "R.json", "row": row, "reason": "not an object", "text": "\u2028é"} for row in (3, 9)
    ]
    clean, folder = tables(FULL), DataFolder(tmp_path, "D")
    report = prepare(replace(clean, rejects=rejects), folder, core=1)
    assert [json.loads(line) for line in folder.rejects.read_text(encoding="utf-8").split("\n")[:-1]] == rejects
    assert report["rejects_file"] == "D.rejects.jsonl"
    assert prepare(clean, folder, core=1)["rejects_file"] is None
    assert not folder.rejects.exists()
    with pytest.raises(InputError, match="is left"):
        prepare(replace(clean, rejects=rejects), folder, core=9)
    assert folder.rejects.exists()


def test_a_low_core_still_leaves_three_interactions_per_user(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path, "D")
    report = prepare(tables([("u", item, 1) for item in "abc"] + [("v", item, 1) for item in "ab"]), folder, core=1)
    assert folder.read_inter() == {"u": ["a", "b", "c"]}
    assert report["dropped"]["users outside the core"] == 1


def test_nothing_left_is_one_sentence_and_leaves_earlier_files(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path, "D")
    prepare(tables([("u", item, 1) for item in "abc"]), folder, core=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"D: none of 2 interactions is left .* lower the core \(5\)"):
        prepare(tables([("u", "a", 1), ("u", "b", 2)]), folder)
    with pytest.raises(InputError, match="none of 0 interactions"):
        prepare(tables([]), folder)
    message = (
        "no item of the interactions, such as 00001, 00002, is among the items with a title, such as a, b, c; check"
    )
    with pytest.raises(InputError, match=message):
        prepare(tables([("u", "00001", 1), ("u", "00002", 2)]), folder)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_statistics_of_a_known_set() -> None:
    assert statistics({"u": ["a", "b", "c"], "v": ["a"]}) == {
        "users": 2, "items": 3, "interactions": 4, "sparsity": pytest.approx(1 / 3), "mean_length": 2.0, "longest": 3,
    }  # fmt: skip


@settings(max_examples=15)
@given(
    rows=st.lists(
        st.tuples(st.sampled_from("uvwxyz"), st.sampled_from("abcdefgh"), st.integers(0, 30)), min_size=20, max_size=80
    ),
    shares=st.tuples(st.floats(0.05, 0.4), st.floats(0.05, 0.4)),
)
def test_training_ends_before_the_held_out_time_of_anybody(
    tmp_path_factory: pytest.TempPathFactory, rows: Rows, shares: tuple[float, float]
) -> None:
    folder = DataFolder(tmp_path_factory.mktemp("data"), "D")
    try:
        report = prepare(tables(rows), folder, core=1, split=TimeSplit(*shares))
    except InputError:  # no user has interactions on both sides of a moment: see the next test
        reject()
    first: dict[tuple[str, str], int] = {}
    for user, item, time in rows:
        first[user, item] = min(first.get((user, item), time), time)
    by_user, split = folder.read_inter(), read_json(folder.split)
    training = {(user, item) for user, part in folder.read_training().items() for item in part}
    assert all((first[pair] < split["validation_from"]) == (pair in training) for pair in first)
    assert len(training) == report["split"]["training_interactions"]
    held_out = {"validation": 0, "test": 0}
    for user, (_, validation, test) in folder.read_splits(by_user).items():
        if validation is not None:
            assert split["validation_from"] <= first[user, by_user[user][validation]] < split["test_from"]
        if test is not None:
            assert first[user, by_user[user][test]] >= split["test_from"]
        held_out["validation"] += validation is not None
        held_out["test"] += test is not None
    assert held_out == {part: report["split"][f"{part}_users"] for part in held_out}


def test_a_temporal_split_without_anybody_to_test_on_is_refused(tmp_path: Path) -> None:
    rows: Rows = [(user, item, time) for time, user in enumerate("uvwxyz") for item in "abc"]
    with pytest.raises(InputError, match=r"leaves 0 users for validation and 0 for the test; choose other shares"):
        prepare(tables(rows), DataFolder(tmp_path, "D"), core=1, split=TimeSplit(0.3, 0.3))
    assert not list(tmp_path.glob("D.inter.json"))
    for shares in [(0.0, 0.1), (0.1, 0.0), (0.5, 0.5), (-0.1, 0.2), (float("nan"), 0.1)]:
        with pytest.raises(InputError, match="leave no training"):
            prepare(tables(FULL), DataFolder(tmp_path, "D"), core=1, split=TimeSplit(*shares))


@pytest.mark.parametrize("unit", [1, 1000, 10**6, 10**9])
def test_the_parts_of_a_temporal_split_begin_on_days(tmp_path: Path, unit: int) -> None:
    second = {"2017-12-31": 1514764799, "2018-01-01": 1514764800, "2018-06-30": 1530403199, "2018-07-01": 1530403200}
    rows = [(user, item, time * unit) for user in "uv" for item, time in zip("abcd", second.values(), strict=True)]
    folder = DataFolder(tmp_path, "D")
    prepare(tables(rows), folder, core=1, split=TimeSplit(date(2018, 1, 1), date(2018, 7, 1)))
    assert read_json(folder.split)["users"] == {"u": [1, 1, 3], "v": [1, 1, 3]}
    prepare(tables(rows), folder, core=1, split=TimeSplit(0.5, date(2018, 7, 1)))
    assert read_json(folder.split)["users"] == {"u": [1, 1, 3], "v": [1, 1, 3]}
    for validation, test in [(date(2018, 7, 1), date(2018, 1, 1)), (date(2018, 1, 1), date(2019, 1, 1))]:
        with pytest.raises(InputError, match="leave no training or nothing to test"):
            prepare(tables(rows), folder, core=1, split=TimeSplit(validation, test))
    with pytest.raises(InputError, match="times such as 4 are no dates; give shares"):
        prepare(tables(FULL), folder, core=1, split=TimeSplit(0.1, date(2018, 1, 1)))


def test_the_files_of_a_temporal_split_go_with_it(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path, "D")
    prepare(tables(FULL), folder, core=1)
    folder.reviews.touch()
    report = prepare(tables(FULL), folder, core=1, split=TimeSplit(0.25, 0.25))
    assert not folder.reviews.exists()
    assert report["split"] == {
        "kind": "temporal", "validation_from": 4, "test_from": 6, "training_interactions": 12, "validation_users": 3,
        "test_users": 3,
    }  # fmt: skip
    assert folder.read_training()["u"] == list("abcd")
    assert prepare(tables(FULL), folder, core=1)["split"] == {"kind": "leave-one-out"}
    assert not folder.split.exists()
    assert folder.read_training()["u"] == list("abcdef")


def test_a_kill_between_the_files_of_a_temporal_split_is_not_taken_for_leave_one_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = DataFolder(tmp_path, "D")

    def stop(path: Path, *_: object, **__: object) -> None:
        if path == folder.inter:
            raise KeyboardInterrupt
        write_json(path, *_, **__)  # type: ignore[arg-type]

    monkeypatch.setattr(interactions, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(tables(FULL), folder, core=1, split=TimeSplit(0.25, 0.25))
    assert folder.split.exists()
    assert not folder.inter.exists()


def test_a_dry_run_counts_and_writes_nothing(tmp_path: Path) -> None:
    source = replace(tables(FULL), rejects=[{"file": "r.json", "row": 3, "reason": "not an object", "text": "{"}])
    folder = DataFolder(tmp_path / "data", "D")
    report = prepare(source, folder, core=2, dry_run=True)
    assert not folder.root.exists()
    assert report == prepare(source, folder, core=2)
