"""Ranking metrics with one relevant item a user (leave-one-out), Pass@k, and bootstrap intervals. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

CUTOFFS = (1, 5, 10)


def rank_of(target: str, ranking: Sequence[str]) -> int:
    """Return the place of ``target`` in ``ranking``, from 1; 0 when it is not there.

    >>> rank_of("b", ["a", "b"]), rank_of("c", ["a", "b"])
    (2, 0)
    """
    return ranking.index(target) + 1 if target in ranking else 0


def ranking_metrics(ranks: ArrayLike, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """Return Recall, NDCG, Precision and MRR, averaged over users.

    With a single relevant item the ideal gain is 1, so NDCG is ``1 / log2(rank + 1)``; Recall@k equals the hit rate.

    Args:
        ranks: [users]; the place of each user's target, from 1; 0 when it was not recommended.
        cutoffs: The list lengths k.

    Returns:
        ``recall@k``, ``ndcg@k``, ``precision@k`` and ``mrr@k`` for each k.

    Raises:
        ValueError: When there is no user.

    >>> ranking_metrics([1, 3, 0, 7], cutoffs=[5])
    {'recall@5': 0.5, 'ndcg@5': 0.375, 'precision@5': 0.1, 'mrr@5': 0.3333333333333333}
    """
    ranks = np.asarray(ranks, dtype=np.int64)
    if not ranks.size:
        raise ValueError("no user to average over")
    result: dict[str, float] = {}
    for k in cutoffs:
        hit = (ranks >= 1) & (ranks <= k)
        place = np.where(hit, ranks, 1)
        result[f"recall@{k}"] = float(hit.mean())
        result[f"ndcg@{k}"] = float((hit / np.log2(place + 1)).mean())
        result[f"precision@{k}"] = float(hit.mean() / k)
        result[f"mrr@{k}"] = float((hit / place).mean())
    return result


def pass_at_k(samples: ArrayLike, correct: ArrayLike, k: int) -> NDArray[np.float64]:
    """Return the chance that at least one of k samples, drawn without replacement, is correct.

    The unbiased estimator ``1 - C(n - c, k) / C(n, k)`` (arXiv 2107.03374), as a product that does not overflow.

    Args:
        samples: [prompts]; n, samples drawn for each prompt.
        correct: [prompts]; c, how many of them are correct.
        k: How many to draw, at most n.

    Returns:
        float64 [prompts].

    Raises:
        ValueError: When k is not between 1 and the smallest n.

    >>> pass_at_k([4, 4, 4], [0, 1, 4], k=2).tolist()
    [0.0, 0.5, 1.0]
    """
    n, c = np.asarray(samples, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if not 1 <= k <= n.min():
        raise ValueError(f"k must be between 1 and the number of samples, {int(n.min())}, got {k}")
    drawn = np.arange(k)
    miss = (n - c)[..., None] - drawn
    return 1.0 - np.prod(np.maximum(miss, 0.0) / (n[..., None] - drawn), axis=-1)


def bootstrap_mean(
    values: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of a mean.

    Args:
        values: [n]; one number for each user. Hand over ``a - b`` of the same users for a paired difference.
        confidence: Share of resampled means inside the interval.
        resamples: How many times to draw n users with replacement.
        seed: Seed of the draws.

    Returns:
        Lower and upper end.

    Raises:
        ValueError: When there is no value.
    """
    values = np.asarray(values, dtype=np.float64)
    if not values.size:
        raise ValueError("no value to average over")
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 100):  # 100 draws at a time: bounded memory
        drawn = generator.integers(values.size, size=(min(100, resamples - start), values.size))
        means[start : start + 100] = values[drawn].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def bootstrap_difference(
    left: ArrayLike, right: ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the bootstrap interval of ``mean(left) - mean(right)`` over the same users, drawn in pairs.

    Raises:
        ValueError: When the two have different lengths, or none.
    """
    left, right = np.asarray(left, dtype=np.float64), np.asarray(right, dtype=np.float64)
    if left.shape != right.shape:
        raise ValueError(f"a paired difference needs the same users on both sides, got {left.shape} and {right.shape}")
    return bootstrap_mean(left - right, confidence=confidence, resamples=resamples, seed=seed)
