import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gream_verl.files import InputError
from gream_verl.semantic_ids import ItemIndex, find_tokens, format_token, parse_sid, parse_token

codes = st.integers(min_value=1, max_value=999_999)
levels = st.integers(min_value=0, max_value=25)


@given(levels, codes)
def test_a_token_round_trips(level, code):
    assert parse_token(format_token(level, code)) == (level, code)


@pytest.mark.parametrize("text", ["", "<|a_0|>", "<|a_01|>", "<|A_1|>", "<|a_1|", "<|a_-1|>", "<|im_end|>", "<|a_1|> "])
def test_what_is_no_token_is_refused(text):
    assert parse_token(text) is None


@pytest.mark.parametrize(("level", "code"), [(-1, 1), (26, 1), (0, 0)])
def test_a_token_outside_the_grammar_is_not_made(level, code):
    with pytest.raises(ValueError, match="level"):
        format_token(level, code)


@given(st.lists(codes, min_size=1, max_size=6))
def test_a_sid_round_trips(path):
    tokens = tuple(format_token(level, code) for level, code in enumerate(path))
    assert parse_sid("".join(tokens)) == tokens


@given(st.text())
def test_parsing_never_raises(text):
    assert parse_sid(text) is None or "".join(parse_sid(text)) == text


@pytest.mark.parametrize(
    "text", ["<|b_1|>", "<|a_1|><|c_1|>", "<|a_1|><|a_1|>", "<|a_1|>\n<|b_1|>", "x<|a_1|>", "<|a_1|>x", ""]
)
def test_a_sid_out_of_order_or_with_company_is_malformed(text):
    assert parse_sid(text) is None


def test_tokens_are_found_in_running_text():
    assert find_tokens("saw <|a_1|><|b_22|>, then <|a_3|>.") == ["<|a_1|>", "<|b_22|>", "<|a_3|>"]


def test_an_index_is_saved_and_loaded_byte_for_byte(tmp_path):
    index = ItemIndex.from_codes(["x", "y", "z"], [[0, 1], [2, 0, 0], [2, 0, 1]])
    index.save(tmp_path / "first.json")
    ItemIndex.load(tmp_path / "first.json").save(tmp_path / "second.json")
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()
    assert index.base_levels == 2
    assert index.tokens == ["<|a_1|>", "<|a_3|>", "<|b_1|>", "<|b_2|>", "<|c_1|>", "<|c_2|>"]
    assert index.items[("<|a_3|>", "<|b_1|>", "<|c_2|>")] == "z"
    assert index.text("x") == "<|a_1|><|b_2|>"


@pytest.mark.parametrize(
    ("sids", "message"),
    [
        ({}, "empty"),
        ({"x": ["<|a_1|>"], "y": ["<|a_1|>"]}, "share"),
        ({"x": ["<|b_1|>"]}, "malformed"),
        ({"x": []}, "malformed"),
        ({"x": [1]}, "malformed"),
        ({"x": ["<|a_1|><|b_1|>"]}, "malformed"),
        ({"x": ["<|a_1|>"], "y": ["<|a_1|>", "<|b_1|>"]}, "prefix"),
        ({"x": ["<|a_1|>"], "y": ["<|a_2|>", "<|b_1|>", "<|c_1|>"]}, "expected 1 or one more"),
        ({"x": "<|a_1|>"}, "expected"),
        (["<|a_1|>"], "expected"),
    ],
)
def test_a_broken_index_is_refused_with_its_file_named(tmp_path, sids, message):
    path = tmp_path / "D.index.json"
    path.write_text(json.dumps(sids))
    with pytest.raises(InputError, match=message) as caught:
        ItemIndex.load(path)
    assert str(path) in str(caught.value)


def test_a_missing_or_torn_index_says_how_to_make_it(tmp_path):
    with pytest.raises(InputError, match="gream index build"):
        ItemIndex.load(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"x": ["<|a_1|>"')
    with pytest.raises(InputError, match="not valid JSON"):
        ItemIndex.load(tmp_path / "torn.json")


def test_an_item_that_is_not_in_the_index_is_named():
    with pytest.raises(InputError, match="'ghost' is not in the index"):
        ItemIndex.from_codes(["x"], [[0]]).text("ghost")
