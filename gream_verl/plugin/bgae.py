"""BGAE, the bonus-calibrated group advantage estimator (arXiv 2510.20815): a tensor function and its verl adapter.

With rewards r of a group of n responses of which c are exact hits, and eps = 1e-6:

    A = (r - mean r) / (std r + eps) + weight * B

B is the analytic Pass@K advantage on hits. With rho = 1 - C(n-c, K) / C(n, K) and sigma = sqrt(rho (1 - rho)) it is
(1 - rho) / (sigma + eps) for a hit and (1 - rho - C(n-c-1, K-1) / C(n-1, K-1)) / (sigma + eps) for a miss.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from itertools import count
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from gream_verl.core.options import checked_options

OPTIONS = "algorithm.bgae"
EPSILON = 1e-6


class BgaeOptions(BaseModel):
    """What may stand under ``algorithm.bgae``.

    Attributes:
        k: K of Pass@K, at least 1; groups smaller than K use their own size.
        weight: Weight of the bonus.
        success: Reward from which a response is an exact hit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    k: int = Field(default=4, ge=1)
    weight: float = 1.0
    success: float = 0.999

    @classmethod
    def from_config(cls, algorithm: Mapping[str, Any] | None) -> BgaeOptions:
        """Return the options in the ``algorithm`` node.

        Raises:
            InputError: When a key is unknown or has a wrong value; the message names it.
        """
        return checked_options(cls, OPTIONS, (algorithm or {}).get("bgae"))


def bgae_advantage(
    rewards: Tensor,
    groups: Tensor,
    active: Tensor,
    *,
    k: int = 4,
    weight: float = 1.0,
    success: float = 0.999,
) -> Tensor:
    """Return the advantage of every response, computed for all groups at once.

    Groups may have different sizes. A group of one has mean 0 and standard deviation 1, as in verl's GRPO. The bonus is
    0 for a group without hits, and for one with so many that every draw of K holds one.

    Args:
        rewards: Rewards, shape [rows].
        groups: Number of the group of each row, from 0, shape [rows].
        active: False for padding rows, which count in no group and get 0, shape [rows].
        k: K of Pass@K.
        weight: Weight of the bonus.
        success: Reward from which a response is an exact hit.

    Returns:
        Advantages in the type of ``rewards``, shape [rows].
    """
    reward = rewards.double()
    hit = (reward >= success) & active
    number_of_groups = int(groups.max()) + 1 if len(groups) else 0

    def total(values: Tensor) -> Tensor:
        """Sum over the active rows of each group, shape [groups]."""
        sums = torch.zeros(number_of_groups, dtype=torch.float64, device=rewards.device)
        return sums.index_add_(0, groups, torch.where(active, values.double(), 0.0))

    n = total(active).clamp(min=1)
    alone = n == 1
    centred = reward - torch.where(alone, 0.0, total(reward) / n)[groups]
    variance = total(centred.square()) / (n - 1).clamp(min=1)
    deviation = torch.where(alone, 1.0, variance.sqrt())
    of_hit, of_miss = _bonus(n, total(hit), k)
    bonus = torch.where(hit, of_hit[groups], of_miss[groups])
    advantage = centred / (deviation + EPSILON)[groups] + weight * bonus
    return torch.where(active, advantage, 0.0).to(rewards.dtype)


def group_statistics(rewards: Tensor, groups: Tensor, active: Tensor, options: BgaeOptions) -> dict[str, float]:
    """Return what there is to learn in a batch, for the log of a training step.

    Args:
        rewards: Rewards, shape [rows].
        groups: Number of the group of each row, from 0, shape [rows].
        active: False for padding rows, shape [rows].
        options: Those of the estimator.

    Returns:
        ``groups_without_hit`` and ``groups_without_advantage``, shares of the groups; ``hits_mean``, hits a group;
        ``bonus_abs_mean``, mean size of the weighted bonus over the rows.
    """
    reward, group = rewards[active].double(), groups[active].unique(return_inverse=True)[1]
    if not len(reward):
        return {}
    everyone = torch.ones_like(group, dtype=torch.bool)
    plain, full = (
        bgae_advantage(reward, group, everyone, k=options.k, weight=weight, success=options.success)
        for weight in (0.0, options.weight)
    )
    hits = torch.bincount(group, weights=(reward >= options.success).double())
    size = torch.bincount(group, weights=full.abs())
    return {
        "groups_without_hit": float((hits == 0).double().mean()),
        "groups_without_advantage": float((size < EPSILON).double().mean()),
        "hits_mean": float(hits.mean()),
        "bonus_abs_mean": float((full - plain).abs().mean()),
    }


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


def compute_bgae(
    token_level_rewards: Tensor,
    response_mask: Tensor,
    index: np.ndarray,
    config: Mapping[str, Any] | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns as verl's trainer asks for them (``algorithm.adv_estimator=bgae``).

    verl passes every row of a session with several outputs, and no session number: each counts as a response.

    Args:
        token_level_rewards: Rewards, shape [rows, tokens].
        response_mask: 1 for tokens of the response, shape [rows, tokens]; a padding row has none.
        index: The prompt (group) of each row, shape [rows].
        config: The ``algorithm`` node; its ``bgae`` holds the options.

    Returns:
        The advantage of each row on all its response tokens, twice, shape [rows, tokens].
    """
    options = BgaeOptions.from_config(config)
    numbers: dict[Any, int] = defaultdict(count().__next__)
    groups = np.fromiter(map(numbers.__getitem__, index), np.int64, len(index))
    with torch.no_grad():
        rewards = token_level_rewards.sum(dim=-1)
        advantages = response_mask.to(rewards.dtype, copy=True)
        advantage = bgae_advantage(
            rewards,
            torch.as_tensor(groups, device=rewards.device),
            advantages.sum(dim=-1) > 0,
            k=options.k,
            weight=options.weight,
            success=options.success,
        )
        advantages *= advantage.unsqueeze(-1)
    return advantages, advantages
