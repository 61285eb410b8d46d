"""BGAE, the bonus-calibrated group advantage estimator (arXiv 2510.20815): a tensor function and its verl adapter.

With rewards r of a group of n responses, c of them exact hits, and eps = 1e-6:

    A = (r - mean r) / (std r + eps) + weight * B

B is the analytic Pass@K advantage on hits. With rho = 1 - C(n-c, K) / C(n, K) and sigma = sqrt(rho (1 - rho)) it is
(1 - rho) / (sigma + eps) for a hit and (1 - rho - C(n-c-1, K-1) / C(n-1, K-1)) / (sigma + eps) for a miss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from gream_verl.core.options import checked_options

EPSILON = 1e-6


class BgaeOptions(BaseModel):
    """Options below ``algorithm.bgae``.

    Attributes:
        k: K of Pass@K; groups smaller than K use their own size.
        weight: Weight of the bonus.
        success: Smallest reward of an exact hit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    k: int = Field(default=4, ge=1)
    weight: float = 1.0
    success: float = 0.999

    @classmethod
    def from_config(cls, algorithm: Mapping[str, Any] | None) -> BgaeOptions:
        """Return the options in the node ``algorithm``."""
        return checked_options(cls, "algorithm.bgae", (algorithm or {}).get("bgae"))


def bgae_advantage(rewards: Tensor, groups: Tensor, active: Tensor, options: BgaeOptions) -> Tensor:
    """Return the advantage of every response, computed for all groups at once.

    Groups may have different sizes. A group of one has mean 0 and standard deviation 1, as in verl's GRPO. The bonus is
    0 for a group without hits, and for one with so many that every draw of K holds one.

    Args:
        rewards: Rewards, shape [rows]; the advantages have their type and shape.
        groups: Number of the group of each row, from 0, shape [rows].
        active: False for padding rows, which count in no group and get 0, shape [rows].
        options: K, weight of the bonus, reward of a hit.
    """
    # 1. Sums over the active rows of each group, shape [groups].
    reward = rewards.double()
    hit = (reward >= options.success) & active
    number_of_groups = int(groups.max()) + 1 if len(groups) else 0

    def total(values: Tensor) -> Tensor:
        sums = torch.zeros(number_of_groups, dtype=torch.float64, device=rewards.device)
        return sums.index_add_(0, groups, torch.where(active, values.double(), 0.0))

    # 2. The plain group advantage.
    n = total(active).clamp(min=1)
    alone = n == 1
    centred = reward - torch.where(alone, 0.0, total(reward) / n)[groups]
    variance = total(centred.square()) / (n - 1).clamp(min=1)
    deviation = torch.where(alone, 1.0, variance.sqrt())
    # 3. The bonus, which only depends on the group and on hit or miss.
    of_hit, of_miss = _bonus(n, total(hit), options.k)
    bonus = torch.where(hit, of_hit[groups], of_miss[groups])
    # 4. Their sum; padding rows get nothing.
    advantage = centred / (deviation + EPSILON)[groups] + options.weight * bonus
    return torch.where(active, advantage, 0.0).to(rewards.dtype)


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
    """Return the learning signal of a batch: two shares of groups, hits per group, mean size of the weighted bonus.

    Args:
        rewards: Rewards, shape [rows].
        groups: Number of the group of each row, from 0, without gaps, shape [rows].
        options: Those of the estimator.
    """
    reward, active = rewards.double(), torch.ones_like(groups, dtype=torch.bool)
    full = bgae_advantage(reward, groups, active, options)
    plain = bgae_advantage(reward, groups, active, options.model_copy(update={"weight": 0.0}))
    hits = torch.bincount(groups, weights=(reward >= options.success).double())
    size = torch.bincount(groups, weights=full.abs())
    return {
        "groups_without_hit": float((hits == 0).double().mean()),
        "groups_without_advantage": float((size < EPSILON).double().mean()),
        "hits_mean": float(hits.mean()),
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
    with torch.no_grad():
        rewards = token_level_rewards.sum(dim=-1)
        advantages = response_mask.to(rewards.dtype, copy=True)
        active = advantages.sum(dim=-1) > 0
        options = BgaeOptions.from_config(config)
        advantages *= bgae_advantage(rewards, groups.to(rewards.device), active, options).unsqueeze(-1)
    return advantages, advantages
