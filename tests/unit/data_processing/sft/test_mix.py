from __future__ import annotations

import errno
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import make_data

from data_processing.layout import CHAINS
from data_processing.sft import mix
from data_processing.sft.chain_leaks import ChainLeaks
from data_processing.sft.corpus import Corpus
from data_processing.sft.curriculum import curriculum_order
from data_processing.sft.lengths import LengthLimit
from data_processing.sft.mix import SCHEMA, asked_rows, plan_mix, write_mix
from data_processing.sft.tasks import REASONING, TASKS, Row
from gream_verl.core.data_folder import DataFolder, Item
from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, write_json
from gream_verl.core.prompts import SYSTEM
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.core.split import split_file

ROWS = dict.fromkeys(TASKS, 40)


def words(rows: Sequence[Row]) -> list[int]:
    return [len(f"{row.system} {row.user} {row.assistant}".replace("<|a", " <|a").split()) for row in rows]


def made(report: dict[str, Any]) -> dict[str, int]:
    return {task: counts["made"] for task, counts in report["tasks"].items()}


def test_the_file_is_what_llama_factory_reads(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    report = write_mix(folder, rows=ROWS, seed=0)
    table = pl.read_parquet(folder.mix)
    assert pq.read_schema(folder.mix).equals(SCHEMA)
    assert dict(table.group_by("task").len().iter_rows()) == made(report) == ROWS
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


def test_the_same_seed_gives_the_same_bytes_in_chunks_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_data(tmp_path)
    files = [folder.mix, folder.mix.with_suffix(".json"), folder.mix.with_suffix(".png")]
    contents = []
    for seed in (0, 0, 1):
        write_mix(folder, rows=ROWS, seed=seed, limit=LengthLimit(words, 40))
        contents.append([file.read_bytes() for file in files])
    assert contents[0] == contents[1] != contents[2]
    whole = pl.read_parquet(folder.mix)
    monkeypatch.setattr(mix, "CHUNK", 7)
    write_mix(folder, rows=ROWS, seed=1, limit=LengthLimit(words, 40))
    assert pl.read_parquet(folder.mix).equals(whole)
    assert [file.read_bytes() for file in files[1:]] == contents[2][1:]
    assert pq.ParquetFile(folder.mix).num_row_groups == -(-sum(ROWS.values()) // 7)


def test_rows_are_in_the_order_of_the_curriculum(tmp_path: Path) -> None:
    folder = make_data(tmp_path, users=60)
    report = write_mix(folder, rows={"reasoning": 90, "seqrec": 270}, seed=5)
    written = (pl.read_parquet(folder.mix)["task"] == "reasoning").to_numpy()
    expected = curriculum_order([made(report)["seqrec"]], made(report)["reasoning"], seed=5) >= 270
    assert np.array_equal(written, expected)


def test_rows_of_a_block_are_of_one_task(tmp_path: Path) -> None:
    folder = make_data(tmp_path, users=60)
    report = write_mix(folder, rows={"reasoning": 90, "seqrec": 270, "item2index": 30}, seed=5, block=8)
    tasks = pl.read_parquet(folder.mix)["task"].to_list()
    whole = sum(size // 8 for size in made(report).values())
    assert all(len(set(tasks[start : start + 8])) == 1 for start in range(0, 8 * whole, 8))
    assert len(tasks) == sum(made(report).values())


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
    counts = write_mix(folder, rows={"seqrec": 10**6}, seed=0)["tasks"]["seqrec"]
    assert counts == {"asked": 10**6, "exist": targets, "made": targets}


def test_rows_are_asked_for_by_count_by_share_of_what_exists_or_by_share_of_a_total() -> None:
    exist = {"seqrec": 200, "reasoning": 50}
    assert asked_rows({"seqrec": 300, "reasoning": 1}, exist) == {"seqrec": 300, "reasoning": 1}
    assert asked_rows({"seqrec": 0.25, "reasoning": 1.0}, exist) == {"seqrec": 50, "reasoning": 50}
    assert asked_rows({"seqrec": 0.75, "reasoning": 0.25}, exist, total=1000) == {"seqrec": 750, "reasoning": 250}
    assert asked_rows({"seqrec": 3, "reasoning": 1}, exist, total=10) == {"seqrec": 8, "reasoning": 2}
    assert asked_rows({}, exist, total=10) == {}


@given(
    st.dictionaries(st.sampled_from(list(TASKS)), st.integers(0, 9) | st.floats(0, 9), min_size=1), st.integers(0, 999)
)
def test_a_total_is_shared_out_whole(weights: dict[str, int | float], total: int) -> None:
    asked = asked_rows(weights, {}, total)
    whole = sum(weights.values())
    assert sum(asked.values()) == (total if whole else 0)
    assert all(abs(asked[task] - total * weights[task] / (whole or 1)) <= 1 for task in weights)


def test_a_dry_run_says_what_would_be_made_and_writes_nothing(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    rows = {"seqrec": 0.5, "item2index": 10, "reasoning": 10**6}
    planned = write_mix(folder, rows=rows, seed=0, dry_run=True)
    assert {path.name for path in tmp_path.iterdir()} == before
    assert planned == write_mix(folder, rows=rows, seed=0)


def test_the_report_is_kept_beside_the_mix(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    report = write_mix(folder, rows=ROWS, seed=0, limit=LengthLimit(words, 40))
    assert read_json(folder.mix.with_suffix(".json")) == report
    assert set(report["tasks"]["seqrec"]) == {
        "asked", "exist", "made", "median", "95%", "longest", "shortened", "left out"
    }  # fmt: skip
    assert folder.mix.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_chains_that_leak_are_replaced_and_counted(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    items = read_json(folder.item)
    for item in ("5", "6", "7", "8", "9", "10"):
        items[item]["title"] = items[item]["categories"][0]
    write_json(folder.item, items)
    every = write_mix(folder, rows={"reasoning": 1.0}, seed=0)
    leaks = every["leaks"]["title"]
    assert leaks > 2
    assert made(every)["reasoning"] == every["tasks"]["reasoning"]["exist"] - leaks
    assert every["leaks"]["rate"] == leaks / every["tasks"]["reasoning"]["exist"]
    some = write_mix(folder, rows={"reasoning": 9}, seed=0)
    assert made(some) == {"reasoning": 9}
    assert some["leaks"].get("title", 0) < leaks


def test_what_a_language_model_wrote_is_read_from_the_folder(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    sequences, index = folder.read_inter(), folder.read_index(folder.read_items())
    user = max(sequences, key=lambda user: len(sequences[user]))
    item = sequences[user][5]
    texts = {user: ["Likes quiet films."]}
    write_json(
        folder.user_texts,
        {"user_explicit_preference": texts, "user_vague_intention": {"train": {user: ["a quiet film"]}}},
    )
    chain = {"user": user, "position": 5, "item": item, "history": 5}
    thought = {"evidence": "E.", "preference": "P.", "intent": "I.", "keep": [sequences[user][1]]}
    pq.write_table(pa.Table.from_pylist([chain | thought], CHAINS), folder.chains)
    report = write_mix(folder, rows=dict.fromkeys(TASKS, 1.0), seed=0)
    assert made(report)[REASONING] == report["tasks"][REASONING]["exist"] == 1
    table = pl.read_parquet(folder.mix)
    turns = {task: rows["conversations"].to_list() for (task,), rows in table.group_by("task")}
    ((asked, answered),) = ((turn["value"] for turn in row) for row in turns[REASONING])
    kept = index.text(sequences[user][1])
    assert answered == f"<think>E. P. I.</think>{kept}<answer>{index.text(item)}</answer>"
    assert "".join(index.texts(sequences[user][:5])) in asked
    likes = [row for row in turns["preferenceobtain"] if row[1]["value"] == "Likes quiet films."]
    assert len(likes) == len(sequences[user]) - 3
    assert sum("a quiet film" in row[0]["value"] for row in turns["itemsearch"]) == 1


def test_a_temporal_split_decides_what_training_sees(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    sequences = folder.read_inter()
    splits = {
        user: [len(sequence) - 4, len(sequence) - 3, len(sequence) - 1] if len(sequence) > 5 else [0, None, None]
        for user, sequence in sequences.items()
    }
    write_json(split_file(folder.inter), {"users": splits})
    counts = write_mix(folder, rows={"seqrec": 1.0}, seed=0)["tasks"]["seqrec"]
    assert counts["made"] == sum(max(training - 1, 0) for training, _, _ in splits.values())


def test_rows_that_do_not_fit_are_shortened_or_replaced(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    free = write_mix(folder, rows=ROWS, seed=0, limit=LengthLimit(words, 10**6))["tasks"]
    assert all(counts["shortened"] == counts["left out"] == 0 for counts in free.values())
    limit = int(free["seqrec"]["median"])
    tight = write_mix(folder, rows=ROWS, seed=0, limit=LengthLimit(words, limit), dry_run=True)["tasks"]
    assert write_mix(folder, rows=ROWS, seed=0, limit=LengthLimit(words, limit))["tasks"] == tight
    assert tight["seqrec"]["longest"] <= limit < free["seqrec"]["longest"]
    assert tight["seqrec"]["shortened"] > 0
    assert tight["index2item"]["left out"] > 0
    assert tight["index2item"]["made"] == tight["seqrec"]["made"] == 40
    short = [counts for counts in tight.values() if counts["made"] < 40]
    assert short
    assert all(counts["made"] + counts["left out"] == counts["exist"] for counts in short)
    table = pl.read_parquet(folder.mix)
    assert len(table) == sum(counts["made"] for counts in tight.values())
    for system, turns in table.select("system", "conversations").iter_rows():
        assert words([Row(turns[0]["value"], turns[1]["value"], "", system)])[0] <= limit


def test_rows_of_a_block_are_of_one_task_when_long_rows_are_left_out(tmp_path: Path) -> None:
    folder = make_data(tmp_path, users=60)
    rows = {"fusionseqrec": 60, "seqrec": 100, "itemsearch": 60}
    report = write_mix(folder, rows=rows, seed=0, block=8, limit=LengthLimit(words, 10))
    assert report["tasks"]["fusionseqrec"]["left out"] > 0
    tasks = pl.read_parquet(folder.mix)["task"].to_list()
    whole = sum(size // 8 for size in made(report).values())
    assert all(len(set(tasks[start : start + 8])) == 1 for start in range(0, 8 * whole, 8))


def test_chains_that_leak_once_their_history_is_shortened_are_dropped() -> None:
    items = {f"d{number}": Item(f"Story number {number}", categories=("Drama",)) for number in range(6)}
    items |= {f"w{number}": Item(f"Battle {number}", categories=("War",)) for number in range(4)}
    items |= {f"c{number}": Item(f"Case {number}", categories=("Crime",)) for number in range(4)}
    items |= {f"o{number}": Item(f"Other {number}", categories=("Opera",)) for number in range(3)}
    items["t"] = Item("War", categories=("Opera",))  # "War" is a leading trait of the end of the history alone
    history = [*("d0", "d1", "d2", "d3", "c0", "c1", "c2", "c3"), *("o0", "o1", "o2", "w0", "w1")]
    index = ItemIndex.from_codes(list(items), [(number,) for number in range(len(items))])
    corpus = Corpus({"u": [*history, "t"], "v": ["d5"] * 3}, items, index)
    assert not plan_mix(corpus, {REASONING: 99}, seed=0).chosen[0].leaks
    limit = LengthLimit(words, 32 + len(SYSTEM["reasoning"].split()))
    plan = plan_mix(corpus, {REASONING: 99}, seed=0, limit=limit)
    assert plan.chosen[0].leaks == {"title": 1}
    assert not any(ChainLeaks(corpus).find(plan.chosen[0].specs))


def test_rows_of_which_none_fits_leave_the_earlier_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_data(tmp_path)
    monkeypatch.setattr(mix, "CHUNK", 1)
    write_mix(folder, rows=ROWS, seed=0)
    before = folder.mix.read_bytes()
    with pytest.raises(InputError, match="no row has at most 1 tokens"):
        write_mix(folder, rows=ROWS, seed=0, limit=LengthLimit(words, 1))
    assert folder.mix.read_bytes() == before


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"seqrek": 5}, "SFT task 'seqrek': unknown; did you mean 'seqrec'"),
        ({"xyz": 5}, "SFT task 'xyz': unknown; choose from seqrec, item2index"),
        ({}, "no rows to write"),
        ({"seqrec": 0}, "no rows to write"),
        ({"seqrec": 1.5}, "rows of seqrec: 1.5 cannot be; give a count, or a share of what exists up to 100%"),
        ({"seqrec": -1}, "rows of seqrec: -1 cannot be"),
        ({"seqrec": math.nan}, "rows of seqrec: nan cannot be"),
        ({"seqrec": math.inf}, "rows of seqrec: inf cannot be"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(tmp_path: Path, rows: dict[str, float], message: str) -> None:
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
    calls = iter([pq.ParquetWriter.write_table] * 5)
    monkeypatch.setattr(pq.ParquetWriter, "write_table", lambda *arguments: next(calls)(*arguments))
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
