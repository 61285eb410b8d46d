"""From the chains of one user to one ranking: what each chain answered, and how chains are merged. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from gream_verl.core.rsvr import reference_answer, strict_answer
from gream_verl.core.semantic_ids import ItemIndex, SemanticId
from gream_verl.core.token_text import TokenText
from gream_verl.evaluation.sampling import Response

Ranking = Literal["beam", "answers", "reference"]
"""What is ranked: the items of a beam search given each chain, or the answers that were sampled, our way or theirs."""
Merge = Literal["mean", "max"]
"""What the score of an item over chains is: its mean probability, or the probability given its best chain."""


def answered_sid(response: Response, reader: TokenText, index: ItemIndex, ranking: Ranking) -> SemanticId | None:
    """Return the SID of the item that a response answers; None when there is no answer, or it is no item.

    Args:
        response: What was sampled.
        reader: Reads tokens as the reward does.
        index: The items there are.
        ranking: ``reference``: the first answer that the authors' search finds anywhere. Else the answer of a response
            that has exactly the form the reward asks for.
    """
    text = reader.read(response.tokens)
    sid = reference_answer(text, "reasoning") if ranking == "reference" else strict_answer(text, "reasoning")
    return sid if sid in index.items else None


def answer_score(response: Response, reader: TokenText, sid: SemanticId) -> float:
    """Return the log-probability of the answer's SID tokens, given the chain before them.

    Args:
        response: A response in the form that the reward asks for.
        reader: Reads tokens as the reward does.
        sid: Its answer.
    """
    levels = set(sid)  # nothing but </answer> stands behind the answer, so its tokens are the last of these
    places = [place for place, token in enumerate(response.tokens) if reader.read([token]) in levels]
    return float(sum(response.logprobs[place] for place in places[-len(sid) :]))


def response_score(response: Response) -> float:
    """Return the log-probability of a whole response, with its end, as the authors rank answers.

    Their evaluation sums the log-probabilities of all tokens (Indolent-Kawhi/GRRM, eval/test_ddp_reason.py), which
    favours short chains.
    """
    return float(sum(response.logprobs))


def merge_rankings(rankings: Sequence[Mapping[str, float]], k: int, merge: Merge = "mean") -> dict[str, float]:
    """Merge what several chains of one user recommend.

    ``mean``: the chains are samples, so the probability of an item is the mean over chains of its probability given
    each: the log-sum-exp of its scores, less the logarithm of the number of chains. An item that a chain did not find
    adds 0. ``max``: the probability given the chain that makes it most likely.

    Args:
        rankings: Item to log-probability, for each chain.
        k: How many items to keep.
        merge: How.

    Returns:
        Item to log-probability, best first; equal scores in the order of first appearance.

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
