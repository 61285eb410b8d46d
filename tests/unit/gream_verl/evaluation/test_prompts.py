"""Prompts from our files, from the authors' files, and made from the interactions: all the same in the end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_data import make_data

from data_processing.rl import write_prompts
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.files import write_json
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.core.split import by_time
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.prompts import MODES, make_prompts, modes_of, read_prompts, read_protocol, without_thinking

PLAIN = EvaluationOptions()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    return make_data(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def index(folder: DataFolder) -> ItemIndex:
    return ItemIndex.load(folder.index)


def test_without_thinking_a_prompt_is_that_of_direct_mode(folder: DataFolder, index: ItemIndex) -> None:
    direct, reasoning = (make_prompts(folder.inter, mode, PLAIN, index)[0] for mode in MODES)
    assert list(map(without_thinking, reasoning)) == direct


def turn(content: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": content}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    pl.DataFrame(rows).write_parquet(path)
    return path


def authors_row(index: ItemIndex, shown: list[str], target: str, **extra: Any) -> dict[str, Any]:
    """Return a row as the authors write it: no user, no item, no history."""
    return {
        "data_source": "Instruments",
        "prompt": [turn("Think.", "system"), turn(f"Had {', '.join(index.texts(shown))}. Next?")],
        "ability": "recommendation",
        "reward_model": {"style": "rule", "ground_truth": index.text(target)},
        "extra_info": {"title": "A title", **extra},
    }


@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10_000), history=st.integers(1, 25), limit=st.none() | st.integers(1, 8), cut=st.booleans())
def test_made_prompts_equal_the_written_ones(
    tmp_path_factory: pytest.TempPathFactory, seed: int, history: int, limit: int | None, cut: bool
) -> None:
    folder = make_data(tmp_path_factory.mktemp("made"), seed=seed)
    if cut:  # a split by time in which some users have nothing to test on
        sequences = folder.read_inter()
        times = {user: range(int(user), int(user) + len(items)) for user, items in sequences.items()}
        write_json(folder.split, {"users": {user: by_time(list(times[user]), 8, 12) for user in sequences}})
    write_prompts(folder, seed=0, history=history)
    index = ItemIndex.load(folder.index)
    options = EvaluationOptions(history=history, limit=limit, seed=seed)
    for mode in MODES:
        assert make_prompts(folder.inter, mode, options, index) == read_prompts(folder.test, mode, options, index)
    options = options.model_copy(update={"split": "val"})
    made = make_prompts(folder.inter, "reasoning", options, index)
    assert made == read_prompts(folder.val, "reasoning", options, index)


def test_the_last_but_one_interactions_are_those_of_validation(folder: DataFolder, index: ItemIndex) -> None:
    sequences = folder.read_inter()
    for split, back in (("val", 2), ("test", 1)):
        prompts, total = make_prompts(folder.inter, "direct", EvaluationOptions(split=split), index)
        assert total == len(sequences)
        assert [prompt.user for prompt in prompts] == list(sequences)
        for prompt in prompts:
            assert [*prompt.history, prompt.target] == sequences[prompt.user][: 1 - back or None]


def test_the_wording_asked_for_is_the_wording_made(folder: DataFolder, index: ItemIndex) -> None:
    options = EvaluationOptions(history=2, template="{history}?", system="Be brief.")
    for prompt in make_prompts(folder.inter, "direct", options, index)[0]:
        shown = "".join(index.texts(prompt.history[-2:]))
        assert prompt.messages == [turn("Be brief.", "system"), turn(f"{shown}?")]
    silent, _ = make_prompts(folder.inter, "reasoning", EvaluationOptions(system=""), index)
    assert all([one["role"] for one in prompt.messages] == ["user"] for prompt in silent)


def test_items_written_as_numbers_are_read_as_text(folder: DataFolder, index: ItemIndex, tmp_path: Path) -> None:
    numbers = {user: [int(item) for item in items] for user, items in folder.read_inter().items()}
    write_json(tmp_path / "small.inter.json", numbers)
    expected = make_prompts(folder.inter, "direct", PLAIN, index)
    assert make_prompts(tmp_path / "small.inter.json", "direct", PLAIN, index) == expected


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    separator=st.sampled_from(["", " ", ", ", "\n", " -> "]),
    wrapped=st.sampled_from(["{}", "<answer>{}</answer>", " {}\n", "<think>so</think>{}<answer>{}</answer>"]),
    kind=st.sampled_from([{}, {"type": "rl"}, {"type": None}, {"type": "reasoning"}]),
)
def test_a_file_of_the_authors_says_what_ours_says(
    folder: DataFolder, index: ItemIndex, tmp_path: Path, separator: str, wrapped: str, kind: dict[str, Any]
) -> None:
    ours, _ = make_prompts(folder.inter, "reasoning", EvaluationOptions(history=5), index)
    rows = []
    for prompt in ours:
        row = authors_row(index, [], prompt.target, **kind)
        history = separator.join(index.texts(prompt.history[-5:]))
        row["prompt"] = [turn("Think.", "system"), turn(f"Had {history}. Next?")]
        row["reward_model"]["ground_truth"] = wrapped.replace("{}", index.text(prompt.target))
        rows.append(row)
    path = write_rows(tmp_path / "D-val.parquet", rows)
    read, total = read_prompts(path, "reasoning", PLAIN, index)
    assert total == len(ours)
    assert [(prompt.user, prompt.target, prompt.truth, prompt.history) for prompt in read] == [
        (str(number), prompt.target, prompt.truth, prompt.history[-5:]) for number, prompt in enumerate(ours)
    ]
    assert [prompt.messages for prompt in read] == [row["prompt"] for row in rows]
    assert not any(prompt.whole for prompt in read)
    protocol = read_protocol(folder, EvaluationOptions(prompts=path), "reasoning", index)[1]
    words = {key: protocol[key] for key in ("history", "template", "system")}
    assert words == {"history": 5, "template": "Had {history}. Next?", "system": "Think."}


def test_extra_info_may_be_missing_and_only_the_last_question_is_the_history(index: ItemIndex, tmp_path: Path) -> None:
    row = authors_row(index, ["1", "2"], "3")
    del row["extra_info"]
    answered = turn(index.text("5"), "assistant")
    row["prompt"] = [turn(f"After {index.text('4')}?"), answered, *row["prompt"]]
    path = write_rows(tmp_path / "D-val.parquet", [row])
    [prompt], _ = read_prompts(path, "direct", PLAIN, index)
    assert (prompt.user, prompt.history, prompt.target) == ("0", ("1", "2"), "3")
    assert modes_of(path) == MODES


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"reward_model": {"ground_truth": "nothing"}}, r"row 1: reward_model.ground_truth is 'nothing'; exp"),
        ({"reward_model": {"ground_truth": None}}, r"row 1: reward_model.ground_truth is 'None'"),
        ({"reward_model": {"ground_truth": "<|a_9|><|b_9|><|c_9|>"}}, r"row 1: .*c_9\|> is no item of the index"),
        ({"prompt": [turn("Had <|a_8|>. Next?")]}, r"row 1: <\|a_8\|> is no item of the index"),
        ({"prompt": None}, r"row 1: expected prompt"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(
    index: ItemIndex, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    row = authors_row(index, ["1"], "2")
    row["reward_model"] = {"ground_truth": index.text("2")}
    path = write_rows(tmp_path / "D-val.parquet", [row, {**row, **change}])
    with pytest.raises(InputError, match=rf"D-val.parquet: {sentence}"):
        read_prompts(path, "reasoning", PLAIN, index)


def test_rows_that_name_the_shared_beginning_of_items_may_be_left_out(index: ItemIndex, tmp_path: Path) -> None:
    good, target, shown = (authors_row(index, ["1"], "2") for _ in range(3))
    target["reward_model"] = {"ground_truth": index.sids["2"][0]}
    shown["prompt"] = [turn(f"Had {index.sids['2'][0]}. Next?")]
    for number, bad in enumerate((target, shown)):
        path = write_rows(tmp_path / f"{number}-val.parquet", [good, bad])
        with pytest.raises(
            InputError, match=r"row 1: .* is no item of the index, but the beginning of those of \d+, such"
        ):
            read_prompts(path, "reasoning", PLAIN, index)
        assert len(read_prompts(path, "reasoning", EvaluationOptions(skip_missing=True), index)[0]) == 1


def _text(path: Path, index: ItemIndex) -> None:
    path.write_text("not parquet")


def _other_columns(path: Path, index: ItemIndex) -> None:
    write_rows(path, [{"text": "no column of verl's"}])


def _without_index(path: Path, index: ItemIndex) -> None:
    write_rows(path, [authors_row(index, ["1"], "2")])


def _direct_only(path: Path, index: ItemIndex) -> None:
    write_rows(path, [authors_row(index, ["1"], "2", type="direct", item="2", history=["1"])])


def _twice(path: Path, index: ItemIndex) -> None:
    write_rows(path, [authors_row(index, ["1"], "2", item="2", user="u", history=["1"]) for _ in range(2)])


@pytest.mark.parametrize(
    ("write", "sentence"),
    [
        (lambda path, index: None, "no such file"),
        (_text, "not a file of test prompts"),
        (_other_columns, "expected prompt"),
        (_without_index, "is no item of the index; give the index"),
        (_direct_only, "no row of type 'reasoning'"),
        (_twice, "user 'u' has 2 rows"),
    ],
)
def test_files_that_cannot_be_used_are_named(
    index: ItemIndex, tmp_path: Path, write: Callable[[Path, ItemIndex], None], sentence: str
) -> None:
    path = tmp_path / "file.parquet"
    write(path, index)
    with pytest.raises(InputError, match=rf"file.parquet.*: .*{sentence}"):
        read_prompts(path, "reasoning")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "no such file; .*gream data prepare"),
        ({"0": "1"}, r"expected \{user: \[item, ...\]\}"),
        ({"0": ["1", "2"]}, "no user has an interaction for test"),
        ({"0": ["1", "900", "2", "3"]}, "item '900' is not in the index"),
        ({"0": ["1", "2", "900"]}, r"user '0': the target '900' is not in .*small.index.json; add it"),
    ],
)
def test_interactions_that_cannot_be_used_are_named(
    index: ItemIndex, tmp_path: Path, content: Any, sentence: str
) -> None:
    inter = tmp_path / "small.inter.json"
    if content is not None:
        write_json(inter, content)
    with pytest.raises(InputError, match=sentence):
        make_prompts(inter, "direct", PLAIN, index)


def test_a_target_without_a_sid_is_refused_or_counted(folder: DataFolder, index: ItemIndex, tmp_path: Path) -> None:
    everyone, total = make_prompts(folder.inter, "direct", PLAIN, index)
    shown = {item for prompt in everyone for item in prompt.history}
    row, gone = next((row, one.target) for row, one in enumerate(everyone) if one.target not in shown)
    smaller = ItemIndex({item: sid for item, sid in index.sids.items() if item != gone}, "smaller")
    left = [prompt for prompt in everyone if prompt.target != gone]
    skip = EvaluationOptions(skip_missing=True)
    assert make_prompts(folder.inter, "direct", skip, smaller) == (left, total)
    write_prompts(folder, seed=0)
    assert read_prompts(folder.test, "direct", skip, smaller) == (left, total)
    with pytest.raises(InputError, match=rf"small-test.parquet: row {row}: the target '{gone}' is not in smaller"):
        read_prompts(folder.test, "direct", PLAIN, smaller)
    write_json(tmp_path / "D.inter.json", {"0": ["1", "900", "2", "3"], "1": ["1", "2", "3", "4"]})
    assert [prompt.user for prompt in make_prompts(tmp_path / "D.inter.json", "direct", skip, index)[0]] == ["1"]
    write_json(tmp_path / "D.inter.json", {"0": ["1", "2", "900"]})
    with pytest.raises(InputError, match="no user is left"):
        make_prompts(tmp_path / "D.inter.json", "direct", skip, index)
