"""Embeddings by vLLM in Ray Data, against those of this process: the same texts, models and poolings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from assets import make_index, make_tiny_model
from typer.testing import CliRunner

from data_processing.indexing.embed import EmbeddingSettings, cached_embeddings, default_model, fingerprint
from gream_verl.cli.index import index_app
from gream_verl.core.data_folder import DataFolder, Item
from gream_verl.core.errors import InputError

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

pytest.importorskip("vllm", reason="vLLM is not installed")
ITEMS = [
    Item(f"Film {'of the great old sea ' * (row % 20)}{row}", brand="Fox" * (row % 2), categories=("Drama",))
    for row in range(48)
]
TOLERANCE = 1e-5
"""Of vectors whose components are at most 4; measured: 1e-6."""


def test_the_command_with_ray_gives_the_vectors_of_the_default_model(tmp_path: Path) -> None:
    try:
        default_model()
    except InputError as missing:
        pytest.skip(str(missing))
    folder = DataFolder(tmp_path, "toy")
    folder.item.write_text(json.dumps({str(row): vars(item) for row, item in enumerate(ITEMS)}))
    command = ["embed", "--data", str(tmp_path), "--dataset", "toy", "--engine", "ray"]
    assert "items a second" in CliRunner().invoke(index_app, command, catch_exceptions=False).output
    with np.load(tmp_path / "toy.text-emb.npz") as made:
        vectors = made["vectors"]
    expected = cached_embeddings(ITEMS, tmp_path / "local.npz")
    np.testing.assert_allclose(vectors, expected, atol=TOLERANCE)
    assert vectors.dtype == np.float32


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_ray_pools_a_plain_decoder_and_does_only_the_shards_that_are_missing(tmp_path: Path, pooling: str) -> None:
    model = make_tiny_model(tmp_path / "model", make_index(), texts=[item.title for item in ITEMS])
    settings = EmbeddingSettings(
        model=model,
        pooling=pooling,  # type: ignore[arg-type]
        fields=("title", "brand"),
        combine="averaged",
        normalize=False,
        max_tokens=32,
    )
    expected = cached_embeddings(ITEMS, tmp_path / "local.npz", settings, shard_items=10)
    shards = tmp_path / f"ray-{fingerprint(ITEMS, settings)[:12]}"
    shards.mkdir()
    np.save(shards / "00002-of-10-items.npy", np.full((10, 64), 7, np.float32))
    vectors = cached_embeddings(ITEMS, tmp_path / "ray.npz", settings, engine="ray", shard_items=10)
    assert (vectors[20:30] == 7).all()
    done = np.r_[0:20, 30:48]
    np.testing.assert_allclose(vectors[done], expected[done], atol=TOLERANCE)
    assert not shards.exists()


@pytest.mark.usefixtures("cluster")
def test_a_model_that_vllm_cannot_run_ends_the_call_with_the_reason(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", make_index(), hidden=32)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"hidden_act": "gelu"}))
    with pytest.raises(
        InputError, match=r"could not embed with it \(.*gelu.*\); call again, or use the engine 'local'"
    ):
        cached_embeddings(ITEMS, tmp_path / "ray.npz", EmbeddingSettings(model=model), engine="ray")
