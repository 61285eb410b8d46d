from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gream_verl.core.errors import InputError
from gream_verl.plugin.bgae import BgaeOptions, bgae_advantage, compute_bgae, group_statistics

CHECK_VALUES = [  # n, c, bonus of a hit, bonus of a miss; K = 4
    (8, 1, 1.000, -0.143),
    (8, 2, 0.522, -0.174),
    (8, 3, 0.277, -0.166),
    (8, 4, 0.120, -0.120),
    *[(8, c, 0.0, 0.0) for c in (5, 6, 7, 8)],
    (16, 1, 1.732, -0.115),
    (16, 2, 1.106, -0.158),
    (16, 4, 0.611, -0.204),
    (16, 8, 0.200, -0.200),
]


def slow_group(rewards: list[float], k: int, weight: float, success: float) -> list[float]:
    """One group, by the formulas, with exact binomials."""
    n, hits = len(rewards), [reward >= success for reward in rewards]
    c, k = sum(hits), min(k, len(rewards))
    mean = sum(rewards) / n if n > 1 else 0.0
    std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / (n - 1)) if n > 1 else 1.0
    rho = 1 - math.comb(n - c, k) / math.comb(n, k)
    sigma = math.sqrt(rho * (1 - rho))
    advantages = []
    for reward, hit in zip(rewards, hits, strict=True):
        bonus = 0.0
        if 0 < c <= n - k:
            others_miss = 0.0 if hit else math.comb(n - c - 1, k - 1) / math.comb(n - 1, k - 1)
            bonus = (1 - rho - others_miss) / (sigma + 1e-6)
        advantages.append((reward - mean) / (std + 1e-6) + weight * bonus)
    return advantages


def advantage(rewards: list[float], groups: list[int], **options: float) -> torch.Tensor:
    values = torch.tensor(rewards, dtype=torch.float64)
    active = torch.ones(len(rewards), dtype=torch.bool)
    return bgae_advantage(values, torch.tensor(groups), active, BgaeOptions(**options))


@pytest.mark.parametrize(("n", "c", "hit", "miss"), CHECK_VALUES)
def test_bonus_equals_the_check_values(n, c, hit, miss):
    rewards = [1.0] * c + [0.0] * (n - c)
    bonus = advantage(rewards, [0] * n) - advantage(rewards, [0] * n, weight=0.0)
    assert bonus[0].item() == pytest.approx(hit, abs=5e-4)
    if c < n:
        assert bonus[-1].item() == pytest.approx(miss, abs=5e-4)


REWARDS = st.sampled_from([0.0, 0.5, 0.7071, 0.866, 0.95, 0.9995, 1.0])
GROUPS = st.lists(st.lists(REWARDS, min_size=1, max_size=12), min_size=1, max_size=4)


@settings(max_examples=20)
@given(GROUPS, st.integers(1, 8), st.sampled_from([0.0, 0.5, 1.0]), st.randoms(use_true_random=False))
def test_groups_of_unequal_size_agree_with_the_slow_definition(groups, k, weight, random):
    rows = [(number, reward) for number, group in enumerate(groups) for reward in group]
    random.shuffle(rows)
    computed = advantage([reward for _, reward in rows], [number for number, _ in rows], k=k, weight=weight)
    for number in range(len(groups)):
        members = [row for row, (owner, _) in enumerate(rows) if owner == number]
        expected = slow_group([rows[row][1] for row in members], k, weight, 0.999)
        assert computed[members].tolist() == pytest.approx(expected, abs=1e-6, rel=1e-6)
        if len(members) > 1:
            assert sum(expected) == pytest.approx(0, abs=1e-5)


def test_a_uniform_group_has_no_advantage():
    assert advantage([0.5] * 8 + [1.0] * 8, [0] * 8 + [1] * 8).abs().max().item() == pytest.approx(0, abs=1e-9)


def test_large_groups_stay_exact():
    rewards = [1.0] * 3 + [0.0] * 1021
    assert advantage(rewards, [0] * 1024, k=64).tolist() == pytest.approx(slow_group(rewards, 64, 1.0, 0.999), rel=1e-6)


def test_padding_rows_get_nothing_and_change_nothing():
    rewards = torch.zeros(10, 5)
    rewards[0, 2] = 1.0
    mask = torch.ones(10, 5)
    mask[8:] = 0
    index = np.array(["u"] * 9 + ["padding"], dtype=object)
    index_without = np.array(["u"] * 8, dtype=object)
    advantages, returns = compute_bgae(rewards, mask, index, config={})
    alone, _ = compute_bgae(rewards[:8], mask[:8], index_without, config={})
    assert torch.equal(advantages[:8], alone)
    assert not advantages[8:].any()
    assert advantages is returns


def test_the_advantage_is_spread_over_the_response_tokens():
    rewards, mask = torch.zeros(8, 4), torch.ones(8, 4)
    rewards[0, 1] = 1.0
    mask[0, 2:] = 0
    advantages, _ = compute_bgae(rewards, mask, np.array(["u"] * 8, dtype=object), reward_baselines=None)
    assert advantages.shape == (8, 4)
    assert advantages.dtype == torch.float32
    assert advantages[0, 0] == advantages[0, 1] > 0
    assert not advantages[0, 2:].any()


def test_options_of_the_algorithm_node_are_used():
    rewards, mask = torch.tensor([[0.95], [0.0], [0.0], [0.0]]), torch.ones(4, 1)
    index = np.array(["u"] * 4, dtype=object)
    plain, _ = compute_bgae(rewards, mask, index, config={"bgae": {"k": 2}})
    counted, _ = compute_bgae(rewards, mask, index, config={"bgae": {"k": 2, "success": 0.9}})
    unweighted, _ = compute_bgae(rewards, mask, index, config={"bgae": {"k": 2, "success": 0.9, "weight": 0.0}})
    assert counted[0, 0] > plain[0, 0]
    assert torch.equal(unweighted, plain)


def test_the_switches_of_verls_algorithm_node_are_heeded():
    rewards, mask = torch.tensor([[0.5], [0.0], [0.0], [0.0]]), torch.ones(4, 1)
    index = np.array(["u"] * 4, dtype=object)
    plain, _ = compute_bgae(rewards, mask, index, config={"norm_adv_by_std_in_grpo": False})
    assert plain[:, 0].tolist() == pytest.approx([0.375, -0.125, -0.125, -0.125], rel=1e-5)
    shares = torch.tensor([[0.0, 0.5], [0.0, 0.25]])
    config = {"bgae": {"expected": True, "scoring_rule": "linear"}, "norm_adv_by_std_in_grpo": False}
    paid, _ = compute_bgae(shares, torch.tensor([[1, 1], [1, 1]]), np.array(["u"] * 2, dtype=object), config=config)
    assert paid.tolist() == [[0.125, 0.5], [-0.125, 0.25]]
    with pytest.raises(InputError, match="use_kl_in_reward"):
        compute_bgae(rewards, mask, index, config={"use_kl_in_reward": True})


def test_a_step_without_any_reward_is_said(caplog):
    index = np.array(["u"] * 2, dtype=object)
    compute_bgae(torch.tensor([[0.0], [0.5]]), torch.ones(2, 1), index)
    assert not caplog.messages
    compute_bgae(torch.zeros(2, 1), torch.ones(2, 1), index)
    assert "no response of this step earns anything" in caplog.text


def test_wrong_options_are_named():
    with pytest.raises(InputError, match=r"algorithm\.bgae\.alpha"):
        BgaeOptions.from_config({"bgae": {"alpha": 1}})
    with pytest.raises(InputError, match=r"algorithm\.bgae\.k"):
        BgaeOptions.from_config({"bgae": {"k": 0}})


def test_an_empty_batch_is_fine():
    advantages, _ = compute_bgae(torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.long), np.array([], dtype=object))
    assert advantages.shape == (0, 3)


def test_statistics_of_a_batch_count_groups():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.5, 0.5])
    groups = torch.tensor([0, 0, 0, 0, 2, 2, 1, 1])
    statistics = group_statistics(rewards, groups, BgaeOptions(k=2, weight=0.5))
    assert statistics["groups_without_hit"] == pytest.approx(2 / 3)
    assert statistics["groups_without_advantage"] == pytest.approx(1 / 3)
    assert statistics["hits_mean"] == pytest.approx(1 / 3)
    # one group of four has a bonus: 1 for the hit and -1/3 for the others, at K = 2
    assert statistics["bonus_abs_mean"] == pytest.approx(0.5 * (1 + 3 / 3) / 8, abs=1e-4)


def test_responses_without_a_column_are_fine():
    advantages, _ = compute_bgae(torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.long), np.array(["a", "a", "b"]))
    assert advantages.shape == (3, 0)
