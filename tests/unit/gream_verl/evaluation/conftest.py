"""Worlds that the tests of decoding share: an index, a tiny model, prompts."""

from __future__ import annotations

from pathlib import Path

import pytest
from assets import make_index, make_tiny_model
from evaluation_files import make_taught_run, write_prompts

USERS = 7


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, ``tiny.index.json`` and the prompts of 7 users in both modes."""
    folder = tmp_path_factory.mktemp("world")
    index = make_index()
    index.save(folder / "tiny.index.json")
    make_tiny_model(folder / "model", index)
    write_prompts(folder / "tiny-test.parquet", index, USERS)
    return folder


@pytest.fixture(scope="session")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers in the right form, while half of the items it knows have left the index."""
    return make_taught_run(tmp_path_factory.mktemp("taught"), USERS)
