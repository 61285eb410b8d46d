from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from assets import make_index, make_tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

import data_processing.indexing.embed as embed
from data_processing.indexing.embed import (
    DEFAULT_SETTINGS,
    EmbeddingSettings,
    cached_embeddings,
    default_model,
    embed_items,
    fingerprint,
    item_texts,
    load_encoder,
)
from gream_verl.core.data_folder import DataFolder, Item
from gream_verl.core.errors import InputError

UNEQUAL = [Item(" ".join(["Toy Story"] * length) + f" number {length}") for length in (9, 1, 20, 4, 13)]
TEXT = st.text("ab .\ud83dé", max_size=5)
HEAT = Item("Heat", description="A heist.", brand="Warner", categories=("Action", "Crime"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Qwen3 whose tokenizer has no padding token: no sentence-transformers model."""
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", make_index())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture
def minilm() -> None:
    try:
        default_model()
    except InputError as missing:
        pytest.skip(str(missing))


def reference(folder: str, texts: list[str], pooling: str, max_tokens: int = 64) -> np.ndarray:
    """Pool each text by itself, so that there is no padding."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    vectors = []
    with torch.inference_mode():
        for text in texts:
            hidden = model(torch.tensor([tokenizer(text).input_ids[:max_tokens]])).last_hidden_state[0]
            vectors.append(hidden.mean(dim=0) if pooling == "mean" else hidden[-1])
    return torch.stack(vectors).numpy()


def texts_of(items: list[Item]) -> list[str]:
    return [item_texts(item)[0] for item in items]


def test_texts_hold_the_fields_asked_for_in_their_order() -> None:
    long = Item("Heat", description="x" * 500, categories=("Action", "Crime"))
    assert item_texts(long) == [f"Heat. Action, Crime. {'x' * 200}."]
    assert item_texts(Item("Seven Ltd.")) == ["Seven Ltd."]
    settings = EmbeddingSettings(fields=("brand", "title", "description"), description_characters=3)
    assert item_texts(HEAT, settings) == ["Warner. Heat. A h."]
    assert item_texts(Item("Heat", brand=" "), EmbeddingSettings(fields=("brand", "description"))) == ["Heat."]
    assert item_texts(Item("Heat \ud83d")) == ["Heat ?."]  # half a character


@given(
    st.builds(Item, TEXT.filter(bool), TEXT, TEXT, st.lists(TEXT, max_size=2).map(tuple)),
    st.lists(st.sampled_from(["title", "categories", "description", "brand"]), unique=True, min_size=1).map(tuple),
)
@settings(max_examples=25, deadline=None)
def test_the_joined_text_is_that_of_the_fields_and_never_empty(item: Item, fields: tuple[embed.Field, ...]) -> None:
    alone = item_texts(item, EmbeddingSettings(fields=fields, combine="averaged"))
    assert item_texts(item, EmbeddingSettings(fields=fields)) == [" ".join(alone)]
    assert 1 <= len(alone) <= len(fields)
    assert all(alone)


@pytest.mark.usefixtures("minilm")
def test_the_default_model_puts_similar_titles_close() -> None:
    items = [Item("Alien (1979). Horror"), Item("Aliens (1986). Action"), Item("Clueless (1995). Comedy"), *UNEQUAL]
    vectors = embed_items(items, EmbeddingSettings(batch_size=3))
    assert vectors.shape == (8, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.1
    # Our masked mean and normalisation are what the model does itself.
    np.testing.assert_allclose(embed_items(items, EmbeddingSettings(pooling="mean")), vectors, atol=1e-5)


def test_a_batch_holds_texts_of_like_length(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []

    def watched(settings: EmbeddingSettings) -> object:
        encoder = load_encoder(settings)
        encoder[0].register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0]["input_ids"].shape[1]))
        return encoder

    monkeypatch.setattr(embed, "load_encoder", watched)
    embed_items(UNEQUAL, EmbeddingSettings(model=tiny, batch_size=2, max_tokens=512))
    assert len(widths) == 3
    assert widths == sorted(widths, reverse=True)


def test_the_default_prompt_of_a_model_is_not_put_before_texts(tiny: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    modules = [Transformer(tiny), Pooling(64)]
    modules[0].tokenizer.pad_token = modules[0].tokenizer.eos_token
    SentenceTransformer(modules=modules).save(str(tmp_path / "plain"))
    asks = SentenceTransformer(modules=modules, prompts={"query": "Alien Aliens: "}, default_prompt_name="query")
    asks.save(str(tmp_path / "asks"))
    texts = texts_of(UNEQUAL)
    assert np.abs(asks.encode(texts) - asks.encode(texts, prompt="")).max() > 1e-2
    plain, asked = (embed_items(UNEQUAL, EmbeddingSettings(model=str(tmp_path / name))) for name in ("plain", "asks"))
    assert asked.tobytes() == plain.tobytes()


@pytest.mark.parametrize(("pooling", "side"), [("mean", "left"), ("last", "left")])
def test_a_plain_hugging_face_folder_is_pooled_without_its_padding(
    tiny: str, tmp_path: Path, pooling: embed.Pooling, side: str
) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((Path(tiny) / "tokenizer_config.json").read_text())
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(config | {"padding_side": side}))
    settings = EmbeddingSettings(model=str(tmp_path / "model"), pooling=pooling, normalize=False)
    expected = reference(tiny, texts_of(UNEQUAL), pooling)
    np.testing.assert_allclose(embed_items(UNEQUAL, settings), expected, atol=1e-5)
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(embed_items(UNEQUAL, replace(settings, normalize=True)), unit, atol=1e-5)


def test_a_model_without_pooling_is_averaged_and_texts_are_cut_to_max_tokens(tiny: str) -> None:
    settings = EmbeddingSettings(model=tiny, normalize=False)
    whole = embed_items(UNEQUAL, settings)
    np.testing.assert_allclose(whole, reference(tiny, texts_of(UNEQUAL), "mean"), atol=1e-5)
    cut = embed_items(UNEQUAL, replace(settings, max_tokens=8))
    np.testing.assert_allclose(cut, reference(tiny, texts_of(UNEQUAL), "mean", max_tokens=8), atol=1e-5)
    assert np.abs(cut - whole).max() > 1e-2


def test_averaged_is_the_mean_of_the_vectors_of_the_fields_an_item_has(tiny: str) -> None:
    items = [Item("Brazil", brand="Fox"), HEAT, Item("Jaws")]
    settings = EmbeddingSettings(
        model=tiny, pooling="mean", fields=("title", "brand", "description"), combine="averaged", normalize=False
    )
    brazil, fox, heat, warner, heist, jaws = reference(
        tiny, ["Brazil.", "Fox.", "Heat.", "Warner.", "A heist.", "Jaws."], "mean"
    )
    expected = np.stack([(brazil + fox) / 2, (heat + warner + heist) / 3, jaws])
    np.testing.assert_allclose(embed_items(items, settings), expected, atol=1e-5)
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(embed_items(items, replace(settings, normalize=True)), unit, atol=1e-5)


def test_vectors_are_computed_once_per_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(embed, "embed_items", lambda items, _: calls.append(items) or np.ones((len(items), 2), "f4"))
    folder = DataFolder(tmp_path, "toy")
    first = cached_embeddings(folder, UNEQUAL)
    assert cached_embeddings(folder, UNEQUAL).tobytes() == first.tobytes()
    assert len(calls) == 1
    [cache] = tmp_path.iterdir()
    for torn in (np.ones((len(UNEQUAL) - 1, 2)), np.full((len(UNEQUAL), 2), np.nan), np.ones(len(UNEQUAL))):
        np.save(cache, torn)
        assert cached_embeddings(folder, UNEQUAL).tobytes() == first.tobytes()
    cache.write_bytes(b"torn")
    assert cached_embeddings(folder, UNEQUAL).tobytes() == first.tobytes()
    cached_embeddings(folder, UNEQUAL[::-1])
    assert len(calls) == 6
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(
        f"toy.text-emb-{fingerprint(items)[:12]}.npy" for items in (UNEQUAL, UNEQUAL[::-1])
    )


def test_the_fingerprint_tells_texts_their_order_models_and_settings_apart(tmp_path: Path) -> None:
    def of(*titles: str, **given: object) -> str:
        return fingerprint([Item(title, "about") for title in titles], replace(DEFAULT_SETTINGS, **given))  # type: ignore[arg-type]

    (tmp_path / "config.json").write_text("{}")
    before = of("a", "b", model=str(tmp_path))
    (tmp_path / "config.json").write_text("{ }")  # another model in the same folder
    keys = [of("a", "b"), of("b", "a"), of("ab"), of("a", "b", model="other"), of("a", "b", combine="averaged")]
    keys += [of("a", "b", normalize=False), of("a", "b", max_tokens=9), before, of("a", "b", model=str(tmp_path))]
    assert len(set(keys)) == len(keys)
    assert of("a", "b", batch_size=1, devices=("cpu", "cpu")) == of("a", "b")


def test_a_model_that_cannot_be_used_is_refused_with_the_reason(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, file, change in (
        ("cut", "model.safetensors", lambda old: old[: len(old) // 2]),
        ("wide", "config.json", lambda old: json.dumps(json.loads(old) | {"hidden_size": 32}).encode()),
    ):
        shutil.copytree(tiny, tmp_path / name)
        (tmp_path / name / file).write_bytes(change((Path(tiny) / file).read_bytes()))
    shutil.copytree(tiny, tmp_path / "mute", ignore=shutil.ignore_patterns("tokenizer*"))
    for model, message in {
        str(tmp_path / "nowhere"): "check the name and the network",
        str(tmp_path / "empty"): "cannot be loaded as an embedding model .*; check its files",
        str(tmp_path / "cut"): "cannot be loaded as an embedding model .*; check its files",
        str(tmp_path / "wide"): "cannot be loaded as an embedding model .*; check its files",
        str(tmp_path / "mute"): "has no tokenizer that knows a word",
    }.items():
        with pytest.raises(InputError, match=message) as raised:
            load_encoder(EmbeddingSettings(model=model))
        assert "\n" not in str(raised.value)


def test_a_model_without_transformer_has_a_pooling_of_its_own_alone(tiny: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from transformers import AutoTokenizer

    words = StaticEmbedding(AutoTokenizer.from_pretrained(tiny).backend_tokenizer, embedding_dim=8)
    SentenceTransformer(modules=[words.half()]).save(str(tmp_path))
    assert embed_items(UNEQUAL, EmbeddingSettings(model=str(tmp_path))).shape == (5, 8)
    with pytest.raises(InputError, match="StaticEmbedding is no transformer; choose pooling: model"):
        load_encoder(EmbeddingSettings(model=str(tmp_path), pooling="mean"))


def test_vectors_that_are_not_finite_are_refused(tiny: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    torch.nn.init.constant_(model.model.norm.weight, torch.inf)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="vectors that are not finite; choose another model"):
        embed_items(UNEQUAL, EmbeddingSettings(model=str(tmp_path / "model")))


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "OFFLINE_PACKAGE", "no_such_package_at_all")
    with pytest.raises(InputError, match="pip install"):
        default_model()
