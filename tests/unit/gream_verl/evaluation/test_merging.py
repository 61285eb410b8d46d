from __future__ import annotations

import numpy as np
import pytest
from assets import make_index, make_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from gream_verl.core.token_text import TokenText
from gream_verl.evaluation.merging import answer_score, answered_sid, merge_rankings, response_score
from gream_verl.evaluation.sampling import Response

INDEX = make_index()
TOKENIZER = make_tokenizer(["likes Heat hence <answer>"], INDEX)
READER = TokenText(TOKENIZER)
SID = INDEX.text("7")
RANKINGS = st.lists(
    st.dictionaries(st.sampled_from("abcdef"), st.floats(-20, 0, allow_subnormal=False)), min_size=1, max_size=6
)


def respond(text: str) -> Response:
    """Return a response whose n-th token, from 0, has the log-probability -2 ** n."""
    tokens = [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id]
    return Response(tokens, [-(2.0**place) for place in range(len(tokens))])


@given(RANKINGS)
def test_the_mean_is_of_probabilities_and_a_chain_that_did_not_find_an_item_adds_nothing(
    rankings: list[dict[str, float]],
) -> None:
    merged = merge_rankings(rankings, 10)
    for item in {item for ranking in rankings for item in ranking}:
        mean = sum(np.exp(ranking[item]) if item in ranking else 0.0 for ranking in rankings) / len(rankings)
        assert np.exp(merged[item]) == pytest.approx(mean)
    assert list(merged.values()) == sorted(merged.values(), reverse=True)


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
    ("text", "ours", "theirs"),
    [
        (f"<think>Heat</think>hence<answer>{SID}</answer>", True, True),
        (f"<think>{SID}</think>{SID}<answer>{SID}</answer>", True, True),
        (f"<think><answer>{SID}</answer></think>", False, True),
        (f"<think>Heat</think><answer>{SID}</answer> and so on", False, True),
        (f"<think>Heat</think><answer>{SID}", False, False),
        (f"<think>Heat</think><answer>{SID}{SID}</answer>", False, False),
        ("<think>Heat</think><answer><|a_1|><|b_1|></answer>", False, False),
        (SID, False, False),
        ("", False, False),
    ],
)
def test_which_responses_answer_an_item(text: str, ours: bool, theirs: bool) -> None:
    found = [answered_sid(respond(text), READER, INDEX, ranking) for ranking in ("answers", "reference")]
    assert found == [INDEX.sids["7"] if is_answer else None for is_answer in (ours, theirs)]


@pytest.mark.parametrize("item", ["7", "23"])  # the last shares its path and has a collision token
def test_only_the_tokens_of_the_answer_count_and_the_authors_count_all(item: str) -> None:
    sid = INDEX.text(item)
    before = f"<think>{sid} likes Heat</think>{sid}{INDEX.text('3')}<answer>"
    response = respond(f"{before}{sid}</answer>")
    first = len(TOKENIZER(before)["input_ids"])
    places = range(first, first + len(INDEX.sids[item]))
    assert answer_score(response, READER, INDEX.sids[item]) == -sum(2.0**place for place in places)
    assert response_score(response) == 1 - 2.0 ** len(response.tokens)
