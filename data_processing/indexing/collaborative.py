"""Item vectors from what is consumed near what: PPMI of train co-occurrence, then a truncated SVD.

Text says what an item is; co-occurrence says what it is taken with. Factorising a positive pointwise mutual information
matrix is the closed form of skip-gram (Levy and Goldberg 2014), with its smoothed context distribution
(Levy, Goldberg and Dagan 2015).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from scipy import sparse
from sklearn.utils.extmath import randomized_svd

SMOOTHING = 0.75
POWER_ITERATIONS = 20


def cooccurrence(sequences: Iterable[Sequence[int]], items: int, window: int = 5) -> sparse.csr_matrix:
    """Count which items lie within ``window`` steps of each other, a pair at distance d counting 1/d.

    Args:
        sequences: Train sequences of item positions in ``0..items-1``, in time order.
        items: Number of items.
        window: Largest distance that counts, in steps.

    Returns:
        Symmetric matrix [items, items]; an item does not co-occur with itself.
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


def positive_pmi(counts: sparse.csr_matrix, smoothing: float = SMOOTHING) -> sparse.csr_matrix:
    """Return max(0, log P(i, j) / (P(i) P_s(j))), where the context distribution P_s is P to the power ``smoothing``.

    Args:
        counts: Co-occurrence matrix [items, items].
        smoothing: Exponent of the context distribution; below 1 it tempers the bias towards rare items.

    Returns:
        Sparse matrix [items, items], float32.
    """
    totals = np.asarray(counts.sum(axis=1)).ravel()
    contexts = totals**smoothing
    contexts /= max(contexts.sum(), np.finfo(float).tiny)
    cells = counts.tocoo()
    values = np.log(cells.data / (totals[cells.row] * contexts[cells.col]))
    matrix = sparse.csr_matrix((np.maximum(values, 0.0), (cells.row, cells.col)), shape=counts.shape, dtype=np.float32)
    matrix.eliminate_zeros()
    return matrix


def collaborative_vectors(
    sequences: Iterable[Sequence[int]], items: int, *, dimensions: int = 64, window: int = 5
) -> np.ndarray:
    """Embed items by their train co-occurrence.

    Args:
        sequences: The training part of every user, item positions (``0..items-1``) in time order.
        items: Number of items.
        dimensions: Length of a vector; what a small catalogue cannot fill is zero.
        window: Largest distance in steps at which two items co-occur.

    Returns:
        float32 [items, dimensions], rows of length 1; an item without train co-occurrence is a row of zeros.
    """
    matrix = positive_pmi(cooccurrence(list(sequences), items, window))
    factors = _scaled_left_factors(matrix, min(dimensions, items - 1))
    lengths = np.linalg.norm(factors, axis=1, keepdims=True)
    known = lengths > 1e-6 * lengths.max(initial=0.0)
    vectors = np.zeros((items, dimensions), dtype=np.float32)
    vectors[:, : factors.shape[1]] = np.divide(factors, lengths, out=np.zeros_like(factors), where=known)
    return vectors


def fold_in(sequences: Iterable[Sequence[int]], vectors: np.ndarray, added: int, *, window: int = 5) -> np.ndarray:
    """Place new items among those that have vectors: the PPMI-weighted mean of what they co-occur with.

    Args:
        sequences: Train sequences of item positions; known items first, the new ones after them.
        vectors: [known, dimensions], the collaborative vectors of known items.
        added: Number of new items.
        window: Largest distance in steps at which two items co-occur.

    Returns:
        float32 [added, dimensions], rows of length 1; zeros for an item that co-occurs with no known one.
    """
    known = len(vectors)
    matrix = positive_pmi(cooccurrence(sequences, known + added, window))[known:, :known]
    placed = np.asarray(matrix @ vectors, dtype=np.float64)
    lengths = np.linalg.norm(placed, axis=1, keepdims=True)
    return np.divide(placed, lengths, out=np.zeros_like(placed), where=lengths > 1e-6).astype(np.float32)


def _scaled_left_factors(matrix: sparse.csr_matrix, rank: int) -> np.ndarray:
    """Return U sqrt(S) of the truncated SVD, largest first, the sign of each column fixed by its largest entry.

    A seeded randomised SVD (Halko, Martinsson and Tropp 2011): scipy's ``svds`` restarts from unseeded vectors when the
    matrix has a low rank, and then two runs differ.
    """
    if rank < 1:
        return np.zeros((matrix.shape[0], 0))
    left, scales, _ = randomized_svd(
        matrix.astype(np.float64),
        rank,
        n_oversamples=rank,
        n_iter=POWER_ITERATIONS,
        power_iteration_normalizer="QR",
        random_state=0,
    )
    return left * np.sqrt(scales)
