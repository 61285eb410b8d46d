"""Prompts from files of ours, from files of the authors', and made of the interactions: all the same in the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from assets import make_index, make_tiny_model
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_data import make_data
from transformers import AutoModelForCausalLM, AutoTokenizer

from data_processing.rl import write_prompts
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, write_json
from gream_verl.core.prompts import TEMPLATES
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.core.split import by_time
from gream_verl.evaluation.prompts import (
    Prompt,
    Wording,
    load_model,
    load_tokenizer,
    make_prompts,
    prompts_digest,
    read_prompts,
    types_of,
    wording,
)
from gream_verl.model.vocabulary import sid_token_ids

MODES = ("direct", "reasoning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    return make_data(tmp_path_factory.mktemp("prompts"))


@pytest.fixture
def index(folder: DataFolder) -> ItemIndex:
    return ItemIndex.load(folder.index)


def turn(content: str, role: str = "user") -> dict[str, str]:
    return {"role": role, "content": content}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    pl.DataFrame(rows).write_parquet(path)
    return path


def authors_row(index: ItemIndex, history: list[str], target: str, **extra: Any) -> dict[str, Any]:
    """Return a row as the authors write it: no user, no item, no history."""
    return {
        "data_source": "Instruments",
        "prompt": [turn("Think.", "system"), turn(f"Had {', '.join(index.texts(history))}. Next?")],
        "ability": "recommendation",
        "reward_model": {"style": "rule", "ground_truth": index.text(target)},
        "extra_info": {"title": "A title", **extra},
    }


# -- made of the interactions ------------------------------------------------------------------------------------------


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    for mode in MODES:
        made = make_prompts(folder.inter, index, mode, history=history, limit=limit, seed=seed)
        assert made == read_prompts(folder.test, mode, index=index, limit=limit, seed=seed)
    made = make_prompts(folder.inter, index, "reasoning", split="val", history=history, limit=limit, seed=seed)
    assert made == read_prompts(folder.val, "reasoning", index=index, limit=limit, seed=seed)


def test_the_last_but_one_interactions_are_those_of_validation(folder: DataFolder, index: ItemIndex) -> None:
    sequences = folder.read_inter()
    for split, back in (("val", 2), ("test", 1)):
        prompts, total = make_prompts(folder.inter, index, "direct", split=split)
        assert total == len(sequences)
        assert [prompt.user for prompt in prompts] == list(sequences)
        for prompt in prompts:
            assert [*prompt.history, prompt.target] == sequences[prompt.user][: 1 - back or None]


def test_the_wording_asked_for_is_the_wording_made(folder: DataFolder, index: ItemIndex) -> None:
    prompts, _ = make_prompts(folder.inter, index, "direct", history=2, template="{history}?", system="Be brief.")
    for prompt in prompts:
        shown = "".join(index.texts(prompt.history[-2:]))
        assert prompt.messages == [turn("Be brief.", "system"), turn(f"{shown}?")]
    silent, _ = make_prompts(folder.inter, index, "reasoning", system="")
    assert all([one["role"] for one in prompt.messages] == ["user"] for prompt in silent)


def test_items_written_as_numbers_are_read_as_text(folder: DataFolder, index: ItemIndex, tmp_path: Path) -> None:
    numbers = {user: [int(item) for item in items] for user, items in folder.read_inter().items()}
    write_json(tmp_path / "small.inter.json", numbers)
    expected = make_prompts(folder.inter, index, "direct")
    assert make_prompts(tmp_path / "small.inter.json", index, "direct") == expected


def test_interactions_that_cannot_be_used_are_named(folder: DataFolder, index: ItemIndex, tmp_path: Path) -> None:
    inter = tmp_path / "small.inter.json"
    with pytest.raises(InputError, match=r"small.inter.json: no such file; .*gream data prepare"):
        make_prompts(inter, index, "direct")
    write_json(inter, {"0": "1"})
    with pytest.raises(InputError, match=r"expected \{user: \[item, ...\]\}"):
        make_prompts(inter, index, "direct")
    write_json(inter, {"0": ["1", "2"]})
    with pytest.raises(InputError, match=r"no user has an interaction for val; bring longer histories"):
        make_prompts(inter, index, "direct", split="val")
    write_json(inter, {"0": ["1", "900", "2", "3"]})
    with pytest.raises(InputError, match=r"user '0': item '900' is not in .*small.index.json; add it"):
        make_prompts(inter, index, "direct")
    assert len(make_prompts(inter, index, "direct", history=1)[0]) == 1, "it is not shown"


# -- files of the authors ----------------------------------------------------------------------------------------------


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    separator=st.sampled_from(["", " ", ", ", "\n", " -> "]),
    wrapped=st.sampled_from(["{}", "<answer>{}</answer>", " {}\n", "<think>so</think>{}<answer>{}</answer>"]),
    kind=st.sampled_from([{}, {"type": "rl"}, {"type": None}, {"type": "reasoning"}]),
)
def test_a_file_of_the_authors_says_what_ours_says(
    folder: DataFolder, tmp_path: Path, separator: str, wrapped: str, kind: dict[str, Any]
) -> None:
    index = ItemIndex.load(folder.index)
    ours, _ = make_prompts(folder.inter, index, "reasoning", history=5)
    rows = []
    for prompt in ours:
        row = authors_row(index, [], prompt.target, **kind)
        history = separator.join(index.texts(prompt.history[-5:]))
        row["prompt"] = [turn("Think.", "system"), turn(f"Had {history}. Next?")]
        row["reward_model"]["ground_truth"] = wrapped.replace("{}", index.text(prompt.target))
        rows.append(row)
    read, total = read_prompts(write_rows(tmp_path / "D-val.parquet", rows), "reasoning", index=index)
    assert total == len(ours)
    assert [(prompt.user, prompt.target, prompt.truth, prompt.history) for prompt in read] == [
        (str(number), prompt.target, prompt.truth, prompt.history[-5:]) for number, prompt in enumerate(ours)
    ]
    assert [prompt.messages for prompt in read] == [row["prompt"] for row in rows]
    assert not any(prompt.whole for prompt in read)
    assert wording(read) == Wording(5, "Had {history}. Next?", "Think.", separator)


def test_extra_info_may_be_missing(index: ItemIndex, tmp_path: Path) -> None:
    row = authors_row(index, ["1", "2"], "3")
    del row["extra_info"]
    path = write_rows(tmp_path / "D-val.parquet", [row])
    [prompt], _ = read_prompts(path, "direct", index=index)
    assert (prompt.user, prompt.history, prompt.target) == ("0", ("1", "2"), "3")
    assert types_of(path) == MODES


def test_only_the_last_question_is_the_history(index: ItemIndex, tmp_path: Path) -> None:
    row = authors_row(index, ["1"], "3")
    answered = turn(index.text("5"), "assistant")
    row["prompt"] = [turn(f"After {index.text('4')}?"), answered, turn(f"After {index.text('6')}?")]
    [prompt], _ = read_prompts(write_rows(tmp_path / "D-val.parquet", [row]), "direct", index=index)
    assert prompt.history == ("6",)


def broken(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda row: {**row, **changes}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (broken(reward_model={"ground_truth": "nothing"}), r"row 1: reward_model.ground_truth is 'nothing'; exp"),
        (broken(reward_model={"ground_truth": None}), r"row 1: reward_model.ground_truth is None"),
        (broken(reward_model={"ground_truth": "<|a_9|><|b_9|><|c_9|>"}), r"row 1: .*c_9\|> is no item of the index"),
        (broken(prompt=[turn("Had <|a_8|>. Next?")]), r"row 1: <\|a_8\|> is no item of the index; take the index"),
        (broken(prompt=None), r"row 1: not a row of test prompts .*expected prompt"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(
    index: ItemIndex, tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], sentence: str
) -> None:
    row = authors_row(index, ["1"], "2")
    row["reward_model"] = {"ground_truth": index.text("2")}
    path = write_rows(tmp_path / "D-val.parquet", [row, change(row)])
    with pytest.raises(InputError, match=rf"D-val.parquet: {sentence}"):
        read_prompts(path, "reasoning", index=index)


def test_files_that_cannot_be_used_are_named(folder: DataFolder, index: ItemIndex, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_prompts(tmp_path / "none.parquet", "direct")
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(InputError, match="not a file of test prompts"):
        read_prompts(tmp_path / "text.parquet", "direct")
    with pytest.raises(InputError, match="not a file of test prompts"):
        types_of(tmp_path / "text.parquet")
    other = write_rows(tmp_path / "other.parquet", [{"text": "no column of verl's"}])
    with pytest.raises(InputError, match=r"other.parquet: not a file of test prompts"):
        read_prompts(other, "direct")
    foreign = write_rows(tmp_path / "foreign.parquet", [authors_row(index, ["1"], "2")])
    with pytest.raises(InputError, match="row 0: does not name its items; give the item index"):
        read_prompts(foreign, "direct")
    direct = write_rows(tmp_path / "direct.parquet", [authors_row(index, ["1"], "2", type="direct")])
    assert types_of(direct) == ("direct",)
    with pytest.raises(InputError, match="no row of type 'reasoning'"):
        read_prompts(direct, "reasoning", index=index)


def test_a_user_is_evaluated_once(folder: DataFolder, index: ItemIndex, tmp_path: Path) -> None:
    write_prompts(folder, seed=0)
    with pytest.raises(InputError, match=r"small-rl.parquet, .*: user '\d+' stands in \d+ rows; .*one held-out item"):
        read_prompts(folder.rl, "reasoning", index=index)


# -- targets without a SID ---------------------------------------------------------------------------------------------


def test_a_target_that_is_not_recommended_is_refused_or_counted(
    folder: DataFolder, index: ItemIndex, tmp_path: Path
) -> None:
    everyone, total = make_prompts(folder.inter, index, "direct")
    shown = {item for prompt in everyone for item in prompt.history}
    place, gone = next((place, one.target) for place, one in enumerate(everyone) if one.target not in shown)
    fewer = tmp_path / "small.index.json"
    ItemIndex({item: sid for item, sid in index.sids.items() if item != gone}).save(fewer)
    smaller = ItemIndex.load(fewer)
    left = [prompt for prompt in everyone if prompt.target != gone]
    with pytest.raises(InputError, match=rf"user '.*': the target '{gone}' cannot be recommended: .*--skip-m"):
        make_prompts(folder.inter, smaller, "direct")
    assert make_prompts(folder.inter, smaller, "direct", skip=True) == (left, total)
    write_prompts(folder, seed=0)
    with pytest.raises(InputError, match=rf"small-test.parquet: row {place}: the target '{gone}' cannot be"):
        read_prompts(folder.test, "direct", index=smaller)
    assert read_prompts(folder.test, "direct", index=smaller, skip=True) == (left, total)


def test_nobody_left_is_said(index: ItemIndex, tmp_path: Path) -> None:
    write_json(tmp_path / "D.inter.json", {"0": ["1", "2", "900"]})
    with pytest.raises(InputError, match="no user is left"):
        make_prompts(tmp_path / "D.inter.json", index, "direct", skip=True)


# -- what prompts have in common ---------------------------------------------------------------------------------------


def test_the_wording_of_our_files_is_found(folder: DataFolder, index: ItemIndex) -> None:
    write_prompts(folder, seed=0, history=4)
    for mode in MODES:
        prompts, _ = read_prompts(folder.test, mode)
        assert wording(prompts).template == TEMPLATES[mode][0]
        assert wording(prompts).history == 4


def test_different_wordings_are_counted() -> None:
    prompts = [Prompt(str(user), "1", (), [turn(text)], "") for user, text in enumerate(["A <|a_1|>", "B", "B"])]
    assert wording(prompts) == Wording(1, "2 different ones, most often 'B'", "", "")


def test_the_digest_is_of_users_targets_and_messages_in_order() -> None:
    one, two = (Prompt(user, "7", ("1",), [turn("S", "system"), turn("A?")], "") for user in "12")
    digest = prompts_digest([one, two])
    assert digest == prompts_digest([replace(one, truth="t", history=(), whole=False), two])
    others = [
        replace(one, user="3"), replace(one, target="8"), replace(one, messages=[turn("A?")]),
        replace(one, messages=[turn("S"), turn("A?")]), replace(one, messages=[turn("S", "system"), turn("B?")]),
    ]  # fmt: skip
    different = [[two, one], [one], *([other, two] for other in others)]
    assert len({digest, *map(prompts_digest, different)}) == 1 + len(different)


# -- checkpoints -------------------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model", make_index())


def change_config(model: Path, **values: Any) -> None:
    write_json(model / "config.json", read_json(model / "config.json") | values)


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 8},
         "sliding_attention"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "layer_types": None, "sliding_window": 8},
         "sliding_attention"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_see_the_whole_prompt_is_refused(model: Path, values: dict[str, Any], kind: str) -> None:
    load_tokenizer(model)
    change_config(model, **values)
    for load in (load_tokenizer, load_model):
        with pytest.raises(InputError, match=rf"layers of {kind}, but the beam search needs full_attention"):
            load(model)


def test_a_tokenizer_of_a_larger_model_is_refused(model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    rows = read_json(model / "config.json")["vocab_size"]
    tokenizer.add_tokens([f"<more_{number}>" for number in range(rows)])
    tokenizer.save_pretrained(model)
    with pytest.raises(InputError, match=rf"but the model only {rows} tokens; copy both from the same checkpoint"):
        load_model(model)


def test_a_checkpoint_in_half_precision_without_a_padding_token_is_taken(model: Path) -> None:
    AutoModelForCausalLM.from_pretrained(model, dtype="bfloat16").save_pretrained(model)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        kept = {key: value for key, value in json.loads((model / name).read_text()).items() if "pad_token" not in key}
        write_json(model / name, kept)
    loaded, tokenizer = load_model(model)
    assert tokenizer.pad_token is None
    assert loaded.config.vocab_size > len(tokenizer), "padded"
    assert len(sid_token_ids(tokenizer, make_index())) == len(make_index().tokens)
