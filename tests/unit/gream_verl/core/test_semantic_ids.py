import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex, find_tokens, format_token, parse_sid, parse_token

codes = st.integers(min_value=1, max_value=999_999)
levels = st.integers(min_value=0, max_value=25)


@settings(max_examples=25)
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


@settings(max_examples=25)
@given(st.lists(codes, min_size=1, max_size=6))
def test_a_sid_round_trips(path):
    tokens = tuple(format_token(level, code) for level, code in enumerate(path))
    assert parse_sid("".join(tokens)) == tokens


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


def test_tokens_are_in_memory_once_however_many_items_have_them(tmp_path):
    ItemIndex.from_codes(["x", "y"], [[0, 1], [0, 2]]).save(tmp_path / "D.index.json")
    index = ItemIndex.load(tmp_path / "D.index.json")
    assert index.sids["x"][0] is index.sids["y"][0]


def test_of_many_that_share_or_begin_alike_the_first_in_the_file_are_named():
    with pytest.raises(InputError, match=r"items 'b' and 'c' share the SID .*5 items share theirs"):
        ItemIndex.from_codes(["a", "b", "c", "d", "e", "f"], [[0, 0], [9, 1], [9, 1], [0, 0], [4, 4], [9, 1]])
    with pytest.raises(InputError, match="SID of item 'c' is a prefix of that of 'b'"):
        ItemIndex.from_codes(["a", "b", "c"], [[0, 0], [9, 1, 0], [9, 1]])


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


def plain_fault(sids):
    """Return the fault of an index, None for a good one, from a look at every pair of items."""
    if not all(isinstance(token, str) for sid in sids.values() for token in sid):
        return "malformed"
    if any(parse_sid("".join(sid)) != sid for sid in sids.values()):
        return "malformed"
    pairs = [(one, other) for item, one in sids.items() for another, other in sids.items() if item != another]
    if any(one == other for one, other in pairs):
        return "share the SID"
    if max(map(len, sids.values())) > min(map(len, sids.values())) + 1:
        return "or one more"
    return "is a prefix" if any(one == other[: len(one)] for one, other in pairs) else None


def sids_of(least, most):
    paths = st.lists(st.integers(1, 2), min_size=least, max_size=most)
    return paths.map(lambda path: tuple(format_token(level, code) for level, code in enumerate(path)))


broken = st.sampled_from(["<|a_1|>", "<|b_1|>", "<|b_0|>", "", "<|a_1|><|b_1|>", 7, None])
any_sids = st.lists(sids_of(1, 4), min_size=1, max_size=7)
sids_as_built = st.integers(1, 3).flatmap(lambda base: st.lists(sids_of(base, base + 1), min_size=1, max_size=7))
broken_sids = st.lists(sids_of(1, 2) | st.lists(broken, max_size=3).map(tuple), min_size=1, max_size=7)


@settings(max_examples=120)
@given(any_sids | sids_as_built | broken_sids)
def test_an_index_is_refused_exactly_when_a_plain_check_of_every_pair_finds_the_fault(paths):
    sids = {str(item): path for item, path in enumerate(paths)}
    fault = plain_fault(sids)
    if fault is None:
        assert ItemIndex(sids).sids == sids
        return
    with pytest.raises(InputError, match=fault):
        ItemIndex(sids)


def test_a_missing_or_torn_index_says_how_to_make_it(tmp_path):
    with pytest.raises(InputError, match="gream index build"):
        ItemIndex.load(tmp_path / "none.json")
    (tmp_path / "torn.json").write_text('{"x": ["<|a_1|>"')
    with pytest.raises(InputError, match="not valid JSON"):
        ItemIndex.load(tmp_path / "torn.json")


def test_an_item_that_is_not_in_the_index_is_named():
    with pytest.raises(InputError, match="'ghost' is not in the index"):
        ItemIndex.from_codes(["x"], [[0]]).text("ghost")
