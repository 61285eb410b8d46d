"""Embeddings for tests of the item index: fast, and the same for the same text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data_processing.indexing.embed import DEFAULT_SETTINGS, EmbeddingSettings, item_texts
from gream_verl.core.data_folder import Item


def fake_embeddings(items: Sequence[Item], settings: EmbeddingSettings = DEFAULT_SETTINGS) -> np.ndarray:
    """Return random float32 [items, 6], seeded by the text of each item."""
    texts = [item_texts(item, settings)[0] for item in items]
    return np.stack([np.random.default_rng(list(text.encode())).normal(size=6) for text in texts]).astype(np.float32)
