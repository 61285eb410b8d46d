from __future__ import annotations

import doctest
import math
import re

import pytest
from assets import make_index, reasoning_response
from hypothesis import given, settings
from hypothesis import strategies as st

from gream_verl.core import rsvr
from gream_verl.core.rsvr import match_score, reference_answer, score_response, strict_answer
from gream_verl.core.semantic_ids import parse_sid, parse_token
from gream_verl.core.token_text import MASKED_BAR

INDEX = make_index()
TRUTH = ("<|a_12|>", "<|b_7|>", "<|c_201|>", "<|d_3|>", "<|e_2|>")  # four base levels and a collision token
PIECES = st.sampled_from(
    [
        *TRUTH,
        "<|a_1|>",
        "<|b_1|>",
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "text",
        " ",
        "\n",
        "<|im_end|>",
        "<|a_0|>",
    ]
)
RESPONSES = st.one_of(st.text(), st.lists(PIECES, max_size=14).map("".join))
MODES = st.sampled_from(["reasoning", "direct"])
FORMATS = st.sampled_from(["strict", "reference"])


def test_docstring_examples():
    assert doctest.testmod(rsvr).failed == 0


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ((), 0.0),
        (("<|a_1|>", *TRUTH[1:]), 0.0),
        (TRUTH[:1], 0.5),
        ((*TRUTH[:1], "<|b_9|>", *TRUTH[2:]), 0.5),
        (TRUTH[:2], 0.707),
        (TRUTH[:3], 0.866),
        ((*TRUTH[:3], "<|d_9|>"), 0.866),
        (TRUTH[:4], 0.95),
        ((*TRUTH[:4], "<|e_9|>"), 0.95),
        (TRUTH, 1.0),
    ],
)
def test_match_equals_the_authors_table(answer, expected):
    assert match_score(answer, TRUTH, 4) == pytest.approx(expected, abs=1e-3)


def test_a_collision_token_too_many_is_worth_the_base_path():
    assert match_score(TRUTH, TRUTH[:4], 4) == 0.95


@pytest.mark.parametrize("format_", ["strict", "reference"])
@pytest.mark.parametrize("levels", [1, 4])
def test_both_formats_pay_well_formed_answers_alike_on_any_number_of_levels(format_, levels):
    truth = tuple(f"<|{letter}_5|>" for letter in "abcdef"[:levels])
    for depth in range(levels + 1):
        answer = [token if level < depth else token.replace("5", "6") for level, token in enumerate(truth)]
        reward = score_response(reasoning_response("".join(answer)), truth, format=format_)
        assert reward.score == pytest.approx(math.sqrt(depth / levels) if depth < levels else 1.0)
        assert reward.depth == depth
        assert reward.format == 1


@pytest.mark.parametrize(
    "response",
    [
        "<think><answer>SID</answer></think>",
        "<think>x</think><answer>SID</answer><answer>SID</answer>",
        "<think>x</think><answer>SID</answer> and so on",
        "<answer>SID</answer><think>x</think>",
        "first <think>x</think><answer>SID</answer>",
        "<think>x<think>y</think><answer>SID</answer>",
        "<think>x</think></think><answer>SID</answer>",
        "<think>x</think><answer>see SID</answer>",
    ],
)
def test_the_strict_gate_closes_holes_that_the_reference_search_pays(response):
    sid = "".join(TRUTH)
    response = response.replace("SID", sid)
    strict = score_response(response, TRUTH, base_levels=4)
    assert (strict.score, strict.format, strict.acc) == (0, 0, 0)
    paid = score_response(response, TRUTH, base_levels=4, format="reference")
    assert paid.score == (0 if "see" in response else 1)
    assert strict.match == paid.match


@pytest.mark.parametrize(
    "answer", ["", "<|b_7|><|a_12|>", "<|a_12|><|a_12|>", "<|a_12|> <|b_7|>", "<|a_0|>", "x<|a_1|>"]
)
def test_malformed_sids_fail_the_gate_in_both_modes(answer):
    assert strict_answer(answer, "direct") is None
    assert strict_answer(f"<think>x</think><answer>{answer}</answer>", "reasoning") is None


def test_direct_mode_wants_the_sid_and_nothing_else():
    sid = "".join(TRUTH)
    assert score_response(sid, TRUTH, mode="direct").score == 1
    assert score_response(sid + " ", TRUTH, mode="direct").score == 0
    assert score_response(reasoning_response(sid), TRUTH, mode="direct").score == 0
    assert score_response(sid, TRUTH, mode="reasoning").score == 0


def test_history_in_the_free_text_and_white_space_around_the_answer_are_allowed():
    sid = "".join(TRUTH)
    for space in ("", " ", "\n", "\n\n"):
        response = f"<think>x</think><answer>{space}{sid}{space}</answer>"
        assert score_response(response, TRUTH, base_levels=4).acc == 1
    assert strict_answer(f"<think>{sid}</think>\n{sid}, {sid}\n<answer>{sid}</answer>", "reasoning") == TRUTH


@pytest.mark.parametrize("chain", ["", " ", "\n\n"])
def test_a_blank_chain_fails_the_gate(chain):
    reward = score_response(f"<think>{chain}</think><answer>{''.join(TRUTH)}</answer>", TRUTH, base_levels=4)
    assert (reward.score, reward.acc, reward.format, reward.match) == (0, 0, 0, 1)


@pytest.mark.parametrize("bar", ["|", MASKED_BAR])
@pytest.mark.parametrize("where", ["<think>x{}y</think>{sid}", "<think>x</think>{}{sid}"])
def test_a_control_token_fails_the_gate_and_a_semantic_id_or_text_with_bars_does_not(bar, where):
    def score(text: str) -> float:
        response = where.format(text.replace("|", bar), sid="".join(TRUTH)) + f"<answer>{''.join(TRUTH)}</answer>"
        return score_response(response, TRUTH, base_levels=4).score

    assert [score(text) for text in ("<|im_start|>", "<|im_end|>", "<|end_of_text|>", "<|a_0|>")] == [0, 0, 0, 0]
    assert [score(text) for text in ("<|a_12|><|b_7|>", "a <| b |> c < d | e > f", "<3", "|")] == [1, 0, 1, 1]


@pytest.mark.parametrize("mode", ["reasoning", "direct"])
def test_an_answer_with_a_number_of_levels_that_no_item_has_fails_the_gate(mode):
    tokens = [*TRUTH, "<|f_1|>"]
    for levels in range(1, 7):
        answer = "".join(tokens[:levels])
        response = answer if mode == "direct" else reasoning_response(answer)
        known = score_response(response, TRUTH, mode=mode, base_levels=4)
        assert known.format == (levels in (4, 5))
        assert known.score == (known.match if levels in (4, 5) else 0)
        assert known.match > 0
        assert score_response(response, TRUTH, mode=mode).format == 1  # nothing says how many levels an item has
        reference = score_response(response, TRUTH, mode=mode, base_levels=4, format="reference")
        assert reference.score == known.match
    indexed = score_response("".join(INDEX.sids["3"][:2]), INDEX.sids["3"], mode="direct", index=INDEX)
    assert (indexed.format, indexed.score) == (0, 0)


def test_the_index_decides_levels_and_valid_items():
    index = INDEX
    truth = index.sids["23"]  # in a collision: one token more
    missing = "".join(truth[:3])
    reward = score_response(missing, truth, mode="direct", index=index)
    assert (reward.match, reward.valid_item, reward.score) == (0.95, 0, 0.95)
    gated = score_response(missing, truth, mode="direct", index=index, require_valid_item=True)
    assert (gated.score, gated.acc, gated.format, gated.match) == (0, 0, 1, 0.95)
    assert score_response(index.text("23"), truth, mode="direct", index=index, require_valid_item=True).score == 1


def test_without_an_index_every_well_formed_answer_counts_as_valid():
    assert score_response("<|a_9|>", TRUTH, mode="direct").valid_item == 1
    assert score_response("no answer", TRUTH, mode="direct").valid_item == 0


@settings(max_examples=50)
@given(RESPONSES, MODES, FORMATS, st.booleans(), st.booleans())
def test_no_response_raises_or_leaves_the_unit_interval(response, mode, format_, with_index, require):
    index = INDEX if with_index else None
    truth = index.sids["23"] if index else TRUTH
    reward = score_response(response, truth, mode=mode, format=format_, index=index, require_valid_item=require)
    for value in (reward.score, reward.acc, reward.format, reward.match, reward.valid_item):
        assert 0 <= value <= 1
    assert reward.score in (0, reward.match)
    assert reward.acc <= reward.score
    assert 0 <= reward.depth <= len(truth)


def slow_strict_answer(response: str, mode: str) -> tuple[str, ...] | None:
    """The definition read aloud, with one anchored pattern."""
    if mode == "direct":
        return parse_sid(response)
    no_tag = r"(?:(?!</?think>|</?answer>).)*"
    pattern = rf"<think>({no_tag})</think>{no_tag}<answer>\s*({no_tag})</answer>"
    found = re.fullmatch(pattern, response, re.DOTALL)
    bad = any(parse_token(token) is None for token in re.findall(r"<\|[^|<>]+\|>", response))
    return None if not found or bad or not found[1].strip() else parse_sid(found[2].rstrip())


def slow_match(answer: tuple[str, ...], truth: tuple[str, ...], levels: int) -> float:
    if answer == truth:
        return 1.0
    for depth in range(levels, 0, -1):
        if answer[:depth] == truth[:depth]:
            return 0.95 if depth == levels else math.sqrt(depth / levels)
    return 0.0


@given(RESPONSES, MODES)
def test_the_strict_gate_agrees_with_an_anchored_pattern(response, mode):
    answer = strict_answer(response, mode)
    assert answer == slow_strict_answer(response, mode)
    assert answer in (None, reference_answer(response, mode))


@given(st.lists(st.sampled_from([*TRUTH, "<|a_1|>", "<|b_1|>", "<|d_1|>"]), max_size=6).map(tuple), st.integers(1, 4))
def test_match_agrees_with_the_slow_definition(answer, levels):
    truth = TRUTH[: levels + 1]
    assert match_score(answer, truth, levels) == pytest.approx(slow_match(answer, truth, levels))
