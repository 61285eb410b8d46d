"""The agent loop ``gream``: verl's single turn, paid by expected RSVR (``rollout.agent.default_agent_loop=gream``).

Nearly all variance of a sampled reward is the draw of the answer. RSVR pays for a matched prefix, so its expectation
after a chain of thought needs no draw. With r_i the reward of i right tokens, p_i the probability of the i-th true
token after the chain and the true tokens before it, and c that of the tokens that close the answer:

    E = s_1 + ... + s_H        s_i = (r_i - r_(i-1)) p_1 ... p_i c

Nor does its gradient with respect to the answer: (s_i + ... + s_H) times that of log p_i, and E times that of log c. So
the loop puts the true answer in the place of the sampled one, pays s_i at its i-th token, and
``gream_verl.plugin.bgae.share_advantage`` makes advantages of them. A chain after which no answer would be paid keeps
its own, and gets nothing. Validation keeps the sampled answers and their rewards.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import numpy as np
from omegaconf import DictConfig, OmegaConf
from pydantic import Field
from verl.experimental.agent_loop.agent_loop import AgentLoopOutput, register
from verl.experimental.agent_loop.single_turn_agent_loop import SingleTurnAgentLoop

from gream_verl.core.errors import InputError
from gream_verl.core.options import checked_options
from gream_verl.core.rsvr import expected_shares
from gream_verl.core.semantic_ids import ItemIndex, SemanticId
from gream_verl.core.token_text import TokenText
from gream_verl.decoding.answer_automaton import CLOSE, OPEN
from gream_verl.decoding.truth_scoring import decompress, scoring_parameters
from gream_verl.plugin.bgae import SMALLEST_SHARE, BgaeOptions, expected_hit_bonus
from gream_verl.plugin.reward_manager import OPTIONS, SAMPLED, RsvrOptions, refuse_sampled_settings


class Rules(NamedTuple):
    """Options, reader and index that all responses of a run share, read once: verl makes an agent loop for each."""

    config: DictConfig
    options: RsvrOptions
    bgae: BgaeOptions
    reader: TokenText
    items: ItemIndex | None

    @classmethod
    def read(cls, config: DictConfig, tokenizer: Any) -> Rules:
        """Read the options of a run, and its index."""
        options = checked_options(RsvrOptions, OPTIONS, OmegaConf.select(config, OPTIONS))
        if options.expected:  # here, too, for a reward manager of another kind
            refuse_sampled_settings(config)
        index = ItemIndex.load(options.index_file) if options.expected and options.index_file else None
        return cls(config, options, BgaeOptions.from_config(config.algorithm), TokenText(tokenizer), index)


class Payment(NamedTuple):
    """The payment of one chain of thought.

    Attributes:
        shares: Of each token of the true SID.
        expected: The expected RSVR, without BGAE's bonus.
        expected_hit: The probability of an exact hit.
    """

    shares: list[float]
    expected: float
    expected_hit: float


def payment_of(probabilities: np.ndarray, rewards: np.ndarray, n: int, bgae: BgaeOptions) -> Payment:
    """Compute the payment of a chain.

    Args:
        probabilities: Of each token of the true SID and of those that close it, after the chain and those before it,
            shape [tokens].
        rewards: r_i of an answer that goes wrong after i right tokens, shape [tokens of the SID + 1].
        n: Responses of a group.
        bgae: K and weight of the bonus, which is in units of the standard deviation of the reward given the chain.
    """
    levels = len(rewards) - 1
    right, closed = probabilities[:levels], float(probabilities[levels:].prod())
    shares = closed * expected_shares(right, rewards)
    expected, hit = float(shares.sum()), float(probabilities.prod())
    if bgae.scoring_rule == "linear":
        square = closed * float(expected_shares(right, rewards**2).sum())
        deviation = max(0.0, square - expected**2) ** 0.5
        shares[-1] += hit * bgae.weight * deviation * expected_hit_bonus(hit, n, bgae)
    return Payment(np.maximum(shares, SMALLEST_SHARE).tolist(), expected, hit)


class PaidOutput(AgentLoopOutput):
    """A response with its payment, None for one after whose chain no answer is paid; ``start`` is that of the answer.

    One that is not ``for_training`` has the reward of its own answer.
    """

    payment: Payment | None = Field(default=None, exclude=True)
    start: int = Field(default=1, exclude=True)
    for_training: bool = Field(default=True, exclude=True)

    def as_dict(self) -> dict[str, Any]:
        """Return the row for verl, whose ``rm_scores`` are the shares."""
        row = super().as_dict()
        row["extra_fields"].pop(SAMPLED, None)
        details = row["extra_fields"].setdefault("reward_extra_info", {})
        paid = self.payment or Payment([], 0.0, 0.0)
        details |= {"expected": paid.expected, "expected_hit": paid.expected_hit}
        if self.for_training and "rm_scores" in row:
            scores = row["rm_scores"].zero_()
            scores[self.start : self.start + len(paid.shares)] = scores.new_tensor(paid.shares)
            scores[max(0, self.start - 1)] += details.get("overlong", 0.0)
        return row


@register("gream")
class GreamAgentLoop(SingleTurnAgentLoop):
    """One response, and one request that scores the true answer after its chain of thought."""

    rules: ClassVar[Rules | None] = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.rules is None or self.rules.config is not self.config:
            GreamAgentLoop.rules = Rules.read(self.config, self.tokenizer)

    async def run(self, sampling_params: dict[str, Any], priority: int = 0, **kwargs: Any) -> AgentLoopOutput:
        """Return the response to a prompt; ``kwargs`` are the columns of its row."""
        assert self.rules is not None
        _, options, bgae, reader, index = self.rules
        if not options.expected:
            return await super().run(sampling_params, priority=priority, **kwargs)
        if "for_training" not in kwargs:
            raise InputError(f"{OPTIONS}.expected: needs SemanticIdDataset (data.custom_cls), whose rows say their use")
        # 1. The response.
        self.server_manager: Any = OneServer(self.server_manager)
        output = await super().run(dict(sampling_params), priority=priority, **kwargs)
        paid = PaidOutput.model_construct({*output.model_fields_set}, **dict(output))
        paid.for_training = kwargs["for_training"]
        # 2. Where the answer begins.
        extra_info = kwargs.get("extra_info") or {}
        truth = reader.ground_truth(kwargs.get("reward_model"), f"row {extra_info.get('index')}")
        pieces = [reader.read([token]) for token in output.response_ids]
        found = answer_start(pieces, truth, options, extra_info, index)
        true_ids = self.tokenizer.convert_tokens_to_ids(list(truth))
        close = CLOSE if options.mode_of(extra_info) == "reasoning" else ""
        answer = [*true_ids, *self.tokenizer.encode(close, add_special_tokens=False), self.tokenizer.eos_token_id]
        if found is None or found[1] + len(answer) > self.response_length:
            return paid
        # 3. The probabilities of the true answer. `<answer>` is scored again, for a constraint to see it.
        opening, start = found
        scored = await self.server_manager.generate(
            request_id="scoring",
            prompt_ids=output.prompt_ids + output.response_ids[:opening],
            sampling_params={
                **scoring_parameters([*output.response_ids[opening:start], *answer], sampling_params["temperature"]),
                "logprobs": True,
            },
            priority=int(priority),
        )
        probabilities = decompress(scored.log_probs)[start - opening :]
        rewards = options.prefix_rewards(truth, index)
        paid.payment = payment_of(probabilities, rewards, self.rollout_config.n, bgae)
        # 4. The true answer in the place of the sampled one, which the reward manager still judges.
        if paid.for_training:
            paid.start, paid.extra_fields[SAMPLED] = start, output.response_ids
            paid.response_ids = [*output.response_ids[:start], *answer]
            paid.response_mask = [1] * len(paid.response_ids)
            if output.response_logprobs:
                log_probs = np.log(np.maximum(probabilities, np.finfo(float).tiny))
                paid.response_logprobs = [*output.response_logprobs[:start], *log_probs.tolist()]
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
