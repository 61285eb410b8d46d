"""BGAE, the bonus-calibrated group advantage estimator (arXiv 2510.20815): a tensor function and its verl adapter.

With rewards r of a group of n responses, c of them exact hits, and eps = 1e-6:

    A = (r - mean r) / (std r + eps) + weight * B

B is the analytic Pass@K advantage on hits. With rho = 1 - C(n-c, K) / C(n, K) and sigma = sqrt(rho (1 - rho)) it is
(1 - rho) / (sigma + eps) for a hit and (1 - rho - C(n-c-1, K-1) / C(n-1, K-1)) / (sigma + eps) for a miss.

With expected rewards (``gream_verl.plugin.agent_loop``) the true answer stands after every chain of thought, paid in
shares s_1 ... s_H, and a scoring rule says what of them is maximised:

    linear   s_1 + ... + s_H, the expected RSVR; the bonus is in s_H
    log      log m_1 + ... + log m_H, with m_i the mean of s_i over the group

The linear rule is not proper: it is best to be sure of the first guess, and the other guesses get worse. The log rule
is best for the true probabilities. It needs no bonus: log p is the sum over K of (Pass@K - 1) / K, while B has one K.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from math import comb
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from gream_verl.core.errors import InputError
from gream_verl.core.options import checked_options

logger = logging.getLogger(__name__)
EPSILON = 1e-6
SMALLEST_SHARE = 1e-30
"""A share that counts as nothing, but tells that a token is one of the answer."""

ScoringRule = Literal["log", "linear"]


class BgaeOptions(BaseModel):
    """Options below ``algorithm.bgae``.

    Attributes:
        k: K of Pass@K; groups smaller than K use their own size.
        weight: Weight of the bonus.
        success: Smallest reward of an exact hit.
        expected: Responses are paid in shares, as the agent loop ``gream`` pays them.
        scoring_rule: What is made of expected rewards: their logarithm, or themselves.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    k: int = Field(default=4, ge=1)
    weight: float = 1.0
    success: float = 0.999
    expected: bool = False
    scoring_rule: ScoringRule = "log"

    @classmethod
    def from_config(cls, algorithm: Mapping[str, Any] | None) -> BgaeOptions:
        """Return the options in the node ``algorithm``."""
        return checked_options(cls, "algorithm.bgae", (algorithm or {}).get("bgae"))


def bgae_advantage(
    rewards: Tensor, groups: Tensor, active: Tensor, options: BgaeOptions, normalise: bool = True
) -> Tensor:
    """Return the advantage of every response, computed for all groups at once.

    Groups may have different sizes. A group of one has mean 0 and standard deviation 1, as in verl's GRPO. The bonus is
    0 for a group without hits, and for one with so many that every draw of K holds one.

    Args:
        rewards: Rewards, shape [rows]; the advantages have their type and shape.
        groups: Number of the group of each row, from 0, shape [rows].
        active: False for padding rows, which count in no group and get 0, shape [rows].
        options: K, weight of the bonus, reward of a hit.
        normalise: Divide by the standard deviation of the group (``algorithm.norm_adv_by_std_in_grpo``).
    """
    # 1. The plain group advantage.
    reward = rewards.double()
    hit = (reward >= options.success) & active
    n, centred = _centred(reward, groups, active)
    variance = _totals(centred.square(), groups, active) / (n - 1).clamp(min=1)
    deviation = torch.where(n == 1, 1.0, variance.sqrt()) if normalise else torch.ones_like(n)
    # 2. The bonus, which only depends on the group and on hit or miss.
    of_hit, of_miss = _bonus(n, _totals(hit, groups, active), options.k)
    bonus = torch.where(hit, of_hit[groups], of_miss[groups])
    # 3. Their sum; padding rows get nothing.
    advantage = centred / (deviation + EPSILON)[groups] + options.weight * bonus
    return torch.where(active, advantage, 0.0).to(rewards.dtype)


def share_advantage(
    shares: Tensor, groups: Tensor, active: Tensor, mask: Tensor, options: BgaeOptions, normalise: bool = True
) -> Tensor:
    """Return the advantage of every token of responses that are paid in shares: the gradient of the scoring rule.

    ``linear`` is the expected reward E, the sum of the shares. ``log`` is the sum over the tokens of the SID of the
    logarithm of the group's mean share: each share is divided by that mean. Then a token of the SID has the shares from
    its own on, the tokens that close the answer have them all, and the chain of thought has them all, and its penalty,
    minus the mean of the group.

    Args:
        shares: Above 0 at the tokens of the true SID; a penalty of the chain, below 0, stands before them. A response
            without any is all chain. Shape [rows, tokens]; the advantages have their type and shape.
        groups: Number of the group of each row, from 0, shape [rows].
        active: False for padding rows, which count in no group and get 0, shape [rows].
        mask: 1 for tokens of the response, shape [rows, tokens].
        options: The scoring rule.
        normalise: Divide by the root mean square over all tokens.
    """
    # 1. The shares of the answer, and where it begins.
    penalty = shares.double().clamp(max=0).sum(dim=-1)
    exact = torch.where(shares > 2 * SMALLEST_SHARE, shares.double(), 0.0)
    level = (shares > 0).cumsum(dim=-1)  # 0 in the chain, then the tokens of the SID so far
    if options.scoring_rule == "log":
        number = groups[:, None] * shares.shape[1] + (level - 1).clamp(min=0)
        sums = _totals(exact.flatten(), number.flatten(), active[:, None].expand_as(exact).flatten())
        n = _totals(active, groups, active).clamp(min=1)
        exact = exact / (sums[number] / n[groups][:, None]).clamp(min=SMALLEST_SHARE)
    # 2. The advantages of answer and chain.
    total = exact.sum(dim=-1)
    rest = exact.flip(-1).cumsum(dim=-1).flip(-1)
    of_answer = torch.where(shares > 0, rest, total[:, None])
    _, of_chain = _centred(total + penalty, groups, active)
    advantage = torch.where(level > 0, of_answer, of_chain[:, None]) * (mask * active[:, None])
    # 3. One scale for the whole batch, so that all tokens keep their proportion.
    if normalise:
        advantage /= (advantage.square().sum() / mask.sum().clamp(min=1)).sqrt() + EPSILON
    return advantage.to(shares.dtype)


def expected_hit_bonus(hit_probability: float, n: int, options: BgaeOptions) -> float:
    """Return the bonus of an exact hit over a miss, in expectation, in a group of n responses that hit independently.

    The hits of the others are binomial with the probability of this chain's own answer, which stands for theirs.

    >>> [round(expected_hit_bonus(hit, 8, BgaeOptions()), 3) for hit in (0.0, 0.5, 1.0)]
    [1.0, 0.302, 0.0]
    """
    of_hit, of_miss = _bonus(torch.full((n + 1,), float(n)), torch.arange(n + 1).double(), options.k)
    others = [comb(n - 1, k) * hit_probability**k * (1 - hit_probability) ** (n - 1 - k) for k in range(n)]
    return float(torch.tensor(others, dtype=torch.float64) @ (of_hit[1:] - of_miss[:-1]))


def _totals(values: Tensor, groups: Tensor, active: Tensor) -> Tensor:
    """Return the sums over the active rows of each group, float64 [groups]."""
    sums = torch.zeros(int(groups.max()) + 1 if len(groups) else 0, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, groups, torch.where(active, values.double(), 0.0))


def _centred(values: Tensor, groups: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sizes of the groups, and values minus the mean of their group; a group of one has mean 0."""
    n = _totals(active, groups, active).clamp(min=1)
    mean = torch.where(n == 1, 0.0, _totals(values, groups, active) / n)
    return n, values - mean[groups]


def _bonus(n: Tensor, c: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the Pass@K advantage B of a hit and of a miss in groups of n rows with c hits; all shapes [groups]."""
    draw = n.clamp(max=k)
    all_miss = _choose_ratio(n - c, n, draw)
    scale = ((1 - all_miss) * all_miss).sqrt() + EPSILON
    others_miss = _choose_ratio(n - c - 1, n - 1, draw - 1)
    teaches = (c > 0) & (c <= n - draw)
    of_hit, of_miss = all_miss / scale, (all_miss - others_miss) / scale
    return torch.where(teaches, of_hit, 0.0), torch.where(teaches, of_miss, 0.0)


def _choose_ratio(a: Tensor, b: Tensor, k: Tensor) -> Tensor:
    """Return C(a, k) / C(b, k) for whole numbers a <= b and 0 <= k <= b, elementwise; 0 where a < k."""
    possible = a >= k
    a = torch.where(possible, a, b)
    logarithm = torch.lgamma(a + 1) - torch.lgamma(a - k + 1) - torch.lgamma(b + 1) + torch.lgamma(b - k + 1)
    return torch.where(possible, logarithm.exp(), 0.0)


def group_statistics(rewards: Tensor, groups: Tensor, options: BgaeOptions) -> dict[str, float]:
    """Return the learning signal of a batch of sampled rewards.

    These are the groups without a hit or without an advantage, the hits per group, and the mean size of the weighted
    bonus.

    Args:
        rewards: Rewards, shape [rows].
        groups: Number of the group of each row, from 0, without gaps, shape [rows].
        options: Those of the estimator.
    """
    reward, active = rewards.double(), torch.ones_like(groups, dtype=torch.bool)
    hits = torch.bincount(groups, weights=(reward >= options.success).double())
    full = bgae_advantage(reward, groups, active, options)
    plain = bgae_advantage(reward, groups, active, options.model_copy(update={"weight": 0.0}))
    size = torch.bincount(groups, weights=full.abs())
    return {
        "groups_without_hit": float((hits == 0).double().mean()),
        "hits_mean": float(hits.mean()),
        "groups_without_advantage": float((size < EPSILON).double().mean()),
        "bonus_abs_mean": float((full - plain).abs().mean()),
    }


def compute_bgae(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    config: Mapping[str, Any] | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns, which are the same, for verl's trainer (``algorithm.adv_estimator=bgae``).

    Args:
        token_level_rewards: Rewards, shape [rows, tokens].
        response_mask: 1 for tokens of the response, shape [rows, tokens]; a padding row has none.
        index: The prompt (group) of each row, shape [rows].
        config: The ``algorithm`` node; its ``bgae`` holds the options.
    """
    numbers: dict[Any, int] = {}
    groups = torch.tensor([numbers.setdefault(prompt, len(numbers)) for prompt in index], dtype=torch.long)
    groups = groups.to(token_level_rewards.device)
    algorithm = config or {}
    options, normalise = BgaeOptions.from_config(config), algorithm.get("norm_adv_by_std_in_grpo", True)
    if algorithm.get("use_kl_in_reward"):
        raise InputError("algorithm.use_kl_in_reward: bgae takes hits from the reward; set actor.use_kl_loss instead")
    if not (token_level_rewards > 0).any():
        logger.warning("no response of this step earns anything: look at them with `gream inspect`, train SFT longer")
    with torch.no_grad():
        active = response_mask.sum(dim=-1) > 0
        if options.expected:
            advantages = share_advantage(token_level_rewards, groups, active, response_mask, options, normalise)
        else:
            rewards = token_level_rewards.sum(dim=-1)
            advantages = bgae_advantage(rewards, groups, active, options, normalise).unsqueeze(-1)
        advantages = advantages * response_mask.to(advantages.dtype)
    return advantages, advantages
