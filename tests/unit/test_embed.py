from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import data_processing.indexing.embed as embed
from data_processing.indexing.embed import cached_embeddings, default_model, embed_texts, fingerprint, item_text
from data_processing.layout import Item
from gream_verl.files import InputError

TITLES = ["Alien (1979). Horror, Sci-Fi.", "Aliens (1986). Action, Sci-Fi.", "Clueless (1995). Comedy."]


@pytest.fixture(autouse=True)
def _needs_the_model_package() -> None:
    try:
        default_model()
    except InputError as missing:
        pytest.skip(str(missing))


def test_text_holds_title_categories_and_the_start_of_the_description() -> None:
    item = Item("Heat", description="x" * 500, categories=("Action", "Crime"))
    assert item_text(item) == f"Heat. Action, Crime. {'x' * 200}."
    assert item_text(Item("Seven Ltd.")) == "Seven Ltd."


def test_similar_titles_are_closer_and_rows_have_length_one() -> None:
    vectors = embed_texts(TITLES)
    assert vectors.shape == (3, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > similarity[0, 2] + 0.1


def test_rows_keep_the_order_of_the_texts_whatever_their_lengths() -> None:
    texts = [" ".join(["film"] * length) + f" number {length}" for length in (9, 1, 30, 4)]
    together = embed_texts(texts)
    alone = np.concatenate([embed_texts([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_the_cache_is_used_until_texts_or_model_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(texts: list[str], model: object = None) -> np.ndarray:
        calls.append(list(texts))
        return np.full((len(texts), 2), len(calls), np.float32)

    monkeypatch.setattr(embed, "embed_texts", counted)
    cache = tmp_path / "cache.npz"
    first = cached_embeddings(["a", "b"], cache)
    assert cached_embeddings(["a", "b"], cache).tobytes() == first.tobytes()
    assert len(calls) == 1
    cached_embeddings(["a", "c"], cache)
    cached_embeddings(["a", "c"], cache, model="other")
    assert len(calls) == 3
    cache.write_bytes(b"PK\x03\x04 cut short")
    cached_embeddings(["a", "c"], cache, model="other")
    assert len(calls) == 4


def test_the_fingerprint_tells_texts_their_order_and_models_apart() -> None:
    keys = {fingerprint(["a", "b"]), fingerprint(["b", "a"]), fingerprint(["ab"]), fingerprint(["a", "b"], "other")}
    assert len(keys) == 4


def test_a_missing_model_folder_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such model folder; give a sentence-transformers model"):
        embed_texts(["a"], tmp_path / "nowhere")


def test_a_folder_that_is_no_model_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be loaded as an embedding model") as raised:
        embed_texts(["a"], tmp_path)
    assert "\n" not in str(raised.value)


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "OFFLINE_PACKAGE", "no_such_package_at_all")
    with pytest.raises(InputError, match="pip install"):
        default_model()
