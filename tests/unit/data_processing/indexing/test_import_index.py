from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_processing.indexing.import_index import import_rows, read_other_index
from data_processing.indexing.residual_index import resolve_collisions
from gream_verl.core.errors import InputError
from gream_verl.core.files import write_json
from gream_verl.core.semantic_ids import ItemIndex, format_token, parse_token

SHARED = {"7": ["<a_4>", "<b_0>", "<c_2>"], "3": ["<a_1>", "<b_5>", "<c_0>"], "5": ["<a_4>", "<b_0>", "<c_2>"]}
"""Two of three items share a SID."""

Write = Callable[[Any], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(value: Any) -> Path:
        path = tmp_path / "X.index.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    return write


def in_form(index: ItemIndex, form: str) -> dict[str, Any]:
    """Write the SIDs of our index as others do."""
    rows: dict[str, Any] = {}
    for item, sid in index.sids.items():
        parsed = [parsed for token in sid if (parsed := parse_token(token))]
        if form == "tiger":
            rows[item] = [code - 1 for _, code in parsed]
        elif form == "letter":
            rows[item] = [f"<{'abcdefgh'[level]}_{code - 1}>" for level, code in parsed]
        elif form in ("sid", "item"):
            tokens = (
                f"<{form[0] if form == 'sid' else form}_{'abcdefgh'[level]}_{code - 1}>" for level, code in parsed
            )
            rows[item] = f"<|{form}_begin|>{''.join(tokens)}<|{form}_end|>"
        else:
            rows[item] = list(sid)
    return rows


CODES = st.integers(1, 4).flatmap(
    lambda levels: st.lists(st.lists(st.integers(0, 3), min_size=levels, max_size=levels), min_size=1, max_size=12)
)
"""Codes as residual k-means gives them, with collisions."""


@given(codes=CODES, form=st.sampled_from(["ours", "letter", "tiger", "sid", "item"]))
@settings(max_examples=25, deadline=None)
def test_an_index_in_any_form_comes_back_with_the_same_sids(
    tmp_path_factory: pytest.TempPathFactory, codes: list[list[int]], form: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "round.index.json"
    index = ItemIndex.from_codes([f"item {row}" for row in range(len(codes))], resolve_collisions(np.array(codes)))
    write_json(path, in_form(index, form))
    other = read_other_index(path)
    assert list(other.to_index().sids.items()) == list(index.sids.items())
    assert other.to_index(resolve=True).sids == index.sids  # nothing is left to resolve


@given(codes=CODES, form=st.sampled_from(["letter", "tiger"]))
@settings(max_examples=25, deadline=None)
def test_resolved_collisions_keep_the_path_of_every_item(
    tmp_path_factory: pytest.TempPathFactory, codes: list[list[int]], form: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "raw.index.json"
    rows = {str(row): [f"<{'abcd'[level]}_{code}>" for level, code in enumerate(one)] for row, one in enumerate(codes)}
    write_json(path, rows if form == "letter" else dict(enumerate(codes)))
    other = read_other_index(path)
    if len({tuple(one) for one in codes}) < len(codes):
        with pytest.raises(InputError, match="--resolve"):
            other.to_index()
    index = other.to_index(resolve=True)
    for row, one in enumerate(codes):
        expected = tuple(format_token(level, code + 1) for level, code in enumerate(one))
        assert index.sids[str(row)][: len(one)] == expected
        assert len(index.sids[str(row)]) == len(one) + (codes.count(one) > 1)


@pytest.mark.parametrize(
    ("row", "form", "sid"),
    [
        (["<|a_1|>", "<|b_9|>"], "GREAM", "<|a_1|><|b_9|>"),
        (["<|a_0|>", "<|b_9|>"], "GREAM", "<|a_1|><|b_10|>"),  # ours, but counted from 0
        (["<a_1>", "<b_9>"], "LETTER", "<|a_2|><|b_10|>"),
        ([1, 9], "TIGER", "<|a_2|><|b_10|>"),
    ],
)
def test_the_form_is_seen_from_the_tokens(write: Write, row: list[Any], form: str, sid: str) -> None:
    other = read_other_index(write({"1": row}))
    assert other.describe()["form"].startswith(form)
    assert other.to_index().text("1") == sid


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"x": ["<a_1>", "<b_1>"], "y": ["<a_1>", "b_2"]}, "item 'y' has "),
        ({"x": ["<a_1>"], "y": ["<|a_1|>"]}, "item 'y' has .*of one form in the whole file"),
        ({"x": ["<a_1>"], "y": [2]}, "item 'y' has "),
        ({"x": ["<a_1>"], "y": [["<a_1>"]]}, "item 'y' has "),
        ({"x": [1, 2], "y": [1, True]}, "item 'y' has "),
        ({"x": ["<b_1>", "<a_2>"]}, "item 'x' has .*one token per level, in order"),
        ({"x": ["<a_1>", "<b_1>", "<d_1>"]}, "item 'x' has "),
        ({"x": ["<a_1>"], "y": ["<a_1>", "<b_1>", "<c_1>"], "z": ["<a_2>"]}, "item 'y' has 3 tokens"),
        ({"x": [1, 2, 3], "y": [4, 5, 6], "z": [7, 2, 4], "t": [1, 3]}, "item 't' has 2 tokens"),
        ({"x": list(range(26))}, "item 'x' has "),
        ({"x": []}, "item 'x' has "),
        ({"x": "a_1"}, "item 'x' has "),
        ({}, "at least one item"),
        ([["<a_1>"]], "expected {item"),
        ('{"x": ["<a_1>"]', "not valid JSON"),
    ],
)
def test_a_malformed_file_is_refused_with_its_item(write: Write, rows: Any, message: str) -> None:
    path = write(rows)
    with pytest.raises(InputError, match=message) as caught:
        read_other_index(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("rows", "message", "sharing"),
    [
        (SHARED, "items '7' and '5' share the SID", {"7", "5"}),
        # The SID of the first item of a path is the beginning of the other's.
        ({"x": [1, 2], "y": [1, 2, 0], "z": [3, 4]}, "item 'x' is a prefix of that of 'y'", {"x", "y"}),
        ({"y": [1, 2, 1], "x": [1, 2, 0], "z": [1, 2, 1], "t": [3, 4]}, "'y' and 'z' share", {"x", "y", "z"}),
    ],
)
def test_collisions_are_named_and_can_be_resolved(
    write: Write, rows: dict[str, list[Any]], message: str, sharing: set[str]
) -> None:
    other = read_other_index(write(rows))
    with pytest.raises(InputError, match=message):
        other.to_index()
    index = other.to_index(resolve=True)
    levels = min(map(len, rows.values()))
    assert {item for item, sid in index.sids.items() if len(sid) > levels} == sharing
    last = [parse_token(index.sids[item][-1]) for item in index.sids if item in sharing]
    assert last == [(levels, number) for number in range(1, len(sharing) + 1)]


def test_a_collision_token_may_be_alone_when_a_catalogue_has_lost_items(write: Write) -> None:
    other = read_other_index(write({"x": [1, 2], "y": [1, 3, 1], "z": [2, 0]}))
    assert other.to_index().text("y") == "<|a_2|><|b_4|><|c_2|>"


def test_the_table_counts_codes_and_collisions(write: Write) -> None:
    rows = {"x": ["<a_0>", "<b_7>"], "y": ["<a_4>", "<b_7>", "<c_0>"], "z": ["<a_4>", "<b_7>", "<c_1>"]}
    assert read_other_index(write(rows)).describe() == {
        "form": "LETTER, LC-Rec, MiniOneRec: tokens such as <a_0>, codes from 0",
        "items": 3,
        "codes used": {"a": 2, "b": 1},
        "items with a collision token": 2,
        "items that share a SID": 0,
    }
    assert read_other_index(write(SHARED)).describe()["items that share a SID"] == 2


def test_the_items_of_a_data_set_are_taken_in_its_order(write: Write) -> None:
    other = read_other_index(write({"a": [1, 1], "b": [1, 1], "c": [0, 2]}))
    taken = other.for_items({"b": 0, "a": 0}, "D.item.json")
    assert list(taken.paths) == ["b", "a"]
    assert taken.to_index(resolve=True).text("b") == "<|a_2|><|b_2|><|c_1|>"
    with pytest.raises(InputError, match=r"no SID for 2 of the 3 items of D\.item\.json, such as 'B1'; take the item"):
        other.for_items({"B1": 0, "B2": 0, "a": 0}, "D.item.json")


def test_rows_of_another_project_get_our_tokens(tmp_path: Path) -> None:
    text = "Had <a_0><b_6> and <a_11>, not <abc_1>."
    rows = [{"prompt": [{"role": "user", "content": text}], "n": 7, "reward_model": {"ground_truth": "<a_1><b_0>"}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    report = import_rows(tmp_path / "rows.parquet", tmp_path / "ours.parquet")
    assert (report["tokens"], report["rows"]) == (5, 1)
    [made] = pq.read_table(tmp_path / "ours.parquet").to_pylist()
    assert made["prompt"][0]["content"] == "Had <|a_1|><|b_7|> and <|a_12|>, not <abc_1>."
    assert (made["n"], made["reward_model"]["ground_truth"]) == (7, "<|a_2|><|b_1|>")
    with pytest.raises(InputError, match="holds no SID of another project"):
        import_rows(tmp_path / "ours.parquet", tmp_path / "again.parquet")
    pq.write_table(pa.table({"text": ["<|sid_begin|><s_a_0><|sid_end|>", "x"]}), tmp_path / "onerec.parquet")
    import_rows(tmp_path / "onerec.parquet", tmp_path / "two.parquet")
    assert pq.read_table(tmp_path / "two.parquet")["text"].to_pylist() == ["<|a_1|>", "x"]
