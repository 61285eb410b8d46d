"""Ranking metrics with one relevant item per user, Pass@k, coverage, intervals and a paired test. Pure functions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

CUTOFFS = (1, 5, 10)
RANKING = ("recall", "ndcg", "precision", "mrr")


def rank_of(target: str, ranking: Sequence[str]) -> int:
    """Return the rank of ``target``, from 1; 0 when it is not in the ranking."""
    return ranking.index(target) + 1 if target in ranking else 0


def user_metric(metric: str, ranks: ArrayLike) -> NDArray[np.float64]:
    """Compute ``recall@k``, ``ndcg@k``, ``precision@k`` or ``mrr@k`` per user, as RecBole's evaluator defines them.

    With a single relevant item the ideal gain is 1, so NDCG is ``1 / log2(rank + 1)``, and Recall@k is the hit rate.
    ``ranks`` [users] of the targets count from 1; 0 is a target that was not recommended. Returns float64 [users].

    >>> user_metric("ndcg@5", [1, 3, 0, 7]).tolist()
    [1.0, 0.5, 0.0, 0.0]
    """
    name, _, cutoff = metric.partition("@")
    k, ranks = int(cutoff), np.asarray(ranks, dtype=np.int64)
    hit = (ranks >= 1) & (ranks <= k)
    rank = np.where(hit, ranks, 1)
    gain = {"recall": 1.0, "ndcg": 1 / np.log2(rank + 1), "precision": 1 / k, "mrr": 1 / rank}[name]
    return hit * gain


def ranking_metrics(ranks: ArrayLike, cutoffs: Sequence[int] = CUTOFFS) -> dict[str, float]:
    """Return the means over users of every :func:`user_metric`, at each cutoff.

    >>> ranking_metrics([1, 3, 0, 7], cutoffs=[5])
    {'recall@5': 0.5, 'ndcg@5': 0.375, 'precision@5': 0.1, 'mrr@5': 0.3333333333333333}
    """
    return {f"{name}@{k}": float(user_metric(f"{name}@{k}", ranks).mean()) for k in cutoffs for name in RANKING}


def coverage(recommended: Iterable[Sequence[str]], catalogue: Collection[str], k: int) -> float:
    """Return the share of the catalogue that is among the first k items of any list.

    >>> coverage([["a", "b"], ["a", "c"]], {"a", "b", "c", "d"}, k=1)
    0.25
    """
    shown = {item for items in recommended for item in items[:k]}
    return sum(item in shown for item in catalogue) / len(catalogue)


def pass_at_k(samples: ArrayLike, correct: ArrayLike, k: int) -> NDArray[np.float64]:
    """Return the chance that one of k samples, drawn without replacement, is correct; float64 [prompts].

    The unbiased estimator ``1 - C(n - c, k) / C(n, k)`` (arXiv 2107.03374), as a product that does not overflow. Each
    prompt has n ``samples`` [prompts], at least k, and c ``correct`` ones [prompts].

    >>> pass_at_k([4, 4, 4], [0, 1, 4], k=2).tolist()
    [0.0, 0.5, 1.0]
    """
    n, c = np.asarray(samples, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    drawn = np.arange(k)
    miss = (n - c)[..., None] - drawn
    return 1.0 - np.prod(np.maximum(miss, 0.0) / (n[..., None] - drawn), axis=-1)


def bootstrap_mean(values: ArrayLike, *, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Return both ends of the 95% percentile bootstrap interval of the mean of [users] values."""
    # Equal values are drawn together, by a multinomial distribution: the same as one by one, and fast for ranks. Blocks
    # of resamples bound the memory where the values of all users differ.
    distinct, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    users = int(counts.sum())
    generator = np.random.default_rng(seed)
    sums = [generator.multinomial(users, counts / users, size=size) @ distinct for size in _blocks(resamples)]
    low, high = np.quantile(np.concatenate(sums) / users, [0.025, 0.975])
    return float(low), float(high)


def paired_test(left: ArrayLike, right: ArrayLike, *, resamples: int = 10_000, seed: int = 0) -> float:
    """Return the two-sided p-value of ``mean(left) - mean(right)`` by a sign-flip test over the same users.

    If both did equally well, the sign of each user's difference would be a coin toss (Smucker, Allan and Carterette,
    "A Comparison of Statistical Significance Tests for Information Retrieval Evaluation", 2007). p is the share of
    tosses, the observed one included, whose mean is at least as far from 0; so it is never 0 (Phipson and Smyth,
    "Permutation P-values Should Never Be Zero", 2010). ``left`` and ``right`` are [users], in the same order.
    """
    difference = np.asarray(left, dtype=np.float64) - np.asarray(right, dtype=np.float64)
    # Only the number of heads among equal differences matters; differences of 0 have no sign.
    distinct, counts = np.unique(np.abs(difference[difference != 0]), return_counts=True)
    if not distinct.size:
        return 1.0
    generator = np.random.default_rng(seed)
    # Sums in another order are equal but for rounding, so the bound is a little lower.
    observed = abs(difference.sum()) - 1e-9 * (distinct @ counts)
    extreme = 0
    for size in _blocks(resamples):
        heads = generator.binomial(counts, 0.5, size=(size, len(distinct)))
        extreme += int((np.abs((2 * heads - counts) @ distinct) >= observed).sum())
    return (extreme + 1) / (resamples + 1)


def _blocks(resamples: int, block: int = 100) -> list[int]:
    return [min(block, resamples - start) for start in range(0, resamples, block)]


def paired_difference(left: ArrayLike, right: ArrayLike, *, seed: int = 0) -> dict[str, float]:
    """Return ``difference`` of the means of the same users, ``low`` and ``high`` of its 95% interval, and ``p``."""
    difference = np.asarray(left, dtype=np.float64) - np.asarray(right, dtype=np.float64)
    low, high = bootstrap_mean(difference, seed=seed)
    p = paired_test(left, right, seed=seed)
    return {"difference": float(difference.mean()), "low": low, "high": high, "p": p}
