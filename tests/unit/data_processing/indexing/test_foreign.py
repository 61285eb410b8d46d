import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from data_processing.indexing.foreign import read_foreign
from data_processing.indexing.residual_index import resolve_collisions
from gream_verl.cli.index import index_app
from gream_verl.core.data_folder import DataFolder, Item
from gream_verl.core.errors import InputError
from gream_verl.core.files import write_json
from gream_verl.core.semantic_ids import ItemIndex, format_token, parse_token

SHARED = {"7": ["<a_4>", "<b_0>", "<c_2>"], "3": ["<a_1>", "<b_5>", "<c_0>"], "5": ["<a_4>", "<b_0>", "<c_2>"]}
"""Two of three items share a SID."""


@pytest.fixture
def write(tmp_path):
    def write(value):
        path = tmp_path / "X.index.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    return write


def make_folder(root, *items):
    folder = DataFolder(root, "D")
    write_json(folder.item, {item: vars(Item(f"Title {item}")) for item in items})
    return folder


def in_form(index, form):
    """Write the SIDs of our index as others do."""
    write = {"ours": "<|{}_{}|>", "letter": "<{}_{}>", "tiger": ""}[form]
    rows = {}
    for item, sid in index.sids.items():
        places = [parse_token(token) for token in sid]
        if form == "tiger":
            rows[item] = [code - 1 for _, code in places]
        else:
            rows[item] = [write.format("abcdefgh"[level], code - (form == "letter")) for level, code in places]
    return rows


built = st.integers(1, 4).flatmap(
    lambda levels: st.lists(st.lists(st.integers(0, 3), min_size=levels, max_size=levels), min_size=1, max_size=12)
)
"""Codes as residual k-means gives them, with collisions."""


@given(codes=built, form=st.sampled_from(["ours", "letter", "tiger"]))
def test_an_index_in_any_form_comes_back_with_the_same_sids(tmp_path_factory, codes, form):
    path = tmp_path_factory.getbasetemp() / "round.index.json"
    index = ItemIndex.from_codes([f"item {row}" for row in range(len(codes))], resolve_collisions(np.array(codes)))
    write_json(path, in_form(index, form))
    foreign = read_foreign(path)
    assert foreign.index().sids == index.sids
    assert list(foreign.index().sids) == list(index.sids)
    assert foreign.index(resolve=True).sids == index.sids  # there is nothing left to resolve


@given(codes=built, form=st.sampled_from(["letter", "tiger"]))
def test_what_is_resolved_keeps_the_path_of_every_item(tmp_path_factory, codes, form):
    path = tmp_path_factory.getbasetemp() / "raw.index.json"
    rows = {str(row): [f"<{'abcd'[level]}_{code}>" for level, code in enumerate(one)] for row, one in enumerate(codes)}
    write_json(path, rows if form == "letter" else dict(enumerate(codes)))
    foreign = read_foreign(path)
    distinct = len({tuple(one) for one in codes})
    assert bool(foreign.collisions) == (distinct < len(codes))
    if foreign.collisions:
        with pytest.raises(InputError, match="--resolve"):
            foreign.index()
    index = foreign.index(resolve=True)
    for row, one in enumerate(codes):
        expected = tuple(format_token(level, code + 1) for level, code in enumerate(one))
        assert index.sids[str(row)][: len(one)] == expected
        assert len(index.sids[str(row)]) == len(one) + (codes.count(one) > 1)


@pytest.mark.parametrize(
    ("rows", "form", "first"),
    [
        ({"1": ["<|a_1|>", "<|b_9|>"]}, "GREAM: tokens such as <|a_1|>, codes from 1", "<|a_1|><|b_9|>"),
        ({"1": ["<|a_0|>", "<|b_9|>"]}, "tokens such as <|a_0|>, codes from 0", "<|a_1|><|b_10|>"),
        ({"1": ["<a_1>", "<b_9>"]}, "LETTER, LC-Rec, MiniOneRec: tokens such as <a_0>, codes from 0",
         "<|a_2|><|b_10|>"),
        ({"1": [1, 9]}, "TIGER: lists of codes from 0", "<|a_2|><|b_10|>"),
    ],
)  # fmt: skip
def test_the_form_is_seen_from_the_tokens(write, rows, form, first):
    foreign = read_foreign(write(rows))
    assert foreign.describe()["form"] == form
    assert foreign.index().text("1") == first


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"x": ["<a_1>", "<b_1>"], "y": ["<a_1>", "b_2"]}, "item 'y' has 'b_2' .* tokens such as '<a_1>'"),
        ({"x": ["<a_1>"], "y": ["<|a_1|>"]}, r"item 'y' has '<\|a_1\|>' .* tokens such as '<a_1>' in the whole file"),
        ({"x": ["<a_01>"]}, "item 'x' has '<a_01>' .* tokens such as"),
        ({"x": ["<a_1>"], "y": [2]}, "item 'y' has 2 "),
        ({"x": ["<a_1>"], "y": [["<a_1>"]]}, r"item 'y' has \['<a_1>'\]"),
        ({"x": [1, 2], "y": [1, -1]}, "item 'y' has -1 .* whole numbers from 0"),
        ({"x": [1, 2], "y": [1, "<b_1>"]}, "item 'y' has '<b_1>' .* whole numbers from 0"),
        ({"x": [1, 2], "y": [1, True]}, "item 'y' has True .* whole numbers from 0"),
        ({"x": ["<b_1>", "<a_2>"]}, "item 'x': level b comes before level a"),
        ({"x": ["<a_1>", "<b_1>", "<d_1>"]}, "item 'x': level c is missing"),
        ({"x": ["<b_1>", "<c_1>"]}, "item 'x': level a is missing"),
        ({"x": ["<a_1>", "<a_2>"]}, "item 'x': level a is there twice"),
        ({"x": ["<a_1>"], "y": ["<a_1>", "<b_1>", "<c_1>"], "z": ["<a_2>"]}, "item 'y' has 3 tokens, .* 2 items"),
        ({"x": [1, 2, 3], "y": [4, 5, 6], "z": [7, 2, 4], "t": [1, 3]}, "item 't' has 2 tokens, but 3 items have 3"),
        ({"x": list(range(26))}, "26 levels; expected at most 25"),
        ({"x": []}, r"item 'x' has \[\]; expected a list"),
        ({"x": "<a_1>"}, "item 'x' has '<a_1>'; expected a list"),
        ({}, "at least one item"),
        ([["<a_1>"]], "expected {item"),
        ('{"x": ["<a_1>"]', "not valid JSON .*; fetch it anew"),
        ('{"x": ["<a_1>"], "y": ["<a_2>"], "x": ["<a_3>"]}', r"1 items are there more than once \('x'\)"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_file_is_said_with_its_item(write, rows, message):
    path = write(rows)
    with pytest.raises(InputError, match=message) as caught:
        read_foreign(path)
    assert str(caught.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (SHARED, r"2 items on 1 paths\), such as '7' \[4, 0, 2\] and '5' \[4, 0, 2\]"),
        # the first item of a path without a collision token: its SID is the beginning of the other's
        ({"x": [1, 2], "y": [1, 2, 0], "z": [3, 4]}, r"2 items on 1 paths\), such as 'x' \[1, 2\] and 'y' \[1, 2, 0\]"),
        ({"y": [1, 2, 1], "x": [1, 2, 0], "z": [1, 2, 1], "t": [3, 4]}, r"'y' \[1, 2, 1\] and 'z' \[1, 2, 1\]"),
    ],
)
def test_collisions_that_are_not_resolved_are_named_and_can_be(write, rows, message):
    foreign = read_foreign(write(rows))
    with pytest.raises(InputError, match=message):
        foreign.index()
    index = foreign.index(resolve=True)
    levels = min(map(len, rows.values()))
    clash = {item for group in foreign.collisions for item in group}
    assert {item for item, sid in index.sids.items() if len(sid) > levels} == clash
    assert [index.sids[item][-1].split("_")[1] for item in index.sids if item in clash] == [
        f"{number}|>" for number in range(1, len(clash) + 1)
    ]


def test_a_collision_token_may_be_alone_when_a_catalogue_has_lost_items(write):
    rows = {"x": [1, 2], "y": [1, 3, 1], "z": [2, 0]}
    assert read_foreign(write(rows)).index().text("y") == "<|a_2|><|b_4|><|c_2|>"


def test_the_table_counts_codes_lengths_and_collisions(write):
    rows = {"x": ["<a_0>", "<b_7>"], "y": ["<a_4>", "<b_7>", "<c_0>"], "z": ["<a_4>", "<b_7>", "<c_1>"]}
    assert read_foreign(write(rows)).describe() == {
        "form": "LETTER, LC-Rec, MiniOneRec: tokens such as <a_0>, codes from 0",
        "items": "3",
        "levels": 2,
        "codes of level": {"a": "2 used, highest 4", "b": "1 used, highest 7"},
        "length": "2, one more for 2 items",
        "last level": "as the others",
        "not resolved": {"collisions": "0", "items": "0"},
    }


def test_a_last_level_that_numbers_items_is_told(write):
    rows = {"x": [5, 2, 0], "y": [5, 2, 1], "z": [5, 3, 0]}
    assert read_foreign(write(rows)).describe()["last level"] == "numbers the items that share all others"
    assert read_foreign(write({**rows, "z": [5, 3, 1]})).describe()["last level"] == "as the others"


def test_the_items_of_a_data_set_are_taken_in_its_order_and_others_left_out(write):
    foreign = read_foreign(write({"a": [1, 1], "b": [1, 1], "c": [0, 2]}))
    taken = foreign.for_items({"b": 0, "a": 0}, "D.item.json")
    assert list(taken.paths) == ["b", "a"]
    assert taken.describe()["items that the data set lacks"] == "1"
    assert taken.index(resolve=True).text("b") == "<|a_2|><|b_2|><|c_1|>"  # numbered in the order of the data set


def test_an_item_without_a_sid_is_named_beside_what_the_file_has(write):
    path = write({str(item): [item, 0] for item in range(5)})
    with pytest.raises(InputError, match="for 2 of the 3 items of D") as caught:
        read_foreign(path).for_items({"B1": 0, "B2": 0, "3": 0}, "D.item.json")
    assert "('B1', 'B2'), but one for 4 others ('0', '1', '2', ...)" in str(caught.value)


def invoke(*arguments):
    return CliRunner().invoke(index_app, [str(argument) for argument in arguments])


def test_check_prints_the_table_and_fails_on_collisions(write, tmp_path):
    path = write(SHARED)
    done = invoke("check", path)
    assert "LETTER" in done.stdout
    assert "2 used, highest 4" in done.stdout
    assert isinstance(done.exception, InputError)
    assert "--resolve" in str(done.exception)
    assert invoke("check", write({"0": [1, 2], "1": [0, 2]})).exit_code == 0
    make_folder(tmp_path, "0", "9")
    lacking = invoke("check", path, "--data", tmp_path, "--dataset", "D")
    assert "has no SID for 1 of the 2 items" in str(lacking.exception)


def test_an_import_is_read_by_the_loader_and_needs_collisions_resolved(write, tmp_path):
    path, folder = write(SHARED), make_folder(tmp_path, "3", "5", "7")
    where = ("--data", tmp_path, "--dataset", "D")
    refused = invoke("import", path, *where)
    assert isinstance(refused.exception, InputError)
    assert not folder.index.exists()
    done = invoke("import", path, *where, "--resolve")
    assert done.exit_code == 0, done.exception
    assert "gream index build" in " ".join(done.stdout.split())
    index = folder.read_index(folder.read_items())
    assert list(index.sids) == ["3", "5", "7"]
    assert index.texts(["3", "5", "7"]) == [
        "<|a_2|><|b_6|><|c_1|>", "<|a_5|><|b_1|><|c_3|><|d_1|>", "<|a_5|><|b_1|><|c_3|><|d_2|>"
    ]  # fmt: skip
    before = folder.index.read_bytes()
    assert invoke("import", folder.index, *where).exit_code == 0
    assert folder.index.read_bytes() == before


def test_an_import_without_an_item_file_takes_all_in_the_order_of_the_file(write, tmp_path):
    done = invoke("import", write({"9": [1], "2": [0]}), "--data", tmp_path / "new", "--dataset", "D")
    assert done.exit_code == 0, done.exception
    assert list(ItemIndex.load(tmp_path / "new" / "D.index.json").sids) == ["9", "2"]
