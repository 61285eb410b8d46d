from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import make_data

from data_processing.layout import CHAINS
from data_processing.sft import mix
from data_processing.sft.curriculum import curriculum_order
from data_processing.sft.lengths import LengthLimit
from data_processing.sft.mix import SCHEMA, MixOptions, asked_rows, write_mix
from data_processing.sft.rules import Wording
from data_processing.sft.tasks import CONTINUATION, ITEM_TASKS, REASONING, TASKS, WINDOW, WINDOW_TASKS, SftRow
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, write_json

ROWS = dict.fromkeys(TASKS, 40)
EVERYTHING = dict.fromkeys(TASKS, 1.0)


@pytest.fixture(autouse=True)
def picture(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the picture in one test only: it takes longer than all the rest."""
    if not request.node.name.startswith("test_the_files"):
        monkeypatch.setattr(mix, "draw_curriculum", lambda *_: None)


def words(rows: Sequence[SftRow]) -> list[int]:
    return [len(f"{row.system} {row.user} {row.assistant}".replace("<|a", " <|a").split()) for row in rows]


def made(report: dict[str, dict[str, int]]) -> dict[str, int]:
    return {task: counts["made"] for task, counts in report.items()}


def contents(folder: DataFolder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.root.iterdir()}


def turns(path: Path) -> list[tuple[str, str]]:
    return [(asked["value"], answer["value"]) for asked, answer in pl.read_parquet(path)["conversations"].to_list()]


def awkward(folder: DataFolder) -> None:
    """Give items no traits, one, many and the same twice; letters outside of ASCII; braces."""
    names = ["Käse", "{history}", "三", "Rock & Roll", "a, b", "%s", "\\", "Neo–Noir"]
    items = {
        key: {
            "title": f"{names[number % 8]}, {{sid}} {number}; " + "wort " * (number % 12),
            "description": "" if number % 3 else f"Über {names[number % 5]}. " + "so ein Satz " * (number % 20),
            "brand": "" if number % 4 else f"Brand {{{number}}}",
            "categories": [] if number % 5 == 1 else [names[(number * step) % 8] for step in range(number % 6)],
        }
        for number, key in enumerate(read_json(folder.item))
    }
    write_json(folder.item, items)


# Of the rows that the implementation with numba made, which another, readable one was compared with; it had one wording
# of reasoning rows, and no continuations.
@pytest.mark.parametrize(
    ("strange", "wording", "digest"),
    [
        (False, "notes", "275f5affadc2390ee88ec20c1c678e2c36da7e9b4e3fc3412b8b1fc29f15d3d5"),
        (True, "notes", "573d0cf6b4bc272df4bfa24fb7f836a6e79e26a5ce6e13bf9f108d89c160a3b3"),
        (True, "sentences", "ecf3defbbd82485ca5b69f9f612b23751af0f8b9e08c969de4a3feb383c95c4e"),
    ],
)
def test_the_rows_are_those_that_they_always_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strange: bool, wording: Wording, digest: str
) -> None:
    monkeypatch.setitem(TASKS, REASONING, TASKS[REASONING][:1])
    folder = make_data(tmp_path, users=40)
    if strange:
        awkward(folder)
    everything = {task: share for task, share in EVERYTHING.items() if task not in WINDOW_TASKS}
    write_mix(folder, MixOptions(everything, seed=3, history=9, block=4, wording=wording))
    rows = json.dumps(pq.read_table(folder.mix).to_pylist(), ensure_ascii=False, sort_keys=True)
    assert hashlib.sha256(rows.encode()).hexdigest() == digest


def test_the_files_are_those_that_llama_factory_reads(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    write_json(folder.dataset_info, {"mine": {"file_name": "x.json"}})
    report = write_mix(folder, MixOptions(ROWS))
    info = read_json(folder.dataset_info)
    assert info.pop("mine") == {"file_name": "x.json"}
    assert set(info) == {"small-mix", *(f"small-mix-eval-{task}" for task in TASKS)}
    for name, entry in info.items():
        assert entry["columns"] == {"messages": "conversations", "system": "system"}
        assert pq.read_schema(tmp_path / entry["file_name"]).equals(SCHEMA)
        table = pl.read_parquet(tmp_path / entry["file_name"])
        assert all([turn["from"] for turn in row] == ["human", "gpt"] for row in table["conversations"].to_list())
        if name != "small-mix":
            assert set(table["task"]) == {name.removeprefix("small-mix-eval-")}
            assert len(table) == report[table["task"][0]]["held out"]
    assert dict(pl.read_parquet(folder.mix).group_by("task").len().iter_rows()) == made(report) == ROWS
    assert read_json(folder.mix.with_suffix(".json")) == report
    picture = folder.mix.with_suffix(".png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    mix.draw_curriculum(tmp_path / "again.png", (pl.read_parquet(folder.mix)["task"] == REASONING).to_numpy())
    assert (tmp_path / "again.png").read_bytes() == picture


def test_the_seed_gives_the_bytes_in_chunks_of_any_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_data(tmp_path)
    files = []
    for seed in (0, 0, 1):
        write_mix(folder, MixOptions(ROWS, seed, limit=LengthLimit(words, 40)))
        files.append(contents(folder))
    assert files[0] == files[1] != files[2]
    whole = pl.read_parquet(folder.mix)
    monkeypatch.setattr(mix, "CHUNK", 7)
    monkeypatch.setattr(mix, "CANDIDATES", 5)
    report = write_mix(folder, MixOptions(ROWS, 1, limit=LengthLimit(words, 40)))
    assert pl.read_parquet(folder.mix).equals(whole)
    assert contents(folder)["small-mix.json"] == files[2]["small-mix.json"]
    assert pq.ParquetFile(folder.mix).num_row_groups == -(-sum(made(report).values()) // 7)


def test_rows_are_in_the_order_of_the_curriculum_in_blocks_of_one_task(tmp_path: Path) -> None:
    folder = make_data(tmp_path, users=60)
    report = write_mix(folder, MixOptions({"reasoning": 90, "seqrec": 270, "item2index": 30}, 5, block=8))
    tasks = pl.read_parquet(folder.mix)["task"].to_numpy()
    expected = curriculum_order([270, 30], made(report)["reasoning"], seed=5, block=8) >= 300
    assert np.array_equal(tasks == "reasoning", expected)
    whole = sum(size // 8 for size in made(report).values())
    assert all(len(set(tasks[start : start + 8])) == 1 for start in range(0, 8 * whole, 8))


def test_one_task_draws_the_same_rows_whatever_the_others(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    drawn = []
    for rows in ({"seqrec": 20}, {"seqrec": 20, "item2index": 30, "reasoning": 10}):
        write_mix(folder, MixOptions(rows))
        table = pl.read_parquet(folder.mix).filter(task="seqrec")
        drawn.append(sorted(row[0]["value"] for row in table["conversations"].to_list()))
    assert drawn[0] == drawn[1]


def test_rows_are_asked_for_by_count_by_share_or_by_weight_and_clamped(tmp_path: Path) -> None:
    exist = {"seqrec": 200, "reasoning": 50}
    assert asked_rows({"seqrec": 300, "reasoning": 1}, exist) == {"seqrec": 300, "reasoning": 1}
    assert asked_rows({"seqrec": 0.25, "reasoning": 1.0}, exist) == {"seqrec": 50, "reasoning": 50}
    assert asked_rows({"seqrec": 0.75, "reasoning": 0.25}, exist, total=1000) == {"seqrec": 750, "reasoning": 250}
    assert asked_rows({}, exist, total=10) == {}
    folder = make_data(tmp_path)
    targets = sum(max(len(sequence) - 3, 0) for sequence in folder.read_inter().values())
    counts = write_mix(folder, MixOptions({"seqrec": 10**6}), dry_run=True)["seqrec"]
    assert (counts["asked"], counts["exist"], counts["made"]) == (10**6, targets, targets)


@settings(max_examples=25)
@given(
    st.dictionaries(st.sampled_from(list(TASKS)), st.integers(0, 9) | st.floats(0, 9), min_size=1), st.integers(0, 999)
)
def test_a_total_is_shared_out_whole(weights: dict[str, int | float], total: int) -> None:
    asked = asked_rows(weights, {}, total)
    whole = sum(weights.values())
    assert sum(asked.values()) == (total if whole else 0)
    assert all(abs(asked[task] - total * weights[task] / (whole or 1)) <= 1 for task in weights)


def test_a_dry_run_counts_and_writes_nothing(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    before = contents(folder)
    options = MixOptions({"seqrec": 0.5, "item2index": 10, "reasoning": 10**6})
    planned = write_mix(folder, options, dry_run=True)
    assert contents(folder) == before
    assert planned == write_mix(folder, options)


def test_held_out_rows_are_in_no_mix(tmp_path: Path) -> None:
    folder = make_data(tmp_path, users=60)
    items, sequences = folder.read_items(), folder.read_inter()
    index = folder.read_index(items)
    report = write_mix(folder, MixOptions(EVERYTHING, history=20))
    mixed = set(turns(folder.mix))
    for task in TASKS:
        held_out = turns(tmp_path / f"small-mix-eval-{task}.parquet")
        assert 0 < len(held_out) == report[task]["held out"] <= mix.HELD_OUT_ROWS
        if task not in ("preferenceobtain", "historyreconstruction"):  # short histories of two users may be the same
            assert not mixed.intersection(held_out)
        if task in ("seqrec", WINDOW, REASONING):  # small_data: such items occur nowhere in training
            asked = {answer.removesuffix("</answer>").rpartition("<answer>")[2] for _, answer in held_out}
            assert asked <= {index.text(sequence[-2]) for sequence in sequences.values()}
        if task == CONTINUATION:
            ends = {index.text(sequence[-2]) for sequence in sequences.values()}
            assert all(any(answer.endswith(end) for end in ends) for _, answer in held_out)
        if task in ITEM_TASKS:
            assert len(set(held_out)) == len(held_out)


def test_chains_that_name_their_target_are_replaced_and_counted(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    items = read_json(folder.item)
    for item in ("5", "6", "7", "8", "9", "10"):
        items[item]["title"] = items[item]["categories"][0]
    write_json(folder.item, items)
    every = write_mix(folder, MixOptions({"reasoning": 1.0}))["reasoning"]
    assert every["leaks"] > 2
    assert every["made"] == every["exist"] - every["leaks"]
    some = write_mix(folder, MixOptions({"reasoning": 9}))["reasoning"]
    assert some["made"] == 9
    assert some["leaks"] < every["leaks"]


def test_texts_of_a_language_model_are_read_from_the_folder(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    sequences, index = folder.read_inter(), folder.read_index(folder.read_items())
    user = max(sequences, key=lambda user: len(sequences[user]))
    preferences, queries = {user: ["Likes quiet films."]}, {"train": {user: ["a quiet film"]}}
    write_json(folder.user_texts, {"user_explicit_preference": preferences, "user_vague_intention": queries})
    thought = {"user": user, "history": 5, "evidence": "E.", "preference": "P.", "intent": "I."}
    chains = [{**thought, "position": 5, "item": sequences[user][5], "keep": [sequences[user][1]]}]
    pq.write_table(pa.Table.from_pylist(chains, CHAINS), folder.chains)
    report = write_mix(folder, MixOptions(EVERYTHING))
    assert (report[REASONING]["made"], report[REASONING]["held out"]) == (1, 0)  # the mix has the only chain
    assert not (tmp_path / f"small-mix-eval-{REASONING}.parquet").exists()
    table = pl.read_parquet(folder.mix)
    rows = {task: part["conversations"].to_list() for (task,), part in table.group_by("task")}
    ((asked, answered),) = ((turn["value"] for turn in row) for row in rows[REASONING])
    kept, answer = index.texts([sequences[user][1], sequences[user][5]])
    assert answered == f"<think>E. P. I.</think>{kept}<answer>{answer}</answer>"
    assert "".join(index.texts(sequences[user][:5])) in asked
    likes = [row for row in rows["preferenceobtain"] if row[1]["value"] == "Likes quiet films."]
    assert len(likes) == len(sequences[user]) - 3
    assert sum("a quiet film" in row[0]["value"] for row in rows["itemsearch"]) == 1


def test_a_temporal_split_decides_what_training_sees(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    splits: dict[str, list[int | None]] = {
        user: [len(sequence) - 4, len(sequence) - 3, len(sequence) - 1] if len(sequence) > 5 else [0, None, None]
        for user, sequence in folder.read_inter().items()
    }
    write_json(folder.split, {"users": splits})
    counts = write_mix(folder, MixOptions({"seqrec": 1.0}))["seqrec"]
    assert counts["made"] == sum(max((training or 0) - 1, 0) for training, _, _ in splits.values())
    assert counts["held out"] == sum(None not in split for split in splits.values())


def test_rows_that_do_not_fit_are_shortened_or_replaced(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    free = write_mix(folder, MixOptions(ROWS, limit=LengthLimit(words, 10**6)))
    assert all(counts["shortened"] == counts["left out"] == 0 for counts in free.values())
    limit = int(np.median(words([SftRow(*row, "") for row in turns(folder.mix)])))
    options = MixOptions(ROWS, limit=LengthLimit(words, limit))
    tight = write_mix(folder, options)
    assert tight["seqrec"]["longest"] <= limit < free["seqrec"]["longest"]
    assert tight["seqrec"]["shortened"] > 0
    assert tight["index2item"]["made"] == tight["seqrec"]["made"] == 40
    assert tight[CONTINUATION]["made"] == 40 > tight[CONTINUATION]["exist"]
    short = [counts for counts in tight.values() if counts["made"] < 40]
    assert short
    assert all(counts["made"] + counts["left out"] == counts["exist"] for counts in short)
    for file in tmp_path.glob("small-mix*.parquet"):
        for row in pl.read_parquet(file).to_dicts():
            asked, answered = (turn["value"] for turn in row["conversations"])
            assert words([SftRow(asked, answered, "", row["system"])])[0] <= limit


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"xyz": 5}, "SFT task 'xyz': unknown; choose from seqrec, item2index"),
        ({}, "no rows to write"),
        ({"seqrec": 1.5}, "rows of seqrec: 1.5 cannot be; give a count, or a share of what exists up to 100%"),
        ({"seqrec": -1}, "rows of seqrec: -1 cannot be"),
        ({"seqrec": math.nan}, "rows of seqrec: nan cannot be"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(tmp_path: Path, rows: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_mix(make_data(tmp_path), MixOptions(rows))


def test_a_failure_leaves_the_earlier_files_and_no_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_data(tmp_path)
    write_mix(folder, MixOptions(ROWS))
    before = contents(folder)
    with pytest.raises(InputError, match="no rows to write; allow longer ones"):
        write_mix(folder, MixOptions(ROWS, limit=LengthLimit(words, 1)))
    monkeypatch.setattr(mix, "CHUNK", 10)
    calls = iter([pq.ParquetWriter.write_table] * 5)
    monkeypatch.setattr(pq.ParquetWriter, "write_table", lambda *arguments: next(calls)(*arguments))
    with pytest.raises(StopIteration):
        write_mix(folder, MixOptions(ROWS, seed=1))
    index = read_json(folder.index)
    del index["3"]
    write_json(folder.index, index)
    with pytest.raises(InputError, match="no SID for item '3'"):
        write_mix(folder, MixOptions(ROWS, seed=1))
    assert {**contents(folder), folder.index.name: before[folder.index.name]} == before
