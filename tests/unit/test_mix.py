from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from small_data import make_data

from data_processing.layout import DataFolder
from data_processing.sft import mix
from data_processing.sft.curriculum import curriculum_order
from data_processing.sft.mix import SCHEMA, LengthLimit, write_mix
from data_processing.sft.tasks import TASKS, Row
from gream_verl.files import InputError, read_json, write_json

ROWS = dict.fromkeys(TASKS, 40)


def words(row: Row) -> int:
    return len(row.system.split()) + len(row.user.split()) + row.user.count("<|") + row.assistant.count("<|")


def test_the_file_is_what_llama_factory_reads(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    report = write_mix(folder, rows=ROWS, seed=0)
    table = pl.read_parquet(folder.mix)
    assert pq.read_schema(folder.mix).equals(SCHEMA)
    assert dict(table.group_by("task").len().iter_rows()) == report["rows"] == ROWS
    for conversation in table["conversations"].to_list():
        assert [turn["from"] for turn in conversation] == ["human", "gpt"]
    assert report["leaks"] == {"rate": 0.0}
    assert read_json(folder.dataset_info) == {
        "small-mix": {
            "file_name": "small-mix.parquet",
            "formatting": "sharegpt",
            "columns": {"messages": "conversations", "system": "system"},
        }
    }


def test_other_entries_of_dataset_info_stay(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    write_json(folder.dataset_info, {"mine": {"file_name": "x.json"}})
    write_mix(folder, rows={"seqrec": 3}, seed=0)
    assert set(read_json(folder.dataset_info)) == {"mine", "small-mix"}


def test_no_held_out_interaction_is_in_a_row_about_users(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    write_mix(folder, rows=dict.fromkeys(TASKS, 10_000), seed=0)
    index, items = folder.read_index(folder.read_items()), folder.read_items()
    held_out = [str(number) for number in range(50, 60)]
    table = pl.read_parquet(folder.mix).filter(~pl.col("task").is_in(["item2index", "index2item", "itemfeatureobtain"]))
    assert len(table) > 200
    text = "\n".join(turn["value"] for turns in table["conversations"].to_list() for turn in turns)
    for item in held_out:
        assert index.text(item) not in text
        assert items[item].title not in text


def test_the_same_seed_gives_the_same_bytes_in_chunks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_data(tmp_path)
    contents = []
    for seed in (0, 0, 1):
        write_mix(folder, rows=ROWS, seed=seed)
        contents.append(folder.mix.read_bytes())
    assert contents[0] == contents[1] != contents[2]
    whole = pl.read_parquet(folder.mix)
    monkeypatch.setattr(mix, "CHUNK", 7)
    write_mix(folder, rows=ROWS, seed=1)
    assert pl.read_parquet(folder.mix).equals(whole)
    assert pq.ParquetFile(folder.mix).num_row_groups == -(-len(whole) // 7)


def test_rows_are_in_the_order_of_the_curriculum(tmp_path: Path) -> None:
    folder = make_data(tmp_path, users=60)
    report = write_mix(folder, rows={"reasoning": 90, "seqrec": 270}, seed=5)
    written = (pl.read_parquet(folder.mix)["task"] == "reasoning").to_numpy()
    expected = curriculum_order([report["rows"]["seqrec"]], report["rows"]["reasoning"], seed=5) >= 270
    assert np.array_equal(written, expected)


def test_rows_of_a_block_are_of_one_task(tmp_path: Path) -> None:
    folder = make_data(tmp_path, users=60)
    report = write_mix(folder, rows={"reasoning": 90, "seqrec": 270, "item2index": 30}, seed=5, block=8)
    tasks = pl.read_parquet(folder.mix)["task"].to_list()
    whole = sum(size // 8 for size in report["rows"].values())
    assert all(len(set(tasks[start : start + 8])) == 1 for start in range(0, 8 * whole, 8))
    assert len(tasks) == sum(report["rows"].values())


def test_what_one_task_draws_does_not_change_another(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    drawn = []
    for rows in ({"seqrec": 20}, {"seqrec": 20, "item2index": 30, "reasoning": 10}):
        write_mix(folder, rows=rows, seed=0)
        seqrec = pl.read_parquet(folder.mix).filter(task="seqrec")
        drawn.append(sorted(turns[0]["value"] for turns in seqrec["conversations"].to_list()))
    assert drawn[0] == drawn[1]


def test_more_rows_than_exist_are_clamped(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    targets = sum(max(len(sequence) - 3, 0) for sequence in folder.read_inter().values())
    assert write_mix(folder, rows={"seqrec": 10**6}, seed=0)["rows"] == {"seqrec": targets}


def test_chains_that_leak_are_replaced_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_data(tmp_path)
    calls = iter(range(10**6))
    monkeypatch.setattr(mix, "find_leak", lambda chain, **target: "title" if next(calls) % 4 == 0 else None)
    report = write_mix(folder, rows={"reasoning": 9}, seed=0)
    assert report["rows"] == {"reasoning": 9}
    assert report["leaks"] == {"title": 3, "rate": 0.25}


def test_histories_are_shortened_by_whole_items_until_rows_fit(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    free = write_mix(folder, rows=ROWS, seed=0, limit=LengthLimit(words, 10**6))["tokens"]
    assert (free["shortened"], free["left out"]) == (0, 0)
    limit = int(free["median"])
    tight = write_mix(folder, rows=ROWS, seed=0, limit=LengthLimit(words, limit))["tokens"]
    assert tight["longest"] <= limit < free["longest"]
    assert tight["shortened"] > 0
    table = pl.read_parquet(folder.mix)
    assert len(table) == sum(ROWS.values()) - tight["left out"]
    for system, turns in table.select("system", "conversations").iter_rows():
        assert words(Row(turns[0]["value"], turns[1]["value"], "", system)) <= limit


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"seqrek": 5}, "SFT task 'seqrek': unknown; did you mean 'seqrec'"),
        ({"xyz": 5}, "SFT task 'xyz': unknown; choose from seqrec, item2index"),
        ({}, "no rows to write"),
        ({"seqrec": 0}, "no rows to write"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(tmp_path: Path, rows: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_mix(make_data(tmp_path), rows=rows, seed=0)


def test_an_index_that_lacks_an_item_leaves_the_earlier_mix(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    write_mix(folder, rows=ROWS, seed=0)
    before = folder.mix.read_bytes()
    index = read_json(folder.index)
    del index["3"]
    write_json(folder.index, index)
    with pytest.raises(InputError, match="no SID for item '3'"):
        write_mix(folder, rows=ROWS, seed=1)
    assert folder.mix.read_bytes() == before


def test_a_failure_half_way_leaves_the_earlier_mix_and_no_piece(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_data(tmp_path)
    write_mix(folder, rows=ROWS, seed=0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(mix, "CHUNK", 10)
    records = iter([mix._record(Row("q", "a", "t"))] * 50)
    monkeypatch.setattr(mix, "_record", lambda row: records.__next__())
    with pytest.raises(StopIteration):
        write_mix(folder, rows=ROWS, seed=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_full_disk_is_one_sentence_and_leaves_the_earlier_mix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: pq.ParquetWriter, table: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = make_data(tmp_path)
    write_mix(folder, rows=ROWS, seed=0)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr(pq.ParquetWriter, "write_table", full)
    with pytest.raises(
        InputError, match=r"small-mix\.parquet: cannot be written \(No space left on device\); free some"
    ):
        write_mix(folder, rows=ROWS, seed=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    elsewhere = DataFolder(tmp_path / "small.inter.json", "small")
    with pytest.raises(InputError):
        write_mix(elsewhere, rows=ROWS, seed=0)
    assert not folder.mix.exists()
