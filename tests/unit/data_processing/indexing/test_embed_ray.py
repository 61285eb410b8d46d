from __future__ import annotations

from pathlib import Path

import pytest
from assets import make_index, make_tiny_model

from data_processing.indexing.embed import EmbeddingSettings, default_model, load_encoder
from data_processing.indexing.embed_ray import pooler_config
from gream_verl.core.errors import InputError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", make_index())


def config_of(settings: EmbeddingSettings) -> dict[str, object]:
    return pooler_config(load_encoder(settings, weights=False), "model")


def test_vllm_is_told_what_the_model_of_sentence_transformers_does() -> None:
    try:
        default_model()
    except InputError as missing:
        pytest.skip(str(missing))
    assert config_of(EmbeddingSettings()) == {"seq_pooling_type": "MEAN", "use_activation": True}


@pytest.mark.parametrize(("pooling", "expected"), [("model", "MEAN"), ("mean", "MEAN"), ("last", "LAST")])
def test_vllm_is_told_how_a_plain_model_is_pooled(tiny: Path, pooling: str, expected: str) -> None:
    settings = EmbeddingSettings(model=tiny, pooling=pooling)  # type: ignore[arg-type]
    assert config_of(settings) == {"seq_pooling_type": expected, "use_activation": False}


def test_what_vllm_does_not_do_is_one_clear_sentence(tiny: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer

    transformer = Transformer(str(tiny))
    for name, modules in {
        "chat": [Pooling(64)],
        "dense": [Pooling(64), Dense(64, 8)],
        "max": [Pooling(64, "max")],
    }.items():
        SentenceTransformer(modules=[transformer, *modules]).save(str(tmp_path / name))
        with pytest.raises(InputError, match="use the engine 'local', or the pooling 'mean' or 'last'"):
            config_of(EmbeddingSettings(model=tmp_path / name))


def test_a_model_to_look_at_has_no_numbers_in_it(tiny: Path) -> None:
    encoder = load_encoder(EmbeddingSettings(model=tiny, max_tokens=32), weights=False)
    assert {parameter.device.type for parameter in encoder.parameters()} == {"meta"}
    assert encoder.max_seq_length == 32
