from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from small_data import make_data

from data_processing.rl import write_prompts
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.files import write_json
from gream_verl.core.prompts import SYSTEM, TEMPLATES
from gream_verl.core.rsvr import Mode
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.prompts import MODES, Prompt, make_prompts, read_protocol


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    return make_data(tmp_path / "data")


def read(folder: DataFolder, mode: Mode = "reasoning", **options: Any) -> tuple[list[Prompt], dict[str, Any]]:
    return read_protocol(folder, EvaluationOptions(**options), mode, ItemIndex.load(folder.index))


@pytest.mark.parametrize("mode", MODES)
def test_without_a_file_prompts_are_made_and_the_protocol_says_all(folder: DataFolder, mode: Mode) -> None:
    prompts, protocol = read(folder, mode, seed=3, drop_history=False)
    longest = max(len(prompt.history) for prompt in prompts)
    digests = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder.inter, folder.index)}
    assert protocol == {
        "split": "test", "held_out": "leave-one-out", "mode": mode, "history": longest,
        "template": TEMPLATES[mode][0], "system": SYSTEM[mode], "drop_history": False,
        "seen": "all items before the target", "candidates": "all items", "items": 60, "users": 12,
        "users_in_file": 12, "users_left_out": 0, "seed": 3, "prompts": str(folder.inter),
        "prompts_are": "made of the interactions", "prompts_sha256": digests[folder.inter],
        "index": str(folder.index), "index_sha256": digests[folder.index],
    }  # fmt: skip


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("mode", MODES)
def test_our_file_is_the_same_evaluation_whether_made_found_or_named(
    folder: DataFolder, mode: Mode, limit: int | None
) -> None:
    made = read(folder, mode, limit=limit)
    write_prompts(folder, seed=0)
    found, named = read(folder, mode, limit=limit), read(folder, mode, limit=limit, prompts=folder.test)
    assert made[0] == found[0] == named[0]
    source = {"prompts", "prompts_are", "prompts_sha256"}
    assert {key for key in made[1] if made[1][key] != found[1][key]} == source
    assert {key for key in made[1] if made[1][key] != named[1][key]} == source | {"split", "held_out"}
    assert named[1]["split"] == named[1]["held_out"] == "as in the file"
    other = read(folder, mode, limit=limit, history=2)[1]
    assert other["history"] == 2
    assert other["prompts"] == str(folder.inter)


@pytest.mark.parametrize("choice", [{"history": 20}, {"template": "{history} And?"}, {"system": ""}])
def test_a_wording_that_is_asked_for_is_made_though_there_is_a_file(folder: DataFolder, choice: dict[str, Any]) -> None:
    write_prompts(folder, seed=0)
    prompts, protocol = read(folder, **choice)
    index = ItemIndex.load(folder.index)
    assert prompts == make_prompts(folder.inter, "reasoning", EvaluationOptions(**choice), index)[0]
    assert protocol["prompts_are"] == "made of the interactions"
    assert protocol | choice | {"history": protocol["history"]} == protocol


def test_validation_in_direct_mode_has_a_file_of_its_own(folder: DataFolder) -> None:
    write_prompts(folder, seed=0)
    made, protocol = read(folder, "direct", split="val")
    assert protocol["prompts"] == str(folder.inter)
    assert read(folder, "reasoning", split="val")[1]["prompts"] == str(folder.val)
    write_prompts(folder, seed=0, mode="direct")
    prompts, protocol = read(folder, "direct", split="val")
    assert protocol["prompts"] == str(folder.val_of("direct"))
    assert prompts == made


@pytest.mark.parametrize(
    ("kept", "seen"),
    [
        (lambda number: True, "all items before the target"),
        (lambda number: number > 0, "the items that the prompt shows"),
    ],
)
def test_rows_without_their_history_change_what_was_seen(
    folder: DataFolder, kept: Callable[[int], bool], seen: str
) -> None:
    write_prompts(folder, seed=0, history=2)
    file = folder.root / "other.parquet"
    rows = [row for row in pl.read_parquet(folder.test).to_dicts() if row["extra_info"]["type"] == "reasoning"]
    for number, row in enumerate(rows):
        row["extra_info"]["history"] = row["extra_info"]["history"] if kept(number) else None
    pl.DataFrame(rows).write_parquet(file)
    prompts, protocol = read(folder, prompts=file)
    assert protocol["seen"] == seen
    sequences = folder.read_inter()
    for number, prompt in enumerate(prompts):
        past = sequences[prompt.user][:-1]
        assert list(prompt.history) == (past if kept(number) else past[-2:])


@pytest.mark.parametrize("kind", [{}, {"kind": "temporal"}, {"kind": "other"}])
def test_a_split_by_time_is_said_and_kept(folder: DataFolder, kind: dict[str, str]) -> None:
    users = {user: [len(items) - 1, None, len(items) - 1] for user, items in folder.read_inter().items()}
    users["4"] = [users["4"][0], None, None]
    write_json(folder.split, {**kind, "users": users})
    prompts, protocol = read(folder, "direct")
    assert protocol["held_out"] == kind.get("kind", "temporal")
    assert {prompt.user for prompt in prompts} == users.keys() - {"4"}
    with pytest.raises(InputError, match="no user has an interaction for val"):
        read(folder, "direct", split="val")


def test_users_left_out_are_counted(folder: DataFolder) -> None:
    gone = {sequence[-1] for sequence in list(folder.read_inter().values())[:2]}
    index = ItemIndex.load(folder.index)
    ItemIndex({item: sid for item, sid in index.sids.items() if item not in gone}).save(folder.index)
    prompts, protocol = read(folder, "direct", skip_missing=True)
    expected = sum(sequence[-1] in gone for sequence in folder.read_inter().values())
    assert protocol["users_left_out"] == expected >= 2
    assert protocol["users"] == len(prompts) == 12 - expected
    assert protocol["items"] == 60 - len(gone)
