"""The payment by expected RSVR, against every answer that a small tree of tokens allows."""

from __future__ import annotations

import asyncio
from itertools import product

import numpy as np
import pytest
import torch
from assets import make_index, make_tiny_model
from hydra import compose, initialize_config_module
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer
from verl.experimental.agent_loop.agent_loop import DictConfigWrap
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.workers.rollout.replica import TokenOutput

from gream_verl.core.rsvr import matching_depth, prefix_matches
from gream_verl.decoding.truth_scoring import COMPRESSION
from gream_verl.plugin.agent_loop import GreamAgentLoop, PaidOutput, Payment, answer_start, payment_of
from gream_verl.plugin.bgae import SMALLEST_SHARE, BgaeOptions, expected_hit_bonus, share_advantage
from gream_verl.plugin.reward_manager import SAMPLED, RsvrOptions

CODES = 3
LINEAR, LOG = (BgaeOptions(expected=True, scoring_rule=rule, weight=0) for rule in ("linear", "log"))
PROBABILITY = st.floats(0.001, 0.999)
TRUTH = ("<|a_1|>", "<|b_1|>", "<|c_1|>")
CHAIN = ["<think>", "likes ", "horror", "</think>", "so", "<ans", "wer>"]


def sampled_rewards(logits: torch.Tensor, rewards: np.ndarray) -> torch.Tensor:
    """The expected reward by its definition, over every answer: the truth is code 0 at each level, then it is closed.

    ``logits`` [levels + 1, CODES] hold after true tokens; the last row is that of the closing token.
    """
    p, total = logits.softmax(dim=-1), torch.zeros((), dtype=torch.float64)
    for answer in product(range(CODES), repeat=len(logits) - 1):
        chance = torch.ones((), dtype=torch.float64)
        for level, code in enumerate(answer):
            # after a wrong token any distribution will do
            chance = chance * (p[level, code] if not any(answer[:level]) else 1 / CODES)
        total = total + chance * p[-1, 0] * rewards[matching_depth(answer, (0,) * len(answer))]
    return total


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=4 * CODES, max_size=4 * CODES), st.sampled_from([2, 3]))
def test_shares_give_the_expected_reward_and_its_gradient(values, base_levels):
    logits = torch.tensor(values, dtype=torch.float64).reshape(4, CODES).requires_grad_()
    rewards = prefix_matches(TRUTH, base_levels)
    by_definition = sampled_rewards(logits, rewards)
    log_probs = logits.log_softmax(dim=-1)[:, 0]
    payment = payment_of(log_probs.detach().exp().numpy(), rewards, 8, BgaeOptions(weight=0))
    assert payment.expected == pytest.approx(by_definition.item())
    assert sum(payment.shares) == pytest.approx(payment.expected, abs=1e-8)

    # The response is one token of a chain, the true SID and its end; verl's gradient is that of advantage * log p.
    shares = torch.zeros(1, 5, dtype=torch.float64)
    shares[0, 1:4] = torch.tensor(payment.shares)
    one = torch.ones(1, dtype=torch.bool)
    advantage = share_advantage(
        shares, torch.zeros(1, dtype=torch.long), one, torch.ones(1, 5), LINEAR, normalise=False
    )
    (found,) = torch.autograd.grad((advantage[0, 1:] * log_probs).sum(), logits, retain_graph=True)
    (true,) = torch.autograd.grad(by_definition, logits)
    torch.testing.assert_close(found, true, rtol=1e-6, atol=1e-8)


@given(st.lists(PROBABILITY, min_size=3, max_size=3), PROBABILITY)
def test_the_bonus_raises_the_last_share_by_deviations_of_the_reward(p, closed):
    bgae, rewards = BgaeOptions(weight=0.5, scoring_rule="linear"), prefix_matches(TRUTH, 3)
    known = np.array([*p, closed])
    plain, paid = (payment_of(known, rewards, 8, options) for options in (BgaeOptions(weight=0), bgae))
    hit = float(np.prod(known))
    # the distribution of the reward: i right tokens and then a wrong one, all right, or an answer that is not closed
    chances = [np.prod(p[:depth]) * (1 - p[depth]) * closed for depth in range(3)] + [hit]
    mean, square = (sum(c * r**power for c, r in zip(chances, rewards, strict=True)) for power in (1, 2))
    bonus = 0.5 * np.sqrt(max(0, square - mean**2)) * expected_hit_bonus(hit, 8, bgae)
    assert np.subtract(paid.shares, plain.shares) == pytest.approx([0, 0, bonus * hit], abs=1e-8)
    assert (paid.expected, paid.expected_hit) == pytest.approx((mean, hit))


def test_the_bonus_of_a_hit_is_the_mean_over_all_draws_of_the_other_responses():
    from gream_verl.plugin.bgae import bgae_advantage

    n, p, total = 6, 0.3, 0.0
    for others in product([0.0, 1.0], repeat=n - 1):
        probability = np.prod([p if hit else 1 - p for hit in others])
        for own, sign in ((1.0, 1), (0.0, -1)):
            rewards, active = torch.tensor([own, *others], dtype=torch.float64), torch.ones(n, dtype=torch.bool)
            groups = torch.zeros(n, dtype=torch.long)
            with_bonus, without = (bgae_advantage(rewards, groups, active, BgaeOptions(weight=w)) for w in (1.0, 0.0))
            total += sign * probability * float((with_bonus - without)[0])
    assert expected_hit_bonus(p, n, BgaeOptions()) == pytest.approx(total)


@pytest.mark.parametrize(
    ("pieces", "start"),
    [
        ([*CHAIN, "<|a_1|>"], (5, 7)),
        (CHAIN, (5, 7)),
        ([*CHAIN[:4], "so<ans", "wer>"], (4, 6)),
        (CHAIN[:-1], None),  # no answer
        (["<think>", "a", "<answer>", "<|a_1|>"], None),  # the thinking is still open
        (["a", *CHAIN], None),
        ([*CHAIN[:-1], "wer>x", "<|a_1|>"], None),  # the tag ends within a token
    ],
)
def test_an_answer_starts_after_a_chain_that_passes_the_gate(pieces, start):
    assert answer_start(pieces, TRUTH, RsvrOptions(), {}, None) == start
    assert answer_start(pieces, TRUTH, RsvrOptions(), {"type": "direct"}, None) == (0, 0)


def test_a_row_has_the_shares_at_the_tokens_of_the_true_answer():
    def row(start: int, payment: Payment | None, for_training: bool = True, **details: float):
        output = PaidOutput(prompt_ids=[1], response_ids=[7] * 6, response_mask=[1] * 6, metrics={}, reward_score=0.5)
        output.extra_fields = {"reward_extra_info": details, SAMPLED: [7, 7]}
        output.payment, output.start, output.for_training = payment, start, for_training
        made = output.as_dict()
        assert not {"payment", "start", "for_training", SAMPLED} & {*made, *made["extra_fields"]}
        return made["rm_scores"].tolist(), made["extra_fields"]["reward_extra_info"]

    payment = Payment([0.25, 0.125], 0.3125, 0.0625)
    assert row(3, payment) == ([0, 0, 0, 0.25, 0.125, 0], {"expected": 0.3125, "expected_hit": 0.0625})
    assert row(3, payment, overlong=-0.5)[0] == [0, 0, -0.5, 0.25, 0.125, 0]
    assert row(0, payment)[0] == [0.25, 0.125, 0, 0, 0, 0]  # direct mode
    # a response without an answer, and one that is not trained on, which has the reward of its own answer
    assert row(1, None, overlong=-0.5) == ([-0.5, 0, 0, 0, 0, 0], {"overlong": -0.5, "expected": 0, "expected_hit": 0})
    assert row(1, payment, for_training=False) == ([0, 0, 0, 0, 0, 0.5], {"expected": 0.3125, "expected_hit": 0.0625})


@pytest.mark.parametrize("normalise", [True, False])
def test_tokens_have_the_advantage_of_the_shares_that_depend_on_them(normalise):
    shares = torch.tensor(
        [
            [0.0, 0.3, 0.1, 0.0, 0.0],
            [0.0, -0.2, 0.4, 0.2, 0.0],  # with a penalty
            [0.0, 0.0, 0.0, 0.0, 0.0],  # nothing is paid: the whole response is a chain
            [0.4, 0.1, 0.0, 0.0, 0.0],  # direct mode
            [9.0, 9.0, 9.0, 9.0, 9.0],  # padding
        ]
    )
    mask = torch.tensor([[1, 1, 1, 1, 0], [1] * 5, [1] * 5, [1] * 5, [0] * 5])
    mean = (0.4 + 0.4 + 0.0) / 3
    expected = torch.tensor(
        [
            [0.4 - mean, 0.4, 0.1, 0.4, 0.0],
            [0.4 - mean, 0.4 - mean, 0.6, 0.2, 0.6],
            [-mean] * 5,
            [0.5, 0.1, 0.5, 0.5, 0.5],
            [0.0] * 5,
        ]
    )
    scale = (expected.square().sum() / 19).sqrt() if normalise else 1.0
    active = torch.tensor([True] * 4 + [False])
    found = share_advantage(shares, torch.tensor([0, 0, 0, 1, 1]), active, mask, LINEAR, normalise)
    torch.testing.assert_close(found, expected / scale, rtol=1e-5, atol=1e-6)


def chain_and_answers(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities of two chains, and of three tokens of the true answer after each; logits are [2, 4]."""
    return logits[:, 0].log_softmax(dim=0), torch.nn.functional.logsigmoid(logits[:, 1:])


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-2, 2), min_size=8, max_size=8), st.integers(1, 5))
def test_the_log_rule_has_the_gradient_of_the_log_of_the_chance_to_match_each_level(values, times):
    # Chains come as often as they are probable: `times` the first one and `8 - times` the second.
    logits = torch.tensor(values, dtype=torch.float64).reshape(2, 4)
    logits[:, 0] = torch.tensor([times, 8 - times], dtype=torch.float64).log()
    logits.requires_grad_()
    chains, answers = chain_and_answers(logits)
    chances = (chains.exp()[:, None] * answers.cumsum(dim=1).exp()).sum(dim=0)
    (true,) = torch.autograd.grad(chances.log().sum(), logits, retain_graph=True)

    # Rows of a chain token, two tokens of the SID, and a third one; the steps of the reward do not matter.
    drawn = torch.tensor([0] * times + [1] * (8 - times))
    steps = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    shares = torch.nn.functional.pad(answers.detach().cumsum(dim=1).exp() * steps, (1, 0))[drawn]
    one = torch.ones(8, 4)
    advantage = share_advantage(shares, torch.zeros(8, dtype=torch.long), one[:, 0] > 0, one, LOG, normalise=False)
    taken = torch.cat([chains[:, None], answers], dim=1)[drawn]
    (found,) = torch.autograd.grad((advantage * taken).sum() / 8, logits)
    torch.testing.assert_close(found, true, rtol=1e-5, atol=1e-7)


def test_the_log_rule_gives_nothing_to_a_chain_without_an_answer_and_to_steps_that_are_not_paid():
    shares = torch.tensor([[0.0, 0.2, SMALLEST_SHARE, 0.3], [0.0, 0.0, 0.0, 0.0], [0.1, SMALLEST_SHARE, 0.3, 0.0]])
    groups, active, mask = torch.zeros(3, dtype=torch.long), torch.ones(3, dtype=torch.bool), torch.ones(3, 4)
    found = share_advantage(shares, groups, active, mask, LOG, normalise=False)
    # the means of the group are 0.1, 0 and 0.2
    expected = [[3.5 - 2, 3.5, 1.5, 1.5], [-2.0] * 4, [2.5, 1.5, 1.5, 2.5]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_tokens_of_an_improbable_truth_do_not_count_as_those_that_close_the_answer():
    shares, one = torch.tensor([[0.1, SMALLEST_SHARE, SMALLEST_SHARE, 0.0]]), torch.ones(1, 4)
    found = share_advantage(shares, torch.zeros(1, dtype=torch.long), one[:, 0] > 0, one, LOG, normalise=False)
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.0, 0.0, 1.0]]))


class FakeServer:
    """A rollout engine that answers with given tokens, and finds every scored token half as probable as sure."""

    def __init__(self, response: list[int]) -> None:
        self.response, self.scored, self.requests = response, list[int](), list[str]()

    async def generate(self, request_id: str, prompt_ids: list[int], sampling_params: dict, **_: object) -> TokenOutput:
        self.requests.append(request_id)
        if "extra_args" not in sampling_params:
            return TokenOutput(token_ids=self.response, log_probs=[-1.0] * len(self.response))
        self.scored = sampling_params["extra_args"]["gream_truth"]
        return TokenOutput(token_ids=self.scored, log_probs=[np.log(0.5) / COMPRESSION] * len(self.scored))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder, index = tmp_path_factory.mktemp("loop"), make_index()
    make_tiny_model(folder, index)
    index.save(folder / "items.json")
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=["+recipe=gream_srpo_cpu", f"gream.index={folder}/items.json"])
    return config, AutoTokenizer.from_pretrained(folder), index


@pytest.mark.parametrize("for_training", [True, False])
@pytest.mark.parametrize("well_formed", [True, False])
def test_the_true_answer_takes_the_place_of_the_sampled_one_in_training(world, well_formed, for_training):
    config, tokenizer, index = world
    (truth, *_), (*_, other) = index.items, index.items
    chain = tokenizer.encode("<think>so</think><answer>" if well_formed else "<think>so<answer>")
    closing = [*tokenizer.encode("</answer>"), tokenizer.eos_token_id]
    sampled = [*chain, *tokenizer.convert_tokens_to_ids(list(other)), *closing]
    true = [*tokenizer.convert_tokens_to_ids(list(truth)), *closing]
    server = FakeServer(sampled)
    wrapped = DictConfigWrap(config), server, tokenizer, None, RLHFDataset, DictConfigWrap(config.data)
    row = {"raw_prompt": [{"role": "user", "content": "Next?"}], "reward_model": {"ground_truth": "".join(truth)}}
    parameters = {"temperature": 1.0, "logprobs": True}

    async def run() -> PaidOutput:
        return await GreamAgentLoop(*wrapped).run(parameters, for_training=for_training, **row)

    output = asyncio.run(run())
    assert len({*server.requests}) == 1
    made = output.as_dict()
    if well_formed:
        assert server.scored[-len(true) :] == true
        expected = sum(np.diff(prefix_matches(truth, index.base_levels)) * 0.5 ** np.arange(1, len(truth) + 1))
        expected *= 0.5 ** len(closing)
        assert made["extra_fields"]["reward_extra_info"]["expected"] == pytest.approx(expected)
    if well_formed and for_training:
        assert made["responses"].tolist() == [*chain, *true]
        assert made["response_mask"].tolist() == [1] * len([*chain, *true])
        log_probs = torch.tensor([-1.0] * len(chain) + [np.log(0.5)] * len(true), dtype=torch.float32)
        torch.testing.assert_close(made["rollout_log_probs"], log_probs)
        assert output.extra_fields[SAMPLED] == sampled
    else:
        assert made["responses"].tolist() == sampled
        assert SAMPLED not in output.extra_fields
