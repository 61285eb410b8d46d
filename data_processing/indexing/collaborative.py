"""Item vectors from train co-occurrence: positive pointwise mutual information (PPMI), then a truncated SVD.

Text says what an item is; co-occurrence says what it is taken with. Factorising a PPMI matrix is the closed form of
skip-gram (Levy and Goldberg 2014), with its smoothed context distribution (Levy, Goldberg and Dagan 2015).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from scipy import sparse
from sklearn.utils.extmath import randomized_svd

SMOOTHING = 0.75
"""Exponent of the context distribution; below 1 it tempers the bias towards rare items."""
DIMENSIONS = 64
WINDOW = 5
POWER_ITERATIONS = 20


def cooccurrence(sequences: Iterable[Sequence[int]], items: int, window: int = WINDOW) -> sparse.csr_matrix:
    """Count pairs of different items within ``window`` steps of each other, a pair at distance d counting 1/d.

    Takes sequences of item positions (``0..items-1``) in time order; returns a symmetric matrix [items, items].
    """
    taken = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
    flat = np.concatenate([*taken, np.empty(0, np.int64)])
    user = np.repeat(np.arange(len(taken)), [len(sequence) for sequence in taken])
    counts = sparse.csr_matrix((items, items), dtype=np.float64)
    for distance in range(1, window + 1):
        near = (user[distance:] == user[:-distance]) & (flat[distance:] != flat[:-distance])
        later, earlier = flat[distance:][near], flat[:-distance][near]
        weights = np.full(len(later), 1.0 / distance)
        counts += sparse.csr_matrix((weights, (later, earlier)), shape=(items, items))
    return (counts + counts.T).tocsr()


def positive_pmi(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return max(0, log P(i, j) / (P(i) P_s(j))) of counts [items, items]; P_s is P to the power ``SMOOTHING``."""
    totals = np.asarray(counts.sum(axis=1)).ravel()
    contexts = totals**SMOOTHING
    contexts /= max(contexts.sum(), np.finfo(float).tiny)
    cells = counts.tocoo()
    values = np.log(cells.data / (totals[cells.row] * contexts[cells.col]))
    matrix = sparse.csr_matrix((np.maximum(values, 0.0), (cells.row, cells.col)), shape=counts.shape, dtype=np.float32)
    matrix.eliminate_zeros()
    return matrix


def collaborative_vectors(
    sequences: Iterable[Sequence[int]], items: int, *, dimensions: int = DIMENSIONS
) -> np.ndarray:
    """Embed items by their train co-occurrence: U sqrt(S) of a seeded truncated SVD, with rows of length 1.

    Args:
        sequences: The training part of every user, item positions (``0..items-1``) in time order.
        items: Number of items.
        dimensions: Length of a vector; a small catalogue leaves the last numbers zero.

    Returns:
        float32 [items, dimensions]; an item without train co-occurrence is a row of zeros.
    """
    vectors = np.zeros((items, dimensions), dtype=np.float32)
    rank = min(dimensions, items - 1)
    if rank < 1:
        return vectors
    left, scales, _ = randomized_svd(  # scipy's svds would restart from unseeded vectors when the rank is low
        positive_pmi(cooccurrence(sequences, items)).astype(np.float64),
        rank,
        n_oversamples=rank,
        n_iter=POWER_ITERATIONS,
        power_iteration_normalizer="QR",
        random_state=0,
    )
    factors = left * np.sqrt(scales)
    lengths = np.linalg.norm(factors, axis=1, keepdims=True)
    known = lengths > 1e-6 * lengths.max(initial=0.0)
    vectors[:, :rank] = np.divide(factors, lengths, out=np.zeros_like(factors), where=known)
    return vectors


def fold_in(sequences: Iterable[Sequence[int]], vectors: np.ndarray, added: int) -> np.ndarray:
    """Place new items among those that have vectors: the PPMI-weighted mean of the items they co-occur with.

    Args:
        sequences: Train sequences of item positions; known items first, the new ones after them.
        vectors: [known, dimensions], the collaborative vectors of known items.
        added: Number of new items.

    Returns:
        float32 [added, dimensions], rows of length 1; zeros for an item that co-occurs with no known one.
    """
    known = len(vectors)
    matrix = positive_pmi(cooccurrence(sequences, known + added))[known:, :known]
    folded = np.asarray(matrix @ vectors, dtype=np.float64)
    lengths = np.linalg.norm(folded, axis=1, keepdims=True)
    return np.divide(folded, lengths, out=np.zeros_like(folded), where=lengths > 1e-6).astype(np.float32)
