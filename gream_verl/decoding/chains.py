"""Chains of thought: the beginning of their answers, their scores, and their merged ranking, as pure functions."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Literal

import numpy as np

from gream_verl.core.token_text import TokenText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Merge = Literal["mean", "max"]
THOUGHT_END, ANSWER = "</think>", "<answer>"


def up_to_answer(response: str) -> tuple[str, bool]:
    """Return a response up to and including the ``<answer>`` after its thinking, and True when it has one.

    A response without one is closed: ``</think>`` is added when a thought is open, then ``<answer>``.

    >>> up_to_answer("<think>horror</think>hence<answer><|a_1|></answer>")
    ('<think>horror</think>hence<answer>', True)
    >>> up_to_answer("<think>horror and")
    ('<think>horror and</think><answer>', False)
    """
    thought_end = response.find(THOUGHT_END)
    answer = response.find(ANSWER, thought_end) if thought_end >= 0 else -1
    if answer >= 0:
        return response[: answer + len(ANSWER)], True
    is_open = "<think>" in response and thought_end < 0
    return response + THOUGHT_END * is_open + ANSWER, False


def tokens_up_to_answer(
    response: Sequence[int], reader: TokenText, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], bool]:
    """Cut or close the tokens of a response, with or without their end, as ``up_to_answer`` does with its text.

    The kept tokens stay as they were sampled; only added tags are tokenized.
    """

    def reached(length: int) -> bool:
        return up_to_answer(reader.read(response[:length]))[1]

    # When a beginning of the response reaches the answer, every longer one does.
    length = bisect_left(range(len(response) + 1), True, key=reached)
    if length <= len(response):
        return list(response[:length]), True
    text = reader.read(response)
    ended = len(response) > 0 and response[-1] == tokenizer.eos_token_id
    added = up_to_answer(text)[0].removeprefix(text)
    return [*response[: len(response) - ended], *tokenizer.encode(added, add_special_tokens=False)], False


def merge_rankings(rankings: Sequence[Mapping[str, float]], k: int, merge: Merge = "mean") -> dict[str, float]:
    """Merge the rankings, item to log-probability, after several chains of one user; keep the ``k`` best items.

    ``mean``: chains are samples, so the probability of an item is the mean over chains of its probability given each:
    the log-sum-exp of its scores minus the logarithm of the number of chains. A chain that did not find the item adds
    0. ``max``: the probability given the chain that makes it most likely. Equal scores keep the order of appearance.

    >>> merged = merge_rankings([{"a": -1.0, "b": -2.0}, {"b": -1.0}], k=2)
    >>> [(item, round(score, 3)) for item, score in merged.items()]
    [('b', -1.38), ('a', -1.693)]
    """
    scores: dict[str, list[float]] = {}
    for ranking in rankings:
        for item, score in ranking.items():
            scores.setdefault(item, []).append(score)
    merged = {
        item: max(found) if merge == "max" else float(np.logaddexp.reduce(found) - np.log(len(rankings)))
        for item, found in scores.items()
    }
    return dict(sorted(merged.items(), key=lambda pair: -pair[1])[:k])


def in_turn(first: Iterable[str], second: Iterable[str], k: int) -> list[str]:
    """Return the best of the first list, the best of the second, and so on, each item once, at most ``k``.

    >>> in_turn(["a", "b", "c"], ["b", "d", "a"], 3)
    ['a', 'b', 'd']
    """
    pairs = zip_longest(first, second)
    return list(dict.fromkeys(item for pair in pairs for item in pair if item is not None))[:k]
