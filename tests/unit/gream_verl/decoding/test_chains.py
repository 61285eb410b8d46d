from __future__ import annotations

import numpy as np
import pytest
from assets import make_index, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from gream_verl.core.token_text import TokenText
from gream_verl.decoding.chains import merge_rankings, tokens_up_to_answer, up_to_answer

INDEX = make_index()
TOKENIZER = make_tokenizer(["likes Heat hence <answer>"], INDEX)
READER = TokenText(TOKENIZER)
few = settings(max_examples=25, deadline=None)
RANKINGS = st.lists(
    st.dictionaries(st.sampled_from("abcdef"), st.floats(-20, 0, allow_subnormal=False)), min_size=1, max_size=6
)


@few
@given(RANKINGS)
def test_the_mean_is_of_probabilities_and_a_chain_that_did_not_find_an_item_adds_nothing(
    rankings: list[dict[str, float]],
) -> None:
    merged = merge_rankings(rankings, 10)
    for item in {item for ranking in rankings for item in ranking}:
        mean = sum(np.exp(ranking[item]) if item in ranking else 0.0 for ranking in rankings) / len(rankings)
        assert np.exp(merged[item]) == pytest.approx(mean)
    assert list(merged.values()) == sorted(merged.values(), reverse=True)


@few
@given(RANKINGS, st.integers(0, 4))
def test_the_maximum_keeps_the_best_of_duplicates_and_lists_are_cut(rankings: list[dict[str, float]], k: int) -> None:
    best: dict[str, float] = {}
    for ranking in rankings:
        for item, score in ranking.items():
            best[item] = max(score, best.get(item, -np.inf))
    merged = merge_rankings(rankings, k, "max")
    assert list(merged.values()) == sorted(best.values(), reverse=True)[:k]
    assert all(best[item] == score for item, score in merged.items())


@pytest.mark.parametrize(
    ("response", "kept", "reached"),
    [
        ("<think>a</think>b<answer>c</answer>", "<think>a</think>b<answer>", True),
        ("<think>a</think>b<answer>", "<think>a</think>b<answer>", True),
        ("<think>a</think>b<answ", "<think>a</think>b<answ<answer>", False),
        ("<think>a", "<think>a</think><answer>", False),
        ("<think><answer>x</answer>", "<think><answer>x</answer></think><answer>", False),
        ("a", "a<answer>", False),
        ("", "<answer>", False),
    ],
)
def test_a_chain_is_kept_up_to_its_answer_and_closed_when_it_has_none(response: str, kept: str, reached: bool) -> None:
    assert up_to_answer(response) == (kept, reached)


@few
@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</ans", "<", "answer", ">", "a", "b>"]), max_size=9)
)
def test_the_tokens_of_a_chain_are_kept_as_they_were_sampled(pieces: list[str]) -> None:
    tokens = [token for piece in pieces for token in TOKENIZER.encode(piece)]  # not those of the text as a whole
    places = [place for place in range(len(tokens) + 1) if up_to_answer(READER.read(tokens[:place]))[1]]
    for response in (tokens, [*tokens, TOKENIZER.eos_token_id]):
        kept, reached = tokens_up_to_answer(response, READER, TOKENIZER)
        assert reached == bool(places)
        assert kept[: len(tokens)] == tokens[: min([*places, len(tokens)])]
        if not reached:
            assert READER.read(kept) == up_to_answer("".join(pieces))[0]
            assert TOKENIZER.eos_token_id not in kept
