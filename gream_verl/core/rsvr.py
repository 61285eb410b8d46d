"""RSVR, the residual-sensitive verifiable reward (arXiv 2510.20815), as pure functions.

1. The match. The truth has H base levels; i leading tokens of the answer agree with it. The match is 1 for the whole
   SID, 0.95 when the base path is right but the collision token is not, else sqrt(i / H).
2. The format gate, 0 or 1 (docs/reward.md has a table of what it pays).
3. The reward is the match times the gate.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gream_verl.core.semantic_ids import ItemIndex, SemanticId, parse_sid
from gream_verl.core.token_text import MASKED_BAR

Mode = Literal["reasoning", "direct"]
Format = Literal["strict", "reference"]

BASE_PATH_MATCH = 0.95
"""Match of an answer whose base levels are right and whose collision token is wrong, missing or too many."""

_TAG = re.compile(r"</?(?:think|answer)>")
_BAR = f"[|{MASKED_BAR}]"
_CONTROL_TOKEN = re.compile(rf"<{_BAR}(?![a-z]_[1-9][0-9]*{_BAR}>)[^|{MASKED_BAR}<>]+{_BAR}>")
_SID_RUN = r"(?:<\|[a-z]_[1-9][0-9]*\|>)+"
_REFERENCE_ANSWER = {
    "reasoning": re.compile(rf"<answer>\s*({_SID_RUN})\s*</answer>"),
    "direct": re.compile(f"({_SID_RUN})"),
}


@dataclass(frozen=True)
class Reward:
    """The reward of one response and its parts, all from 0 to 1 except ``depth``.

    Attributes:
        score: The reward.
        acc: 1 for exactly the true SID in a response that passes the gate, else 0.
        format: 1 for a response in the form of its mode, else 0.
        match: The match before the gate.
        depth: Leading tokens of the answer that agree with the truth.
        valid_item: 1 for an item of the index, else 0.
    """

    score: float
    acc: float
    format: float
    match: float
    depth: float
    valid_item: float


def strict_answer(response: str, mode: Mode, base_levels: int | None = None) -> SemanticId | None:
    """Return the answer of a response that has exactly the form of its mode, else None.

    Reasoning is ``<think>...</think>``, which is not blank, text without tags, ``<answer>SID</answer>``, and no control
    token such as ``<|im_start|>``; direct is one SID. A SID has ``base_levels`` or, in a collision, one token more.

    >>> strict_answer("<think>likes horror</think>hence<answer><|a_1|><|b_2|></answer>", "reasoning")
    ('<|a_1|>', '<|b_2|>')
    """
    answer = response
    if mode == "reasoning":
        if _TAG.findall(response) != ["<think>", "</think>", "<answer>", "</answer>"]:
            return None
        before, chain, _, answer, after = _TAG.split(response)
        if before or after or not chain.strip() or _CONTROL_TOKEN.search(response):
            return None
        answer = answer.strip()
    sid = parse_sid(answer)
    impossible = sid is not None and base_levels is not None and len(sid) not in (base_levels, base_levels + 1)
    return None if impossible else sid


def reference_answer(response: str, mode: Mode) -> SemanticId | None:
    """Return the first answer found anywhere in a response, as the authors' unanchored search does, else None.

    >>> reference_answer("<think><answer><|a_1|><|b_2|></answer></think>", "reasoning")
    ('<|a_1|>', '<|b_2|>')
    """
    found = _REFERENCE_ANSWER[mode].search(response)
    return parse_sid(found[1]) if found else None


def matching_depth(answer: Sequence[object], truth: Sequence[object]) -> int:
    """Return the number of leading tokens (texts or ids) of ``answer`` that agree with ``truth``."""
    pairs = enumerate(zip(answer, truth, strict=False))
    return next((depth for depth, (given, true) in pairs if given != true), min(len(answer), len(truth)))


def match_score(answer: SemanticId, truth: SemanticId, base_levels: int) -> float:
    """Return the match of ``answer``, empty for none, with ``truth``, whose base levels are H, 0 to 1.

    >>> match_score(("<|a_1|>", "<|b_2|>"), ("<|a_1|>", "<|b_3|>"), 2)
    0.7071067811865476
    """
    if answer == truth:
        return 1.0
    depth = matching_depth(answer, truth)
    return BASE_PATH_MATCH if depth >= base_levels else (depth / base_levels) ** 0.5


def prefix_matches(truth: SemanticId, base_levels: int) -> np.ndarray:
    """Return the match r_i of an answer whose first i tokens are right and whose next one is wrong, shape [tokens + 1].

    >>> prefix_matches(("<|a_1|>", "<|b_2|>"), 2).round(2).tolist()
    [0.0, 0.71, 1.0]
    """
    return np.array([match_score(truth[:depth], truth, base_levels) for depth in range(len(truth) + 1)])


def expected_shares(probabilities: np.ndarray, rewards: np.ndarray) -> np.ndarray:
    """Return what each true token adds to the expected reward of an answer, shape [..., tokens].

    RSVR pays for a matched prefix: r_i - r_(i-1) for token i, if it and the tokens before it are right. Its share is
    (r_i - r_(i-1)) p_1 ... p_i. The shares sum to the expected RSVR.

    Args:
        probabilities: p_i of each true token after the true ones before it, shape [..., tokens].
        rewards: r_i of an answer that goes wrong after i right tokens, from r_0 = 0 to that of the whole SID, shape
            [tokens + 1]. See ``prefix_matches``.

    >>> expected_shares(np.array([0.5, 0.5]), np.array([0.0, 0.7, 1.0])).round(3).tolist()
    [0.35, 0.075]
    """
    return np.diff(rewards) * np.cumprod(probabilities, axis=-1)


def score_response(
    response: str,
    truth: SemanticId,
    *,
    mode: Mode = "reasoning",
    format: Format = "strict",  # noqa: A002 - the name of the option
    base_levels: int | None = None,
    index: ItemIndex | None = None,
    require_valid_item: bool = False,
) -> Reward:
    """Return the reward of one response. No response raises.

    Args:
        response: The decoded response without its end-of-sequence token.
        truth: The SID of the target.
        mode: The mode of the prompt.
        format: ``strict`` gates on the whole form; ``reference`` pays any answer that the authors' search finds.
        base_levels: Levels that every SID has; by default those of ``index``, and all tokens of ``truth`` without one.
        index: The items; without them every well-formed answer is a valid item.
        require_valid_item: An answer that is no item of ``index`` fails the gate.

    >>> score_response("<|a_1|><|b_9|>", ("<|a_1|>", "<|b_2|>"), mode="direct").score
    0.7071067811865476
    """
    # 1. Read the answer. One that fails the gate still has a match, so that group filtering sees how close it came.
    known = base_levels or (index.base_levels if index else None)
    levels = min(known or len(truth), len(truth))
    found = reference_answer(response, mode)
    well_formed = strict_answer(response, mode, known) if format == "strict" else found
    answer = well_formed or found or ()
    # 2. The gate, and the parts of the reward.
    valid_item = bool(answer) and (index is None or answer in index.items)
    gate = well_formed is not None and (valid_item or not require_valid_item)
    match = match_score(answer, truth, levels)
    return Reward(
        score=match * gate,
        acc=float(gate and answer == truth),
        format=float(well_formed is not None),
        match=match,
        depth=float(matching_depth(answer, truth)),
        valid_item=float(valid_item),
    )


def overlong_penalty(length: int, max_length: int, buffer: int, factor: float = 1.0) -> float:
    """Return the penalty of a long response: 0 up to the buffer, then a line down to ``-factor`` at full length.

    The soft over-long punishment of DAPO (arXiv 2503.14476, equation 13). All lengths are in tokens.

    >>> overlong_penalty(80, 100, 40), overlong_penalty(60, 100, 40)
    (-0.5, 0.0)
    """
    return min(0.0, factor * (max_length - buffer - length) / buffer)
