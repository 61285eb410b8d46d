"""BGAE, the bonus-calibrated group advantage estimator (arXiv 2510.20815): a tensor function and its verl adapter.

With rewards r of a group of n responses, c of them exact hits, and eps = 1e-6:

    A = (r - mean r) / (std r + eps) + weight * B

B is the analytic Pass@K advantage on hits. With rho = 1 - C(n-c, K) / C(n, K) and sigma = sqrt(rho (1 - rho)) it is
(1 - rho) / (sigma + eps) for a hit and (1 - rho - C(n-c-1, K-1) / C(n-1, K-1)) / (sigma + eps) for a miss.

With expected rewards (``gream_verl.plugin.agent_loop``) a response is paid in shares: the chain of thought by what it
is worth, each answer token by what it changes. The chain's advantage is its share minus the group's mean, that of an
answer token its own share, and the bonus is in the shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import comb
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from gream_verl.core.errors import InputError
from gream_verl.core.options import checked_options

EPSILON = 1e-6


class BgaeOptions(BaseModel):
    """Options below ``algorithm.bgae``.

    Attributes:
        k: K of Pass@K; groups smaller than K use their own size.
        weight: Weight of the bonus.
        success: Smallest reward of an exact hit.
        expected: Responses are paid in shares, as the agent loop ``gream`` pays them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    k: int = Field(default=4, ge=1)
    weight: float = 1.0
    success: float = 0.999
    expected: bool = False

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


def share_advantage(shares: Tensor, groups: Tensor, active: Tensor, normalise: bool = True) -> Tensor:
    """Return the advantage of every token of responses that are paid in shares.

    The tokens up to the first share have that share minus the mean of the group; a response without any has 0 as its
    only share. A later token has its own share. Divided by the root mean square of what changes in a response, which is
    the standard deviation of the reward given the prompt, because the changes of an expectation do not correlate.

    Args:
        shares: Shape [rows, tokens]; the advantages have their type and shape.
        groups: Number of the group of each row, from 0, shape [rows].
        active: False for padding rows, which count in no group and get 0, shape [rows].
        normalise: Divide at all.
    """
    # 1. The first share of each row, and the tokens it is for.
    paid = shares != 0
    first = paid.double().argmax(dim=-1)
    worth = shares.double().gather(1, first[:, None])[:, 0]
    early = (torch.arange(shares.shape[1], device=shares.device) <= first[:, None]) | ~paid.any(dim=-1, keepdim=True)
    # 2. The advantage of the chain and of the tokens after it.
    _, centred = _centred(worth, groups, active)
    later = torch.where(early, 0.0, shares.double())
    advantage = torch.where(early, centred[:, None], later)
    # 3. One scale for the whole batch, so that all tokens keep their proportion.
    if normalise:
        energy = centred.square() + later.square().sum(dim=-1)
        advantage /= (energy * active).sum().div(active.sum().clamp(min=1)).sqrt() + EPSILON
    return torch.where(active[:, None], advantage, 0.0).to(shares.dtype)


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
    """Return the learning signal of a batch: groups without a hit and hits per group.

    With sampled rewards also groups without an advantage and the mean size of the weighted bonus.

    Args:
        rewards: Rewards, shape [rows].
        groups: Number of the group of each row, from 0, without gaps, shape [rows].
        options: Those of the estimator.
    """
    reward, active = rewards.double(), torch.ones_like(groups, dtype=torch.bool)
    hits = torch.bincount(groups, weights=(reward >= options.success).double())
    of_hits = {"groups_without_hit": float((hits == 0).double().mean()), "hits_mean": float(hits.mean())}
    if options.expected:
        return of_hits
    full = bgae_advantage(reward, groups, active, options)
    plain = bgae_advantage(reward, groups, active, options.model_copy(update={"weight": 0.0}))
    size = torch.bincount(groups, weights=full.abs())
    return of_hits | {
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
    with torch.no_grad():
        active = response_mask.sum(dim=-1) > 0
        if options.expected:
            advantages = share_advantage(token_level_rewards, groups, active, normalise)
        else:
            rewards = token_level_rewards.sum(dim=-1)
            advantages = bgae_advantage(rewards, groups, active, options, normalise).unsqueeze(-1)
        advantages = advantages * response_mask.to(advantages.dtype)
    return advantages, advantages
