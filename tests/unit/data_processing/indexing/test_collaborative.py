from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_processing.indexing.collaborative import collaborative_vectors, cooccurrence, fold_in, positive_pmi

ITEMS = 8
SEQUENCES = st.lists(st.lists(st.integers(0, ITEMS - 1), max_size=12), max_size=6)


def slow_cooccurrence(sequences: list[list[int]], items: int, window: int) -> np.ndarray:
    counts = np.zeros((items, items))
    for sequence in sequences:
        for later in range(len(sequence)):
            for earlier in range(max(0, later - window), later):
                a, b = sequence[later], sequence[earlier]
                if a != b:
                    counts[a, b] += 1 / (later - earlier)
                    counts[b, a] += 1 / (later - earlier)
    return counts


def slow_positive_pmi(counts: np.ndarray) -> np.ndarray:
    total = counts.sum()
    own = counts.sum(axis=1) / total
    context = counts.sum(axis=1) ** 0.75 / (counts.sum(axis=1) ** 0.75).sum()
    result = np.zeros_like(counts)
    for a, b in zip(*np.nonzero(counts), strict=True):
        result[a, b] = max(0.0, np.log(counts[a, b] / total / (own[a] * context[b])))
    return result


@given(SEQUENCES, st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_cooccurrence_equals_two_plain_loops(sequences: list[list[int]], window: int) -> None:
    expected = slow_cooccurrence(sequences, ITEMS, window)
    np.testing.assert_allclose(cooccurrence(sequences, ITEMS, window).toarray(), expected, atol=1e-12)


@given(SEQUENCES)
@settings(max_examples=25, deadline=None)
def test_positive_pmi_equals_its_definition(sequences: list[list[int]]) -> None:
    counts = cooccurrence(sequences, ITEMS)
    expected = slow_positive_pmi(counts.toarray()) if counts.nnz else np.zeros((ITEMS, ITEMS))
    np.testing.assert_allclose(positive_pmi(counts).toarray(), expected, atol=1e-5)


@given(SEQUENCES)
@settings(max_examples=25, deadline=None)
def test_rows_have_length_one_or_are_zero(sequences: list[list[int]]) -> None:
    vectors = collaborative_vectors(sequences, ITEMS, dimensions=5)
    assert vectors.shape == (ITEMS, 5)
    assert vectors.dtype == np.float32
    lengths = np.linalg.norm(vectors, axis=1)
    assert np.all(np.isclose(lengths, 1, atol=1e-5) | (lengths == 0))


def test_items_never_seen_in_training_are_zero() -> None:
    sequences = [[0, 1, 2, 0, 1, 2], [1, 2, 0, 3, 4]]
    vectors = collaborative_vectors(sequences, ITEMS, dimensions=4)
    known = np.linalg.norm(vectors, axis=1) > 0
    assert known[:4].all()
    assert not known[5:].any()


def test_items_of_one_taste_are_closer_than_items_of_two() -> None:
    random = np.random.default_rng(0)
    sequences = [list(random.integers(0, 20, 30) + 20 * (user % 2)) for user in range(60)]
    vectors = collaborative_vectors(sequences, 40, dimensions=8)
    similarity = vectors @ vectors.T
    same = np.add.outer(np.arange(40) // 20, np.arange(40) // 20) != 1
    np.fill_diagonal(similarity, 0)
    assert similarity[same].mean() > similarity[~same].mean() + 0.2


@pytest.mark.parametrize("users", [1, 100])
def test_the_same_sequences_give_the_same_bytes(users: int) -> None:
    items = 200
    random = np.random.default_rng(1)
    sequences = [list(random.integers(0, items, 25)) for _ in range(users)]
    first, again = collaborative_vectors(sequences, items), collaborative_vectors(sequences, items)
    assert first.tobytes() == again.tobytes()


def test_similarities_equal_those_of_an_exact_decomposition() -> None:
    random = np.random.default_rng(2)
    sequences = [list(random.integers(0, 30, 40) + 30 * (user % 4)) for user in range(200)]
    left, scales, _ = np.linalg.svd(positive_pmi(cooccurrence(sequences, 120)).toarray())
    exact = left[:, :4] * np.sqrt(scales[:4])
    exact /= np.linalg.norm(exact, axis=1, keepdims=True)
    vectors = collaborative_vectors(sequences, 120, dimensions=4)
    np.testing.assert_allclose(vectors @ vectors.T, exact @ exact.T, atol=1e-3)


@pytest.mark.parametrize("items", [1, 2, 3])
def test_tiny_catalogues_keep_their_shape(items: int) -> None:
    vectors = collaborative_vectors([[0, items - 1, 0, items - 1, 0]], items)
    assert vectors.shape == (items, 64)
    assert np.isfinite(vectors).all()


def test_a_new_item_lies_with_what_it_is_taken_with_more_than_chance_has_it() -> None:
    vectors = np.eye(4, dtype=np.float32)
    everywhere = [[0, other] for other in (1, 2, 3)] * 8  # item 0 is taken with all
    placed = fold_in([*everywhere, [4, 0], [4, 0], [4, 1], [4, 1]], vectors, 2)
    assert np.linalg.norm(placed[0]) == pytest.approx(1)
    assert placed[0, 1] > placed[0, 0]
    assert placed[0, 2] == placed[0, 3] == 0
    np.testing.assert_array_equal(placed[1], 0)
