"""Embeddings by several processes of sentence-transformers against those of one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from assets import make_index, make_tiny_model

from data_processing.indexing.embed import EmbeddingSettings, embed_items
from gream_verl.core.data_folder import Item

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def test_two_processes_give_the_vectors_of_one(tmp_path: Path) -> None:
    items = [Item(f"Film {'of the great old sea ' * (row % 20)}{row}", brand="Fox" * (row % 2)) for row in range(48)]
    settings = EmbeddingSettings(
        model=str(make_tiny_model(tmp_path / "model", make_index(), texts=[item.title for item in items])),
        fields=("title", "brand"),
        combine="averaged",
        batch_size=4,
    )
    both = embed_items(items, replace(settings, devices=("cpu", "cpu")))
    np.testing.assert_allclose(both, embed_items(items, settings), atol=1e-5)
