"""The agent loop ``gream``: verl's single turn, paid by expected RSVR (``rollout.agent.default_agent_loop=gream``).

Nearly all variance of a sampled reward is the draw of the answer. RSVR pays for a matched prefix, so the probabilities
of the true tokens after a chain of thought give its expectation V_0 without a draw, and the value V_i of an answer
whose first i tokens are right (``gream_verl.core.rsvr.expected_values``). The response is paid in shares:

1. The last token of ``<answer>`` gets V_0, the worth of the chain. A chain after which no answer is paid gets nothing.
2. A true token of the answer gets V_(i+1) - V_i, the first wrong one r_i - V_i, every token after it nothing.
3. The last token gets the rest, such as the loss of an answer that is not closed. The shares sum to the reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from omegaconf import OmegaConf
from pydantic import Field
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
        bonus: BGAE's bonus, which is paid to an exact hit in addition to its reward.
        expected: The expected RSVR, without the bonus.
        expected_hit: The probability of an exact hit.
    """

    worth: float
    answer: list[float]
    bonus: float
    expected: float
    expected_hit: float


def shares_of(
    answer: Sequence[int],
    truth: Sequence[int],
    probabilities: np.ndarray,
    rewards: np.ndarray,
    n: int,
    bgae: BgaeOptions,
) -> Shares:
    """Return what the chain and each token of its answer are paid.

    Args:
        answer: Token ids of the response after ``<answer>``.
        truth: Token ids of the true SID.
        probabilities: Of each true token after the chain and the true ones before it, shape [len(truth)].
        rewards: r_i of an answer that goes wrong after i right tokens, shape [len(truth) + 1].
        n: Responses of a group.
        bgae: K and weight of the bonus, which is in units of the standard deviation of the reward given the chain.
    """
    expected, square = (float(expected_values(probabilities, power)[0]) for power in (rewards, rewards**2))
    hit = float(probabilities.prod())
    bonus = bgae.weight * max(0.0, square - expected**2) ** 0.5 * expected_hit_bonus(hit, n, bgae)
    paid = rewards + bonus * (np.arange(len(rewards)) == len(truth))
    values = expected_values(probabilities, paid)
    depth = matching_depth(answer, truth)
    wrong = [paid[depth] - values[depth]] if depth < min(len(truth), len(answer)) else []
    return Shares(float(values[0]), [*np.diff(values[: depth + 1]), *wrong], bonus, expected, hit)


class PaidOutput(AgentLoopOutput):
    """A response with its shares, None for one after whose chain no answer is paid; ``start`` is that of the answer."""

    shares: Shares | None = Field(default=None, exclude=True)
    start: int = Field(default=0, exclude=True)

    def as_dict(self) -> dict[str, Any]:
        """Return the row for verl, whose ``rm_scores`` are the shares."""
        row = super().as_dict()
        details = row["extra_fields"].setdefault("reward_extra_info", {})
        shares = self.shares or Shares(0.0, [], 0.0, 0.0, 0.0)
        details |= {"expected": shares.expected, "expected_hit": shares.expected_hit}
        if self.shares and "rm_scores" in row:
            scores, chain = row["rm_scores"], max(0, self.start - 1)  # direct mode has no chain
            total = float(scores[-1]) + shares.bonus * details.get("acc", 0.0)
            scores[-1] = 0.0
            scores[self.start : self.start + len(shares.answer)] = scores.new_tensor(shares.answer)
            scores[chain] += shares.worth + details.get("overlong", 0.0)
            scores[-1] += total - float(scores.sum())
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
        self.server_manager = OneServer(self.server_manager)
        output = await super().run(dict(sampling_params), priority=priority, **kwargs)
        paid = PaidOutput.model_construct({*output.model_fields_set}, **dict(output))
        # 2. Where the answer begins.
        reader, extra_info = _reader(self.tokenizer), kwargs.get("extra_info") or {}
        truth = reader.ground_truth(kwargs.get("reward_model"), f"row {extra_info.get('index')}")
        index = _index(options.index_file) if options.index_file else None
        pieces = [reader.read([token]) for token in output.response_ids]
        start = answer_start(pieces, truth, options, extra_info, index)
        if start is None or start + len(truth) > self.response_length:
            return paid
        # 3. The probabilities of the true tokens.
        true_ids = self.tokenizer.convert_tokens_to_ids(list(truth))
        scored = await self.server_manager.generate(
            request_id="scoring",
            prompt_ids=output.prompt_ids + output.response_ids[:start],
            sampling_params={**scoring_parameters(true_ids, sampling_params["temperature"]), "logprobs": True},
            priority=int(priority),
        )
        # 4. The shares.
        rewards, n = options.prefix_rewards(truth, index), self.rollout_config.n
        bgae, answer = BgaeOptions.from_config(self.config.algorithm), output.response_ids[start:]
        paid.shares = shares_of(answer, true_ids, decompress(scored.log_probs), rewards, n, bgae)
        paid.start = start
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
) -> int | None:
    """Return the position of the first token of the answer; None where even the true answer would not be paid.

    Args:
        pieces: Text of each token of the response.
        truth: The true SID.
        options: The format gate.
        extra_info: That of the row, which may name its mode.
        index: The items.
    """
    opening, closing = ("", "") if options.mode_of(extra_info) == "direct" else (OPEN, CLOSE)
    text = "".join(pieces)
    opened = text.find(opening) + len(opening)
    ends = [0, *accumulate(map(len, pieces))]
    if opening not in text or opened not in ends:
        return None
    best = options.score(text[:opened] + "".join(truth) + closing, truth, extra_info, index)
    return ends.index(opened) if best.acc else None
