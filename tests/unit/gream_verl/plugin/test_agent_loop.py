"""Shares of expected RSVR, against every answer that a small tree of tokens allows."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gream_verl.core.rsvr import matching_depth, prefix_matches
from gream_verl.plugin.agent_loop import PaidOutput, Shares, answer_start, shares_of
from gream_verl.plugin.bgae import BgaeOptions, expected_hit_bonus, share_advantage
from gream_verl.plugin.reward_manager import RsvrOptions

CODES = 3
PROBABILITY = st.floats(0.001, 0.999)
TRUTH = ("<|a_1|>", "<|b_1|>", "<|c_1|>")
CHAIN = ["<think>", "likes ", "horror", "</think>", "so", "<ans", "wer>"]


def answers(p: np.ndarray) -> list[tuple[tuple[int, ...], float]]:
    """Every answer of three levels with its probability; the truth is (0, 0, 0), other codes share what p leaves."""
    found = []
    for answer in product(range(CODES), repeat=len(p)):
        probability = 1.0
        for level, code in enumerate(answer):
            # after a wrong token any distribution will do
            right = p[level] if not any(answer[:level]) else 0.2
            probability *= right if code == 0 else (1 - right) / (CODES - 1)
        found.append((answer, probability))
    return found


@settings(max_examples=25, deadline=None)
@given(st.lists(PROBABILITY, min_size=3, max_size=3), PROBABILITY, st.sampled_from([2, 3]), st.sampled_from([0.0, 1.0]))
def test_shares_sum_to_the_reward_and_change_nothing_in_expectation(p, closed, base_levels, weight):
    truth, bgae, known = (0, 0, 0), BgaeOptions(weight=weight), np.array([*p, closed, 1.0])
    rewards = prefix_matches(TRUTH, base_levels)
    mean = hit = square = 0.0
    martingale = np.zeros(4)
    for answer, probability in answers(np.array(p)):
        # an answer is closed by 8 and 9 with the probability that the true one has, or goes on with 7
        for end, chance in (((8, 9), closed), ((7, 7, 8, 9), 1 - closed)):
            shares = shares_of([*answer, *end], truth, (8, 9), known, rewards, 8, bgae)
            reward, exact = rewards[matching_depth(answer, truth)] * (len(end) == 2), (answer, len(end)) == (truth, 2)
            rest = reward + shares.bonus * exact - shares.worth - sum(shares.answer)
            assert shares.closing == ([3, 4] if len(end) == 2 else [3])
            mean, hit = mean + probability * chance * reward, hit + probability * chance * exact
            square += probability * chance * reward**2
            martingale[:3] += probability * chance * np.pad(shares.answer, (0, 3 - len(shares.answer)))
            martingale[3] += probability * chance * rest
    assert shares.expected == pytest.approx(mean)
    assert shares.expected_hit == pytest.approx(hit)
    assert shares.worth == pytest.approx(mean + shares.bonus * hit)
    assert shares.bonus == pytest.approx(weight * np.sqrt(square - mean**2) * expected_hit_bonus(hit, 8, bgae))
    assert martingale == pytest.approx(np.zeros(4), abs=1e-12)


@pytest.mark.parametrize(
    ("answer", "closing"),
    [
        ([1, 2, 3, 8, 9], [3, 4]),
        ([1, 2, 8, 9], [2, 3]),  # of another length
        ([1, 2, 3, 8, 7, 8, 9], [4]),
        ([1, 2, 3, 8], [3]),  # cut off
        ([1, 2, 3, 4, 8, 9], [4, 5]),  # a collision token
        ([1, 2], [1]),
        ([1, 2, 3, 7, 7, 7], [3]),
    ],
)
def test_the_rest_is_for_the_tokens_that_close_or_the_first_that_does_not(answer, closing):
    probabilities, rewards = np.full(5, 0.5), prefix_matches(TRUTH, 3)
    assert shares_of(answer, (1, 2, 3), (8, 9), probabilities, rewards, 8, BgaeOptions()).closing == closing


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


def test_a_row_has_the_shares_at_their_tokens_and_the_rest_at_its_end():
    def row(reward: float, start: int, shares: Shares | None, **details: float):
        output = PaidOutput(
            prompt_ids=[1], response_ids=list(range(6)), response_mask=[1] * 6, metrics={}, reward_score=reward
        )
        output.extra_fields["reward_extra_info"] = details
        output.shares, output.start = shares, start
        return output.as_dict()

    shares = Shares(0.25, [0.5, -0.125], [1, 2], 0.0, 0.25, 0.125)
    paid = row(0.625, 3, shares, acc=0.0)
    assert paid["rm_scores"].tolist() == [0, 0, 0.25, 0.5, -0.125, 0]
    assert paid["extra_fields"]["reward_extra_info"] == {"acc": 0.0, "expected": 0.25, "expected_hit": 0.125}
    assert "shares" not in paid
    # an answer that is well closed, and a penalty
    assert row(0.75, 3, shares, acc=0.0)["rm_scores"].tolist() == [0, 0, 0.25, 0.5, -0.0625, 0.0625]
    assert row(0.125, 3, shares, acc=0.0, overlong=-0.5)["rm_scores"].tolist() == [0, 0, -0.25, 0.5, -0.125, 0]
    # direct mode, a hit with its bonus, and a chain without an answer
    assert row(0.625, 0, shares, acc=0.0)["rm_scores"].tolist() == [0.75, -0.125, 0, 0, 0, 0]
    hit = Shares(0.5, [0.5, 0.25], [2, 3], 0.25, 0.25, 0.125)
    assert row(1.0, 2, hit, acc=1.0)["rm_scores"].tolist() == [0, 0.5, 0.5, 0.25, 0, 0]
    malformed = row(0.0, 0, None, acc=0.0)
    assert malformed["rm_scores"].tolist() == [0] * 6
    assert malformed["extra_fields"]["reward_extra_info"]["expected"] == 0


@pytest.mark.parametrize("normalise", [True, False])
def test_tokens_have_the_advantage_of_their_own_share(normalise):
    shares = torch.tensor(
        [
            [0.0, 0.3, 0.2, -0.1, 0.0],
            [0.0, 0.0, 0.5, 0.0, 0.1],
            [0.0, 0.0, 0.0, 0.0, 0.0],  # nothing was paid: the whole response is compared
            [0.4, 0.0, 0.0, 0.0, 0.0],  # alone in its group
            [9.0, 9.0, 9.0, 9.0, 9.0],  # padding
        ]
    )
    mean = (0.3 + 0.5 + 0.0) / 3
    expected = torch.tensor(
        [
            [0.3 - mean, 0.3 - mean, 0.2, -0.1, 0.0],
            [0.5 - mean, 0.5 - mean, 0.5 - mean, 0.0, 0.1],
            [-mean] * 5,
            [0.4, 0.0, 0.0, 0.0, 0.0],
            [0.0] * 5,
        ]
    )
    energies = [(0.3 - mean) ** 2 + 0.2**2 + 0.1**2, (0.5 - mean) ** 2 + 0.1**2, mean**2, 0.4**2]
    scale = np.sqrt(np.mean(energies)) if normalise else 1.0
    active = torch.tensor([True] * 4 + [False])
    found = share_advantage(shares, torch.tensor([0, 0, 0, 1, 1]), active, normalise)
    torch.testing.assert_close(found, expected / scale, rtol=1e-5, atol=1e-6)
