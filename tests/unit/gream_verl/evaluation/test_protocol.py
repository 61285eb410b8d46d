"""Which prompts are taken is decided by what is there, and said."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import polars as pl
import pytest
from rich.console import Console
from small_data import make_data

from data_processing.rl import write_prompts
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.files import write_json
from gream_verl.core.prompts import SYSTEM, TEMPLATES
from gream_verl.core.rsvr import Mode
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.evaluation.prompts import make_prompts, read_prompts
from gream_verl.evaluation.protocol import PromptSource, protocol_table

KEYS = {"split", "held_out", "mode", "history", "template", "system", "drop_history", "seen", "candidates", "items",
        "users", "users_in_file", "seed", "prompts", "prompts_digest", "index_sha256"}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    return make_data(tmp_path / "data")


@pytest.fixture
def index(folder: DataFolder) -> ItemIndex:
    return ItemIndex.load(folder.index)


def source(folder: DataFolder, **choices: object) -> PromptSource:
    return PromptSource(folder.root, folder.name, **choices)


def test_without_a_file_the_prompts_are_made(folder: DataFolder, index: ItemIndex) -> None:
    prompts, protocol = source(folder).read("reasoning", index)
    assert prompts == make_prompts(folder.inter, index, "reasoning")[0]
    told = protocol.describe()
    assert set(told) >= KEYS
    assert json.loads(json.dumps(told)) == told
    assert told["prompts_are"] == "made of the interactions"
    assert (told["split"], told["held_out"], told["mode"]) == ("test", "leave-one-out", "reasoning")
    assert (told["history"], told["template"], told["system"]) == (
        20, TEMPLATES["reasoning"][0], SYSTEM["reasoning"],
    )  # fmt: skip
    assert (told["users"], told["users_in_file"], told["users_left_out"]) == (12, 12, 0)
    assert (told["candidates"], told["items"], told["drop_history"]) == ("all items", 60, True)
    assert told["seen"] == "all items before the target"
    assert told["index_sha256"] == hashlib.sha256(folder.index.read_bytes()).hexdigest()
    assert told["prompts_sha256"] == hashlib.sha256(folder.inter.read_bytes()).hexdigest()


def test_with_a_file_it_is_read_and_says_the_same(folder: DataFolder, index: ItemIndex) -> None:
    write_prompts(folder, seed=0, history=3)
    for mode in ("direct", "reasoning"):
        prompts, protocol = source(folder).read(mode, index)
        read, made = protocol.describe(), source(folder, history=3).read(mode, index)[1].describe()
        assert prompts == read_prompts(folder.test, mode)[0]
        differ = {key for key in read if read[key] != made[key]}
        assert differ == {"prompts", "prompts_are", "prompts_sha256"}
        assert read["prompts"] == str(folder.test)


def test_a_wording_that_is_asked_for_is_made_though_there_is_a_file(folder: DataFolder, index: ItemIndex) -> None:
    write_prompts(folder, seed=0)
    for choice in ({"history": 20}, {"template": "{history} And?"}, {"system": ""}):
        prompts, protocol = source(folder, **choice).read("reasoning", index)
        assert protocol.prompts == str(folder.inter)
        assert prompts == make_prompts(folder.inter, index, "reasoning", **choice)[0]
        [(key, value)] = choice.items()
        assert protocol.describe()[key] == value


def test_validation_in_direct_mode_has_a_file_of_its_own(folder: DataFolder, index: ItemIndex) -> None:
    write_prompts(folder, seed=0)
    val = source(folder, split="val")
    assert val.file_of("reasoning") == folder.val
    assert val.file_of("direct") is None
    made, _ = val.read("direct", index)
    write_prompts(folder, seed=0, mode="direct")
    assert val.file_of("direct") == folder.val_of("direct")
    assert val.read("direct", index)[0] == made


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("mode", ["direct", "reasoning"])
def test_our_file_is_the_same_evaluation_whether_made_found_or_named(
    folder: DataFolder, index: ItemIndex, mode: Mode, limit: int | None
) -> None:
    made, told_made = source(folder, limit=limit).read(mode, index)
    write_prompts(folder, seed=0)
    found, told_found = source(folder, limit=limit).read(mode, index)
    named, told_named = source(folder, file=folder.test, limit=limit).read(mode, index)
    assert made == found == named
    assert told_made.prompts_digest == told_found.prompts_digest == told_named.prompts_digest
    keys = ("seen", "drop_history", "candidates", "items", "users", "users_in_file")
    told = [[each.describe()[key] for key in keys] for each in (told_made, told_found, told_named)]
    assert told[0] == told[1] == told[2]
    assert max(len(prompt.history) for prompt in made) < 20, "or it would show nothing of `seen`"
    assert told_made.seen == "all items before the target"
    assert source(folder, history=2, limit=limit).read(mode, index)[1].prompts_digest != told_made.prompts_digest


@pytest.mark.parametrize("history", [2, 20])
@pytest.mark.parametrize(
    ("kept", "seen"),
    [
        (lambda number: True, "all items before the target"),
        (lambda number: False, "the items that the prompt shows"),
        (lambda number: number > 0, "the items that the prompt shows"),
    ],
)
def test_whether_rows_carry_the_history_decides_what_was_seen(
    folder: DataFolder, index: ItemIndex, kept: Callable[[int], bool], seen: str, history: int
) -> None:
    write_prompts(folder, seed=0, history=history)
    file = folder.root / "other.parquet"
    rows = [row for row in pl.read_parquet(folder.test).to_dicts() if row["extra_info"]["type"] == "reasoning"]
    for number, row in enumerate(rows):
        if not kept(number):
            row["extra_info"]["history"] = None
    pl.DataFrame(rows).write_parquet(file)
    prompts, protocol = source(folder, file=file).read("reasoning", index)
    assert protocol.seen == protocol.describe()["seen"] == seen
    sequences = folder.read_inter()
    for number, prompt in enumerate(prompts):
        past = sequences[prompt.user][:-1]
        assert list(prompt.history) == (past if kept(number) else past[-history:])


def test_a_named_file_says_what_it_shows(folder: DataFolder, index: ItemIndex) -> None:
    write_prompts(folder, seed=0)
    told = source(folder, file=folder.val).read("reasoning", index)[1].describe()
    assert told["split"] == told["held_out"] == "as in the file"
    assert told["prompts"] == str(folder.val)


@pytest.mark.parametrize("written", [False, True])
@pytest.mark.parametrize(
    ("kind", "held_out"), [(None, "leave-one-out"), ({}, "temporal"), ({"kind": "other"}, "other")]
)
def test_how_interactions_were_held_out_is_told(
    folder: DataFolder, index: ItemIndex, kind: dict[str, str] | None, held_out: str, written: bool
) -> None:
    if kind is not None:
        users = {user: [len(items) - 2, len(items) - 2, len(items) - 1] for user, items in folder.read_inter().items()}
        write_json(folder.split, {**kind, "users": users})
    if written:
        write_prompts(folder, seed=0)
    for mode in ("direct", "reasoning"):
        assert source(folder).read(mode, index)[1].describe()["held_out"] == held_out


def test_without_interactions_nobody_knows_what_was_held_out(folder: DataFolder, index: ItemIndex) -> None:
    write_prompts(folder, seed=0)
    folder.inter.unlink()
    told = source(folder).read("direct", index)[1].describe()
    assert (told["split"], told["held_out"]) == ("test", "as in the file")


def test_a_split_by_time_is_said_and_kept(folder: DataFolder, index: ItemIndex) -> None:
    sequences = folder.read_inter()
    users = {user: [len(items) - 1, None, len(items) - 1] for user, items in sequences.items()}
    users["4"] = [len(sequences["4"]), None, None]
    write_json(folder.split, {"kind": "temporal", "users": users})
    prompts, protocol = source(folder).read("direct", index)
    assert protocol.held_out == "temporal"
    assert {prompt.user for prompt in prompts} == set(sequences) - {"4"}
    with pytest.raises(InputError, match="no user has an interaction for val"):
        source(folder, split="val").read("direct", index)


def test_a_sample_is_the_same_users_however_prompts_are_found(folder: DataFolder, index: ItemIndex) -> None:
    made, protocol = source(folder, limit=5, seed=2).read("direct", index)
    assert (protocol.users, protocol.users_in_file, protocol.seed) == (5, 12, 2)
    write_prompts(folder, seed=0)
    for mode in ("direct", "reasoning"):
        read, _ = source(folder, limit=5, seed=2).read(mode, index)
        assert [prompt.user for prompt in read] == [prompt.user for prompt in made]
    other, _ = source(folder, limit=5, seed=3).read("direct", index)
    assert [prompt.user for prompt in other] != [prompt.user for prompt in made]


def test_users_left_out_are_counted(folder: DataFolder, index: ItemIndex) -> None:
    gone = {sequence[-1] for sequence in list(folder.read_inter().values())[:2]}
    ItemIndex({item: sid for item, sid in index.sids.items() if item not in gone}).save(folder.index)
    prompts, protocol = source(folder, skip_missing=True).read("direct", ItemIndex.load(folder.index))
    expected = sum(sequence[-1] in gone for sequence in folder.read_inter().values())
    assert protocol.users_left_out == expected >= 2
    assert protocol.users == len(prompts) == 12 - expected
    assert protocol.items == 60 - len(gone)


def test_choices_that_do_not_go_together_are_refused(folder: DataFolder) -> None:
    with pytest.raises(InputError, match=r"--template 'Next\?': has no \{history\}; write it where"):
        source(folder, template="Next?")
    for choice in ({"history": 3}, {"template": "{history}"}, {"system": ""}):
        with pytest.raises(InputError, match="have a wording already; leave out"):
            source(folder, file=folder.test, **choice)


def test_the_table_shows_every_setting(folder: DataFolder, index: ItemIndex) -> None:
    told = {
        mode: source(folder, template="[b]{history}[/b]").read(mode, index, drop_history=False)[1].describe()
        for mode in ("direct", "reasoning")
    }
    console = Console(width=400, record=True, file=StringIO())
    console.print(protocol_table(told))
    shown = console.export_text()
    for key, value in told["reasoning"].items():
        assert key.replace("_", " ") in shown
        if isinstance(value, str):
            assert value in shown
    assert "[b]{history}[/b]" in shown
    assert "no" in next(line for line in shown.splitlines() if "drop history" in line)
