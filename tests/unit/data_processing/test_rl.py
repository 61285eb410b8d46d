from __future__ import annotations

import re
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq
import pytest
from small_data import make_data

from data_processing.rl import SCHEMA, write_prompts
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.files import write_json
from gream_verl.core.prompts import TEMPLATES, messages
from gream_verl.core.rsvr import Mode


def read(path: Path) -> list[dict]:
    assert pq.read_schema(path).equals(SCHEMA)
    return pl.read_parquet(path).to_dicts()


def keys(rows: list[dict]) -> list[tuple[str, int]]:
    """Return user and position of the target of every row."""
    return [(row["extra_info"]["user"], len(row["extra_info"]["history"])) for row in rows]


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    return make_data(tmp_path)


def test_targets_are_those_of_the_split(folder: DataFolder) -> None:
    report = write_prompts(folder, seed=0)
    sequences = folder.read_inter()
    rl, val, test = (read(path) for path in (folder.rl, folder.val, folder.test))
    assert sorted(keys(rl)) == sorted(
        (user, position) for user, sequence in sequences.items() for position in range(4, len(sequence) - 2)
    )
    assert keys(val) == [(user, len(sequence) - 2) for user, sequence in sequences.items()]
    assert keys(test) == 2 * [(user, len(sequence) - 1) for user, sequence in sequences.items()]
    assert {row["extra_info"]["type"] for row in [*rl, *val]} == {"reasoning"}
    assert [row["extra_info"]["type"] for row in test] == ["direct"] * 12 + ["reasoning"] * 12
    assert report == {
        "rows": {"rl": len(rl), "val": len(val), "test": len(test)},
        "users without a test": 0,
    }


def test_every_row_holds_its_target_its_whole_history_and_shows_the_end_of_it(folder: DataFolder) -> None:
    write_prompts(folder, seed=0, history=3)
    sequences, items = folder.read_inter(), folder.read_items()
    index = folder.read_index(items)
    for path in (folder.rl, folder.val, folder.test):
        for number, row in enumerate(read(path)):
            info = row["extra_info"]
            sequence = sequences[info["user"]]
            past = sequence[: len(info["history"])]
            assert info["history"] == past
            assert info["item"] == sequence[len(past)]
            assert info["title"] == items[info["item"]].title
            assert info["index"] == number
            assert row["data_source"] == "small"
            assert row["ability"] == "recommendation"
            assert row["reward_model"] == {"style": "rule", "ground_truth": index.text(info["item"])}
            shown = "".join(index.texts(past[-3:]))
            template = row["prompt"][-1]["content"].replace(shown, "{history}")
            assert template in TEMPLATES[info["type"]][: None if path == folder.rl else 1]
            assert row["prompt"] == messages(shown, info["type"], template)
            assert [turn["role"] for turn in row["prompt"]] == {
                "direct": ["user"], "reasoning": ["system", "user"],
            }[info["type"]]  # fmt: skip


@pytest.mark.parametrize("mode", ["direct", "reasoning"])
def test_rl_draws_its_wording_by_the_seed_and_held_out_rows_have_the_first(folder: DataFolder, mode: Mode) -> None:
    def wordings(path: Path) -> list[str]:
        return [re.sub(r"<.*>", "{history}", row["prompt"][-1]["content"]) for row in read(path)]

    write_prompts(folder, seed=0, mode=mode)
    drawn = wordings(folder.rl_of(mode))
    assert len(set(drawn)) > len(TEMPLATES[mode]) / 2
    assert set(wordings(folder.val_of(mode))) == {TEMPLATES[mode][0]}
    assert set(wordings(folder.test)) == {TEMPLATES["direct"][0], TEMPLATES["reasoning"][0]}
    write_prompts(folder, seed=0, mode=mode)
    assert wordings(folder.rl_of(mode)) == drawn
    write_prompts(folder, seed=1, mode=mode)
    assert wordings(folder.rl_of(mode)) != drawn


def test_no_rl_row_has_a_held_out_target_or_history(folder: DataFolder) -> None:
    write_prompts(folder, seed=0)
    index, items = folder.read_index(folder.read_items()), folder.read_items()
    text = str(read(folder.rl))
    for number in range(50, 60):
        assert index.text(str(number)) not in text
        assert items[str(number)].title not in text


def test_direct_prompts_go_to_files_of_their_own(folder: DataFolder) -> None:
    write_prompts(folder, seed=0)
    reasoning = keys(read(folder.rl))
    write_prompts(folder, seed=0, mode="direct")
    assert folder.rl_of("direct").name == "small-rl-direct.parquet"
    direct = read(folder.rl_of("direct"))
    assert keys(direct) == reasoning
    assert {row["extra_info"]["type"] for row in [*direct, *read(folder.val_of("direct"))]} == {"direct"}
    assert {row["extra_info"]["type"] for row in read(folder.rl)} == {"reasoning"}


def test_fewer_rows_are_the_latest_of_every_user(folder: DataFolder) -> None:
    write_prompts(folder, seed=0)
    whole = keys(read(folder.rl))
    ages = {(user, position): max(p for u, p in whole if u == user) - position for user, position in whole}
    for rows in (7, len(whole) // 2):
        write_prompts(folder, seed=0, rl_rows=rows)
        drawn = keys(read(folder.rl))
        assert drawn != sorted(drawn)
        assert len({*drawn}) == rows
        assert sorted(ages[key] for key in drawn) == sorted(ages.values())[:rows]


def test_the_same_seed_gives_the_same_bytes(folder: DataFolder) -> None:
    write_prompts(folder, seed=0)
    whole, content = keys(read(folder.rl)), [path.read_bytes() for path in (folder.rl, folder.val, folder.test)]
    assert whole != sorted(whole)
    write_prompts(folder, seed=0)
    assert [path.read_bytes() for path in (folder.rl, folder.val, folder.test)] == content
    assert write_prompts(folder, seed=0, rl_rows=7)["rows"] == {"rl": 7, "val": 12, "test": 24}
    assert {*keys(read(folder.rl))} < {*whole}
    write_prompts(folder, seed=1)
    assert folder.rl.read_bytes() != content[0]


def test_another_split_is_followed(folder: DataFolder) -> None:
    sequences = folder.read_inter()
    long = {user: len(sequence) for user, sequence in sequences.items() if len(sequence) > 9}
    users: dict[str, list[int | None]] = {user: [0, None, None] for user in sequences}
    users |= {user: [6, None if user == min(long) else 6, 8] for user in long}
    write_json(folder.split, {"users": users})
    report = write_prompts(folder, seed=0)
    rl, val, test = (read(path) for path in (folder.rl, folder.val, folder.test))
    assert sorted(keys(rl)) == sorted((user, position) for user in long for position in (4, 5))
    assert keys(val) == [(user, 6) for user in long if user != min(long)]
    assert keys(test) == 2 * [(user, 8) for user in long]
    assert report["users without a test"] == len(sequences) - len(long)


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ({"u": ["1", "2"]}, "no user has an interaction for val"),
        ({"u": ["1", "2", "3", "4", "5", "6"]}, "no user has 5 interactions for training"),
    ],
)
def test_nothing_to_write_is_one_sentence(folder: DataFolder, sequences: dict, message: str) -> None:
    write_json(folder.inter, sequences)
    with pytest.raises(InputError, match=message):
        write_prompts(folder, seed=0)
    assert not folder.rl.exists()


def test_seven_interactions_give_one_rl_row_and_users_without_a_test_are_counted(folder: DataFolder) -> None:
    write_json(folder.inter, {"short": ["1", "2"], "u": ["1", "2", "3", "4", "5", "6", "7"]})
    assert write_prompts(folder, seed=0)["users without a test"] == 1
    items = [[row["extra_info"]["item"] for row in read(path)] for path in (folder.rl, folder.val, folder.test)]
    assert items == [["5"], ["6"], ["7", "7"]]
