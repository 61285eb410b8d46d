from __future__ import annotations

import numpy as np
import pytest
import torch
from assets import make_index, make_tokenizer, reasoning_response
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from gream_verl.core.errors import InputError
from gream_verl.core.rsvr import score_response
from gream_verl.core.token_text import TokenText
from gream_verl.decoding.answer_automaton import CLOSE, FREE, OPEN, ROOT, AnswerAutomaton, _watch

INDEX = make_index()
TOKENIZER = make_tokenizer(
    ["likes Alien.<answer>", "<answer> </answer>", "a>b <an><answer><", "Heat</answer>\n"], INDEX
)
AUTOMATON = AnswerAutomaton.build(INDEX, TOKENIZER)
TEXT = TokenText(TOKENIZER)
VOCABULARY = len(TOKENIZER) + 13  # a model's embedding has more rows than the tokenizer has tokens
EOS = TOKENIZER.eos_token_id


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def state_after(tokens: list[int], *, direct: bool = False) -> int:
    state = np.array([ROOT if direct else FREE])
    for token in tokens:
        state = AUTOMATON.advance(state, np.array([token]), np.array([direct]))
    return int(state[0])


def allowed(*states: int) -> list[set[int]]:
    logits = torch.zeros(len(states), VOCABULARY)
    AUTOMATON.constrain(logits, np.array(states))
    return [set(row.isfinite().nonzero()[:, 0].tolist()) for row in logits]


def words(tokens: set[int]) -> set[str]:
    return set(TOKENIZER.convert_ids_to_tokens(sorted(tokens)))


@given(st.lists(st.integers(0, VOCABULARY - 1), max_size=30))
@settings(max_examples=25, deadline=None)
def test_free_text_is_followed_character_by_character(tokens):
    text, state = "", np.array([FREE])
    for token in tokens:
        piece = TEXT.pieces[min(token, len(TEXT.pieces) - 1)]
        state = AUTOMATON.advance(state, np.array([token]), np.array([False]))
        text += piece
        if OPEN in text:
            break
        assert state[0] == next(n for n in range(ROOT, -1, -1) if text.endswith(OPEN[:n]))
    if OPEN in text:
        assert (state[0] == ROOT) == text.endswith(OPEN)


@given(
    st.lists(st.lists(st.integers(0, VOCABULARY - 1), max_size=6), min_size=1), st.sampled_from(["reasoning", "direct"])
)
@settings(max_examples=25, deadline=None)
def test_the_states_of_whole_responses_are_those_of_one_token_after_another(endings, mode):
    answered = ids(reasoning_response(INDEX.text("3"))[:-9])
    responses = [answered[: 3 * row] + ending for row, ending in enumerate(endings)]
    length = max(map(len, responses))
    padded = np.array([[-1] * (length - len(tokens)) + tokens for tokens in responses], dtype=np.int64)
    for tokens, states in zip(responses, AUTOMATON.states_before(padded, mode), strict=True):
        expected = [state_after(tokens[:column], direct=mode == "direct") for column in range(len(tokens))]
        assert states[length - len(tokens) :].tolist() == expected
    assert (AUTOMATON.states_before(padded, "off") == AUTOMATON.off).all()


@pytest.mark.parametrize("pieces", [["<answer>"], list("<answer>"), ["<an", "swer>"], ["<", "<", "answer", ">"]])
def test_the_tag_opens_the_answer_however_it_is_cut(pieces):
    tokens = [token for piece in ["<think>x</think>", *pieces] for token in ids(piece)]
    assert state_after(tokens) == ROOT


def test_a_token_that_opens_the_answer_and_goes_on_is_forbidden_there_and_only_there():
    bad = {
        token for token, piece in enumerate(TEXT.pieces) if OPEN in OPEN[:7] + piece and not piece.endswith(OPEN[7:])
    }
    assert bad
    state = state_after(ids("x") + [token for letter in OPEN[:7] for token in ids(letter)])
    assert state == 7
    free, almost = allowed(FREE, state)
    assert len(free) == VOCABULARY
    assert free - almost == bad


def test_a_token_that_holds_the_whole_tag_and_goes_on_is_forbidden_in_free_text():
    tokenizer = make_tokenizer(["likes Alien.", "<answer> </answer>"], INDEX)
    tokenizer.add_tokens(["<answer><"])
    automaton = AnswerAutomaton.build(INDEX, tokenizer)
    whole = tokenizer.convert_tokens_to_ids("<answer><")
    logits = torch.zeros(2, len(tokenizer))
    automaton.constrain(logits, np.array([FREE, automaton.off]))
    assert (~logits[0].isfinite()).nonzero().tolist() == [[whole]]
    assert logits[1].isfinite().all()


def test_a_token_without_text_changes_nothing():
    watch, forbidden = _watch(["", "<", "answer", ">", "x"])
    assert watch[:, 0].tolist() == list(range(8))
    assert (watch[0, 1], watch[1, 2], watch[7, 3], watch[7, 4]) == (1, 7, ROOT, FREE)
    assert forbidden == [[] for _ in range(8)]


def test_a_tokenizer_that_adds_to_the_closing_tag_is_refused():
    tokenizer = make_tokenizer(["likes Alien.", "<answer> </answer>"], INDEX)
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend(" ")
    with pytest.raises(InputError, match="does not read </answer> as it is written"):
        AnswerAutomaton.build(INDEX, tokenizer)


def test_behind_the_tag_only_real_items_then_the_closing_tag_then_the_end():
    state = state_after(ids("<think></think>" + OPEN))
    assert words(allowed(state)[0]) == {sid[0] for sid in INDEX.sids.values()}
    for sid in INDEX.sids.values():
        here = state
        for level, token in enumerate(sid):
            (choices,) = allowed(here)
            assert words(choices) == {
                other[level] for other in INDEX.sids.values() if len(other) > level and other[:level] == sid[:level]
            }
            here = int(AUTOMATON.advance(np.array([here]), np.array(ids(token)), np.array([False]))[0])
        for token in ids(CLOSE):
            assert allowed(here) == [{token}]
            here = int(AUTOMATON.advance(np.array([here]), np.array([token]), np.array([False]))[0])
        assert (here, allowed(here)) == (AUTOMATON.end, [{EOS}])


def test_direct_mode_answers_at_once_and_ends_behind_the_item():
    assert words(allowed(ROOT)[0]) == {sid[0] for sid in INDEX.sids.values()}
    for sid in INDEX.sids.values():
        assert state_after(ids("".join(sid)), direct=True) == AUTOMATON.end
        assert not AUTOMATON.leaves[state_after(ids("".join(sid[:-1])), direct=True)]


def test_the_end_stays_the_end():
    assert state_after([*ids(reasoning_response(INDEX.text("3"))), EOS, EOS]) == AUTOMATON.end


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=15, deadline=None)
def test_whatever_is_sampled_every_finished_answer_is_an_item(seed):
    generator = torch.Generator().manual_seed(seed)
    direct = np.array([False, False, False, True])
    states = np.where(direct, ROOT, FREE)
    outputs = [ids("<think>likes</think>"), ids("<think>x</think>"), ids("<think>x</think>likes"), []]
    outputs = [tokens + (ids(OPEN) if not now else []) for tokens, now in zip(outputs, direct, strict=True)]
    for row, tokens in enumerate(outputs):
        for token in tokens:
            states[row : row + 1] = AUTOMATON.advance(states[row : row + 1], np.array([token]), direct[row : row + 1])
    for _ in range(12):
        logits = AUTOMATON.constrain(torch.randn(4, VOCABULARY, generator=generator), states)
        sampled = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
        for row, token in enumerate(sampled.tolist()):
            if EOS not in outputs[row]:
                outputs[row].append(token)
        states = AUTOMATON.advance(states, sampled.numpy(), direct)
    for tokens, now in zip(outputs, direct, strict=True):
        mode = "direct" if now else "reasoning"
        reward = score_response(TEXT.read(tokens), INDEX.sids["3"], mode=mode, index=INDEX)
        assert (reward.format, reward.valid_item) == (1, 1), TEXT.read(tokens)


def test_logits_that_stay_allowed_keep_their_values():
    logits = torch.randn(3, VOCABULARY)
    before = logits.clone()
    states = np.array([FREE, ROOT, AUTOMATON.end])
    AUTOMATON.constrain(logits, states)
    finite = logits.isfinite()
    assert finite[0].all()
    assert torch.equal(logits[finite], before[finite])


def test_an_index_that_the_tokenizer_does_not_know_is_refused():
    with pytest.raises(InputError, match=r"here: <\|b_5\|> is not one token"):
        AnswerAutomaton.build(make_index(items=60, codes=9), TOKENIZER, "here")
