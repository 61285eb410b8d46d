"""The agent loop ``gream``: verl's single turn, paid by expected RSVR (``rollout.agent.default_agent_loop=gream``).

Nearly all variance of a sampled reward is the draw of the answer. RSVR pays for a matched prefix, so the probabilities
of the true tokens after a chain of thought give its expectation V_0 without a draw, and the value V_i of an answer
whose first i tokens are right (``gream_verl.core.rsvr.expected_values``). The response is paid in shares:

1. The last token of ``<answer>`` gets V_0, the worth of the chain. A chain after which no answer is paid gets nothing.
2. A true token of the answer gets V_(i+1) - V_i, the first wrong one r_i - V_i, other tokens of the SID nothing.
3. The tokens that close the response get the rest in equal parts, a token in their place that does not close it all.

An answer is paid only if it is closed, so all values have the probability of that as a factor, as it is after the true
answer. The shares sum to the sampled reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from omegaconf import OmegaConf
from pydantic import Field
from torch import Tensor
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from gream_verl.core.options import checked_options
from gream_verl.core.rsvr import expected_values, matching_depth
from gream_verl.core.semantic_ids import ItemIndex, SemanticId
from gream_verl.core.token_text import TokenText
from gream_verl.decoding.answer_automaton import CLOSE, OPEN
from gream_verl.decoding.truth_scoring import decompress, scoring_parameters
from gream_verl.plugin.bgae import BgaeOptions, expected_hit_bonus
from gream_verl.plugin.reward_manager import OPTIONS, RsvrOptions

_reader = cache(TokenText)  # verl makes an agent loop for every response
_index = cache(ItemIndex.load)


class Shares(NamedTuple):
    """Shares of a response.

    Attributes:
        worth: V_0, the share of the chain.
        answer: Shares of the first tokens of the answer.
        closing: Positions in the answer of the tokens that get the rest.
        bonus: BGAE's bonus, which is paid to an exact hit in addition to its reward.
        expected: The expected RSVR, without the bonus.
        expected_hit: The probability of an exact hit.
    """

    worth: float
    answer: list[float]
    closing: list[int]
    bonus: float
    expected: float
    expected_hit: float

    def pay(self, scores: Tensor, start: int, total: float, penalty: float = 0.0) -> None:
        """Write the shares, which sum to ``total``, into ``scores`` [tokens]; ``start`` is that of the answer."""
        scores.zero_()
        scores[start : start + len(self.answer)] = scores.new_tensor(self.answer)
        scores[max(0, start - 1)] += self.worth + penalty  # direct mode has no chain
        closing = [start + position for position in self.closing]
        scores[closing] += (total - float(scores.sum())) / len(closing)


def shares_of(
    answer: Sequence[int],
    truth: Sequence[int],
    closing: Sequence[int],
    probabilities: np.ndarray,
    rewards: np.ndarray,
    n: int,
    bgae: BgaeOptions,
) -> Shares:
    """Return what the chain and each token of its answer are paid.

    Args:
        answer: Token ids of the response after ``<answer>``.
        truth: Token ids of the true SID.
        closing: Token ids of what has to follow the SID.
        probabilities: Of each token of ``truth`` and ``closing``, after the chain and those before it, shape [tokens].
        rewards: r_i of an answer that goes wrong after i right tokens, shape [len(truth) + 1].
        n: Responses of a group.
        bgae: K and weight of the bonus, which is in units of the standard deviation of the reward given the chain.
    """
    # 1. The expectations, and the bonus.
    right, closed = probabilities[: len(truth)], float(probabilities[len(truth) :].prod())
    expected, square = (closed * float(expected_values(right, power)[0]) for power in (rewards, rewards**2))
    hit = float(probabilities.prod())
    bonus = bgae.weight * max(0.0, square - expected**2) ** 0.5 * expected_hit_bonus(hit, n, bgae)
    # 2. The changes of the value, token by token, until one is wrong.
    paid = rewards + bonus * (np.arange(len(rewards)) == len(truth))
    values = closed * expected_values(right, paid)
    depth = matching_depth(answer, truth)
    wrong = [closed * paid[depth] - values[depth]] if depth < min(len(truth), len(answer)) else []
    # 3. The tokens that close the answer, or the first one in their place that does not.
    near = list(answer[: len(truth) + 2])  # a wrong SID may have a collision token that the true one has not
    begin = near.index(closing[0]) if closing[0] in near else min(len(truth), len(answer) - 1)
    agree = matching_depth(answer[begin:], closing)
    end = begin + agree if agree == len(closing) else min(begin + agree, len(answer) - 1) + 1
    rest = list(range(begin if agree == len(closing) else end - 1, end))
    return Shares(float(values[0]), [*np.diff(values[: depth + 1]), *wrong], rest, bonus, expected, hit)


class PaidOutput(AgentLoopOutput):
    """A response with its shares, None for one after whose chain no answer is paid; ``start`` is that of the answer."""

    shares: Shares | None = Field(default=None, exclude=True)
    start: int = Field(default=0, exclude=True)

    def as_dict(self) -> dict[str, Any]:
        """Return the row for verl, whose ``rm_scores`` are the shares."""
        row = super().as_dict()
        details = row["extra_fields"].setdefault("reward_extra_info", {})
        shares = self.shares or Shares(0.0, [], [], 0.0, 0.0, 0.0)
        details |= {"expected": shares.expected, "expected_hit": shares.expected_hit}
        if self.shares and "rm_scores" in row:
            total = float(row["rm_scores"][-1]) + shares.bonus * details.get("acc", 0.0)
            shares.pay(row["rm_scores"], self.start, total, details.get("overlong", 0.0))
        return row


@register("gream")
class GreamAgentLoop(SingleTurnAgentLoop):
    """One response, and one request that scores the true answer after its chain of thought."""

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        """Return the response to a prompt; ``kwargs`` are the columns of its row."""
        options = checked_options(RsvrOptions, OPTIONS, OmegaConf.select(self.config, OPTIONS))
        if not options.expected:
            return await super().run(sampling_params, priority=priority, **kwargs)
        # 1. The response.
        self.server_manager: Any = OneServer(self.server_manager)
        output = await super().run(dict(sampling_params), priority=priority, **kwargs)
        paid = PaidOutput.model_construct({*output.model_fields_set}, **dict(output))
        # 2. Where the answer begins.
        reader, extra_info = _reader(self.tokenizer), kwargs.get("extra_info") or {}
        truth = reader.ground_truth(kwargs.get("reward_model"), f"row {extra_info.get('index')}")
        index = _index(options.index_file) if options.index_file else None
        pieces = [reader.read([token]) for token in output.response_ids]
        found = answer_start(pieces, truth, options, extra_info, index)
        true_ids = self.tokenizer.convert_tokens_to_ids(list(truth))
        close = CLOSE if options.mode_of(extra_info) == "reasoning" else ""
        closing = [*self.tokenizer.encode(close, add_special_tokens=False), self.tokenizer.eos_token_id]
        if found is None or found[1] + len(true_ids) + len(closing) > self.response_length:
            return paid
        # 3. The probabilities of the true answer. `<answer>` is scored again, for a constraint to see it.
        opening, paid.start = found
        given = [*output.response_ids[opening : paid.start], *true_ids, *closing]
        scored = await self.server_manager.generate(
            request_id="scoring",
            prompt_ids=output.prompt_ids + output.response_ids[:opening],
            sampling_params={**scoring_parameters(given, sampling_params["temperature"]), "logprobs": True},
            priority=int(priority),
        )
        probabilities = decompress(scored.log_probs)[paid.start - opening :]
        # 4. The shares.
        rewards, n = options.prefix_rewards(truth, index), self.rollout_config.n
        bgae, answer = BgaeOptions.from_config(self.config.algorithm), output.response_ids[paid.start :]
        paid.shares = shares_of(answer, true_ids, closing, probabilities, rewards, n, bgae) if answer else None
        return paid


class OneServer:
    """A client that sends all requests of one response to the same server, whose prefix cache holds the prompt."""

    def __init__(self, client: Any) -> None:
        self.client = client
        self.request_id: str | None = None

    async def generate(self, request_id: str, **kwargs: Any) -> Any:
        """Generate under the id of the first request."""
        self.request_id = self.request_id or request_id
        return await self.client.generate(request_id=self.request_id, **kwargs)


def answer_start(
    pieces: Sequence[str],
    truth: SemanticId,
    options: RsvrOptions,
    extra_info: Mapping[str, Any],
    index: ItemIndex | None,
) -> tuple[int, int] | None:
    """Return the positions of the tag's first token and of the answer's; None where no answer would be paid.

    Args:
        pieces: Text of each token of the response.
        truth: The true SID; what it would be paid decides.
        options: The format gate.
        extra_info: That of the row, which may name its mode.
        index: The items.
    """
    opening, closing = ("", "") if options.mode_of(extra_info) == "direct" else (OPEN, CLOSE)
    text, ends = "".join(pieces), [0, *accumulate(map(len, pieces))]
    opened = text.find(opening) + len(opening)
    if opening not in text or opened not in ends:
        return None
    best = options.score(text[:opened] + "".join(truth) + closing, truth, extra_info, index)
    first = max(position for position, end in enumerate(ends) if end <= opened - len(opening)) if opening else 0
    return (first, ends.index(opened)) if best.acc else None
