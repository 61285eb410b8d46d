from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, reject
from hypothesis import strategies as st

from data_processing import interactions
from data_processing.interactions import (
    TimeSplit,
    deduplicate,
    k_core,
    ordered,
    prepare,
    sequences,
    sort_ids,
    statistics,
    training_pairs,
)
from data_processing.sources.tables import SourceTables, interactions_frame, items_frame
from gream_verl.core.data_folder import DataFolder, Item
from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, write_json
from gream_verl.core.split import read_splits

Rows = list[tuple[str, str, int, float | None]]
interaction_rows = st.lists(
    st.tuples(st.sampled_from("uvwxyz"), st.sampled_from("abcdef"), st.integers(0, 3), st.none()), max_size=60
)


def tables(rows: Rows, items: str = "abcdef") -> SourceTables:
    catalogue = {key: Item(f"Title {key}", categories=("Drama",)) for key in items}
    return SourceTables(interactions_frame(rows), items_frame(catalogue), {"rows": len(rows)}, [])


def slow_k_core(rows: Rows, core: int) -> Rows:
    while True:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        kept = [row for row in rows if users[row[0]] >= core and items[row[1]] >= core]
        if kept == rows:
            return rows
        rows = kept


@given(interaction_rows, st.integers(1, 4))
def test_k_core_equals_the_slow_one(rows: Rows, core: int) -> None:
    assert k_core(interactions_frame(rows), core).rows() == slow_k_core(rows, core)


@given(interaction_rows)
def test_deduplication_keeps_the_earliest_and_the_order(rows: Rows) -> None:
    best = {}
    for number, row in enumerate(rows):
        best.setdefault(row[:2], []).append((row[2], number))
    kept = sorted(min(times)[1] for times in best.values())
    assert deduplicate(interactions_frame(rows)).rows() == [rows[number] for number in kept]


@given(interaction_rows)
def test_sequences_are_in_time_order_and_ties_keep_the_order_of_the_file(rows: Rows) -> None:
    by_user = sequences(interactions_frame(rows))
    expected = {
        user: [row[1] for row in sorted((row for row in rows if row[0] == user), key=lambda row: row[2])]
        for user in sorted({row[0] for row in rows})
    }
    assert by_user == expected
    assert list(by_user) == list(expected)


@given(st.lists(st.tuples(st.sampled_from(["9", "10", "010", "x"]), st.text(max_size=2), st.integers(), st.none())))
def test_ordered_is_by_user_then_time_then_place_in_the_table(rows: Rows) -> None:
    rows = [row for row in rows if abs(row[2]) < 2**62]
    users = sort_ids({row[0] for row in rows})
    expected = sorted(rows, key=lambda row: (users.index(row[0]), row[2]))
    assert ordered(interactions_frame(rows)).rows() == expected


def test_ids_sort_as_numbers_only_where_all_are() -> None:
    assert sort_ids(["10", "9", "1"]) == ["1", "9", "10"]
    assert sort_ids(["10", "9", "a"]) == ["10", "9", "a"]
    assert sort_ids(["²", "1"]) == ["1", "²"]


def test_prepare_writes_filtered_ordered_files_and_counts_what_it_dropped(tmp_path: Path) -> None:
    rows: Rows = [(user, item, 10 - number, 5.0) for user in "uvw" for number, item in enumerate("abc")]
    rows += [("u", "a", 1, 1.0), ("x", "a", 1, 1.0), ("x", "untitled", 2, 1.0), ("w", "d", 3, 1.0)]
    folder = DataFolder(tmp_path, "D")
    report = prepare(tables(rows, "fcbad"), folder, core=3)
    assert folder.read_inter() == {"u": ["a", "c", "b"], "v": ["c", "b", "a"], "w": ["c", "b", "a"]}
    assert list(folder.read_items()) == ["a", "b", "c"]
    assert report == read_json(folder.report)
    assert report["dropped"] == {
        "interactions with an item that has no title": 1,
        "repeated interactions": 1,
        "interactions outside the core": 2,
        "users outside the core": 1,
        "items outside the core": 2,
    }
    assert report["statistics"] == {
        "users": 3,
        "items": 3,
        "interactions": 9,
        "sparsity": 0.0,
        "mean_length": 3.0,
        "longest": 3,
    }


def test_rejects_lie_beside_the_report_and_go_when_there_are_none(tmp_path: Path) -> None:
    rows: Rows = [("u", item, 1, None) for item in "abc"]
    rejects = [{"file": "R.json", "row": row, "reason": "not an object", "text": "\u2028é"} for row in (3, 9)]
    clean, folder = tables(rows), DataFolder(tmp_path, "D")
    report = prepare(replace(clean, rejects=rejects), folder, core=1)
    assert [json.loads(line) for line in folder.rejects.read_text(encoding="utf-8").split("\n")[:-1]] == rejects
    assert report["rejects_file"] == "D.rejects.jsonl"
    assert "rejects" not in read_json(folder.report)
    assert prepare(clean, folder, core=1)["rejects_file"] is None
    assert not folder.rejects.exists()
    with pytest.raises(InputError, match="is left"):
        prepare(replace(clean, rejects=rejects), folder, core=9)
    assert folder.rejects.exists()


def test_a_low_core_still_leaves_three_interactions_a_user(tmp_path: Path) -> None:
    rows: Rows = [("u", item, 1, None) for item in "abc"] + [("v", item, 1, None) for item in "ab"]
    folder = DataFolder(tmp_path, "D")
    report = prepare(tables(rows), folder, core=1)
    assert folder.read_inter() == {"u": ["a", "b", "c"]}
    assert report["dropped"]["users outside the core"] == 1


def test_nothing_left_is_one_sentence_and_leaves_earlier_files(tmp_path: Path) -> None:
    folder = DataFolder(tmp_path, "D")
    prepare(tables([("u", item, 1, None) for item in "abc"]), folder, core=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match=r"D: none of 2 interactions is left .* lower the core \(5\)"):
        prepare(tables([("u", "a", 1, None), ("u", "b", 2, None)]), folder)
    with pytest.raises(InputError, match="none of 0 interactions"):
        prepare(tables([]), folder)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_twice_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    rows: Rows = [(user, item, 1, None) for user in "uvwxyz" for item in "abcdef"]
    contents = []
    for name in ("one", "two"):
        prepare(tables(rows), DataFolder(tmp_path / name, "D"))
        contents.append({path.name: path.read_bytes() for path in sorted((tmp_path / name).iterdir())})
    assert contents[0] == contents[1]


def test_statistics_of_a_known_set() -> None:
    numbers = statistics({"u": ["a", "b", "c"], "v": ["a"]})
    assert numbers == {
        "users": 2,
        "items": 3,
        "interactions": 4,
        "sparsity": pytest.approx(1 / 3),
        "mean_length": 2.0,
        "longest": 3,
    }


def test_empty_tables_keep_their_types() -> None:
    assert interactions_frame([]).schema["timestamp"] == pl.Int64
    assert items_frame({}).schema["categories"] == pl.List(pl.String)


long_rows = st.lists(
    st.tuples(st.sampled_from("uvwxyz"), st.sampled_from("abcdefgh"), st.integers(0, 30), st.none()),
    min_size=20,
    max_size=80,
)


@given(rows=long_rows, shares=st.tuples(st.floats(0.05, 0.4), st.floats(0.05, 0.4)))
def test_training_ends_before_what_a_temporal_split_holds_out_of_anybody(
    tmp_path_factory: pytest.TempPathFactory, rows: Rows, shares: tuple[float, float]
) -> None:
    folder = DataFolder(tmp_path_factory.mktemp("data"), "D")
    try:
        report = prepare(tables(rows, "abcdefgh"), folder, core=1, split=TimeSplit(*shares))
    except InputError:  # of no user both sides of a moment are known: see the next test
        reject()
    first = {}
    for user, item, time, _ in rows:
        first[user, item] = min(first.get((user, item), time), time)
    by_user, split = folder.read_inter(), read_json(folder.split)
    training = {(user, item) for user, part in folder.read_training().items() for item in part}
    assert all((first[pair] < split["validation_from"]) == (pair in training) for pair in first)
    assert len(training) == report["split"]["training_interactions"]
    held_out = {"validation": 0, "test": 0}
    for user, (_, validation, test) in read_splits(folder.inter, by_user).items():
        if validation is not None:
            assert split["validation_from"] <= first[user, by_user[user][validation]] < split["test_from"]
        if test is not None:
            assert first[user, by_user[user][test]] >= split["test_from"]
        held_out["validation"] += validation is not None
        held_out["test"] += test is not None
    assert held_out == {part: report["split"][f"{part}_users"] for part in held_out}
    assert set(training_pairs(folder).iter_rows()) == training


def test_a_temporal_split_without_anybody_to_test_on_is_refused(tmp_path: Path) -> None:
    rows: Rows = [(user, item, place, None) for place, user in enumerate("uvwxyz") for item in "abc"]
    with pytest.raises(InputError, match=r"leaves 0 users for validation and 0 for the test: .* or leave-one-out"):
        prepare(tables(rows, "abc"), DataFolder(tmp_path, "D"), core=1, split=TimeSplit(0.3, 0.3))
    assert not list(tmp_path.glob("D.inter.json"))


@pytest.mark.parametrize("shares", [(0.0, 0.1), (0.1, 0.0), (0.5, 0.5), (-0.1, 0.2), (float("nan"), 0.1)])
def test_shares_that_leave_no_training_are_refused(shares: tuple[float, float]) -> None:
    with pytest.raises(InputError, match="leave no training"):
        TimeSplit(*shares)


def test_the_file_of_a_temporal_split_goes_with_it(tmp_path: Path) -> None:
    rows: Rows = [(user, item, number, None) for user in "uvw" for number, item in enumerate("abcdefgh")]
    folder = DataFolder(tmp_path, "D")
    report = prepare(tables(rows, "abcdefgh"), folder, core=1, split=TimeSplit(0.25, 0.25))
    assert report["split"] == {
        "kind": "temporal",
        "validation_from": 4,
        "test_from": 6,
        "training_interactions": 12,
        "validation_users": 3,
        "test_users": 3,
    }
    assert folder.read_training()["u"] == list("abcd")
    report = prepare(tables(rows, "abcdefgh"), folder, core=1)
    assert report["split"] == {"kind": "leave-one-out"}
    assert not folder.split.exists()
    assert folder.read_training()["u"] == list("abcdef")


def test_a_dry_run_counts_and_writes_nothing(tmp_path: Path) -> None:
    rows: Rows = [(user, item, number, None) for user in "uvw" for number, item in enumerate("abcd")]
    rejects = [{"file": "r.json", "row": 3, "reason": "not an object", "text": "{"}]
    source = replace(tables(rows, "abcd"), rejects=rejects)
    folder = DataFolder(tmp_path / "data", "D")
    report = prepare(source, folder, core=2, dry_run=True)
    assert not folder.root.exists()
    assert report == prepare(source, folder, core=2)


@given(rows=interaction_rows, core=st.integers(1, 3), shortest=st.integers(1, 4))
def test_a_core_with_longer_users_still_is_a_core(rows: Rows, core: int, shortest: int) -> None:
    kept = k_core(interactions_frame(rows), core, shortest)
    for column, least in (("user", max(core, shortest)), ("item", core)):
        assert all(count >= least for count in kept[column].value_counts()["count"])


def test_prepared_anew_no_review_and_no_split_of_before_is_left(tmp_path: Path) -> None:
    rows: Rows = [(user, item, number, None) for user in "uvw" for number, item in enumerate("abcdefgh")]
    folder = DataFolder(tmp_path, "D")
    prepare(tables(rows, "abcdefgh"), folder, core=1)
    folder.reviews.touch()
    prepare(tables(rows, "abcdefgh"), folder, core=1, split=TimeSplit(0.25, 0.25))
    assert not folder.reviews.exists()


def test_a_kill_between_the_files_of_a_temporal_split_is_not_taken_for_leave_one_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: Rows = [(user, item, number, None) for user in "uvw" for number, item in enumerate("abcdefgh")]
    folder = DataFolder(tmp_path, "D")

    def stop(path: Path, *_: object, **__: object) -> None:
        if path == folder.inter:
            raise KeyboardInterrupt
        write_json(path, *_, **__)

    monkeypatch.setattr(interactions, "write_json", stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(tables(rows, "abcdefgh"), folder, core=1, split=TimeSplit(0.25, 0.25))
    assert folder.split.exists()
    assert not folder.inter.exists()
