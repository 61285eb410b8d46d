from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from assets import make_index, make_tiny_model
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import data_processing.indexing.embed as embed
from data_processing.indexing.embed import (
    FIELDS,
    EmbeddingSettings,
    cache_path,
    cached_embeddings,
    default_model,
    embed_texts,
    fingerprint,
    item_text,
    item_texts,
    load_encoder,
    stored_embeddings,
)
from gream_verl.cli.index import index_app
from gream_verl.core.data_folder import DataFolder, Item
from gream_verl.core.errors import InputError

TITLES = ["Alien (1979). Horror, Sci-Fi.", "Aliens (1986). Action, Sci-Fi.", "Clueless (1995). Comedy."]
UNEQUAL = [" ".join(["Toy Story"] * length) + f" number {length}" for length in (9, 1, 20, 4, 13)]
HEAT = Item("Heat", description="A heist.", brand="Warner", categories=("Action", "Crime"))
ITEMS = [Item(title, "x" * 99 * (row % 3), categories=("Film",) * (row % 2)) for row, title in enumerate(UNEQUAL)]

EMBED_IN_A_CHILD = """
import sys
from test_embed import catalogue
from data_processing.indexing.embed import EmbeddingSettings, cached_embeddings
cached_embeddings(catalogue(), sys.argv[1], EmbeddingSettings(model=sys.argv[2]), shard_items=2)
"""


def catalogue() -> list[Item]:
    return [Item(f"Film {' and more' * (row % 7)} {row}") for row in range(601)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 whose tokenizer has no padding token: no sentence-transformers model."""
    folder = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", make_index(), texts=TITLES)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def minilm() -> None:
    try:
        default_model()
    except InputError as missing:
        pytest.skip(str(missing))


def shards_of(cache: Path, items: list[Item], settings: EmbeddingSettings) -> Path:
    return cache.with_name(f"{cache.stem}-{fingerprint(items, settings)[:12]}")


def reference(folder: Path, texts: list[str], pooling: str, max_tokens: int = 64) -> np.ndarray:
    """Each text by itself, so that there is no padding."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    vectors = []
    with torch.inference_mode():
        for text in texts:
            hidden = model(torch.tensor([tokenizer(text).input_ids[:max_tokens]])).last_hidden_state[0]
            vectors.append(hidden.mean(dim=0) if pooling == "mean" else hidden[-1])
    return torch.stack(vectors).numpy()


def test_text_holds_title_categories_and_the_start_of_the_description() -> None:
    item = Item("Heat", description="x" * 500, categories=("Action", "Crime"))
    assert item_text(item) == f"Heat. Action, Crime. {'x' * 200}."
    assert item_text(Item("Seven Ltd.")) == "Seven Ltd."


def test_fields_are_taken_in_the_order_asked_for_and_an_item_without_any_gives_its_title() -> None:
    settings = EmbeddingSettings(fields=("brand", "title", "description"), description_characters=3)
    assert item_texts(HEAT, settings) == ["Warner. Heat. A h."]
    assert item_texts(Item("Heat", brand=" "), EmbeddingSettings(fields=("brand", "description"))) == ["Heat."]
    assert item_texts(HEAT, EmbeddingSettings(description_characters=0)) == ["Heat. Action, Crime."]


def test_half_a_character_in_a_title_becomes_a_question_mark(tiny: Path) -> None:
    texts = item_texts(Item("Heat \ud83d", brand="\U0001f600"), EmbeddingSettings(fields=("title", "brand")))
    assert texts == ["Heat ?. \U0001f600."]
    assert embed_texts(texts, EmbeddingSettings(model=tiny)).shape == (1, 64)


@given(
    st.builds(Item, st.text(min_size=1), st.text(), st.text(), st.lists(st.text(), max_size=2).map(tuple)),
    st.lists(st.sampled_from(FIELDS), unique=True, min_size=1).map(tuple),
)
def test_the_joined_text_is_that_of_the_fields_and_never_empty(item: Item, fields: tuple[str, ...]) -> None:
    alone = item_texts(item, EmbeddingSettings(fields=fields, combine="averaged"))
    assert item_texts(item, EmbeddingSettings(fields=fields)) == [" ".join(alone)]
    assert 1 <= len(alone) <= len(fields)
    assert all(alone)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"fields": ("title", "categorys")}, "'categorys' is no field of an item; did you mean 'categories'?"),
        ({"fields": ("price",)}, "'price' is no field of an item; choose from title, categories, description, brand"),
        ({"fields": ()}, "name each field to embed once"),
        ({"fields": ("title", "title")}, "name each field to embed once"),
        ({"pooling": "men"}, "'men' is no pooling; did you mean 'mean'?"),
        ({"combine": "join"}, "did you mean 'joined'?"),
        ({"max_tokens": 7}, "max_tokens 7: give 8 or more"),
        ({"description_characters": -1}, "description_characters -1: give 0 or more"),
        ({"batch_size": 0}, "batch_size 0: give 1 or more"),
    ],
)
def test_settings_that_cannot_be_used_are_one_clear_sentence(wrong: dict[str, object], sentence: str) -> None:
    with pytest.raises(InputError) as raised:
        EmbeddingSettings(**wrong)  # type: ignore[arg-type]
    assert sentence in str(raised.value)


@pytest.mark.usefixtures("minilm")
def test_similar_titles_are_closer_and_rows_have_length_one() -> None:
    vectors = embed_texts(TITLES)
    assert vectors.shape == (3, 384)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > similarity[0, 2] + 0.1


@pytest.mark.usefixtures("minilm")
def test_rows_keep_the_order_of_the_texts_whatever_their_lengths() -> None:
    together = embed_texts(UNEQUAL, EmbeddingSettings(batch_size=3))
    alone = np.concatenate([embed_texts([text]) for text in UNEQUAL])
    np.testing.assert_allclose(together, alone, atol=1e-5)


@pytest.mark.usefixtures("minilm")
def test_masked_mean_and_normalisation_of_ours_are_what_the_default_model_does_itself() -> None:
    np.testing.assert_allclose(embed_texts(UNEQUAL, EmbeddingSettings(pooling="mean")), embed_texts(UNEQUAL), atol=1e-6)


def test_a_batch_holds_texts_of_like_length(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    widths = []

    def watched(settings: EmbeddingSettings) -> object:
        encoder = load_encoder(settings)
        encoder[0].register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0]["input_ids"].shape[1]))
        return encoder

    monkeypatch.setattr(embed, "load_encoder", watched)
    embed_texts(UNEQUAL, EmbeddingSettings(model=tiny, batch_size=2, max_tokens=512))
    assert len(widths) == 3
    assert widths == sorted(widths, reverse=True)


def test_the_default_prompt_of_a_model_is_not_put_before_texts(tiny: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    modules = [Transformer(str(tiny)), Pooling(64)]
    modules[0].tokenizer.pad_token = modules[0].tokenizer.eos_token
    SentenceTransformer(modules=modules).save(str(tmp_path / "plain"))
    asks = SentenceTransformer(modules=modules, prompts={"query": "Alien Aliens: "}, default_prompt_name="query")
    asks.save(str(tmp_path / "asks"))
    assert np.abs(asks.encode(TITLES) - asks.encode(TITLES, prompt="")).max() > 1e-2
    plain = embed_texts(TITLES, EmbeddingSettings(model=tmp_path / "plain"))
    assert embed_texts(TITLES, EmbeddingSettings(model=tmp_path / "asks")).tobytes() == plain.tobytes()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_plain_hugging_face_folder_is_pooled_without_its_padding(
    tiny: Path, tmp_path: Path, pooling: str, side: str
) -> None:
    shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((tiny / "tokenizer_config.json").read_text())
    (tmp_path / "model/tokenizer_config.json").write_text(json.dumps(config | {"padding_side": side}))
    settings = EmbeddingSettings(model=tmp_path / "model", pooling=pooling, normalize=False)  # type: ignore[arg-type]
    expected = reference(tiny, UNEQUAL, pooling)
    np.testing.assert_allclose(embed_texts(UNEQUAL, settings), expected, atol=1e-5)
    unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(embed_texts(UNEQUAL, replace(settings, normalize=True)), unit, atol=1e-5)


def test_a_model_without_pooling_of_its_own_is_pooled_as_the_authors_do(tiny: Path) -> None:
    vectors = embed_texts(UNEQUAL, EmbeddingSettings(model=tiny, normalize=False))
    np.testing.assert_allclose(vectors, reference(tiny, UNEQUAL, "mean"), atol=1e-5)


def test_texts_are_cut_to_max_tokens(tiny: Path) -> None:
    settings = EmbeddingSettings(model=tiny, pooling="mean", max_tokens=8, normalize=False)
    vectors = embed_texts(UNEQUAL, settings)
    np.testing.assert_allclose(vectors, reference(tiny, UNEQUAL, "mean", max_tokens=8), atol=1e-5)
    assert np.abs(vectors - reference(tiny, UNEQUAL, "mean")).max() > 1e-2


def test_averaged_is_the_mean_of_the_vectors_of_the_fields_an_item_has(tiny: Path, tmp_path: Path) -> None:
    items = [Item("Brazil", brand="Fox"), HEAT, Item("Jaws")]
    settings = EmbeddingSettings(
        model=tiny, pooling="mean", fields=("title", "brand", "description"), combine="averaged", normalize=False
    )
    of = {text: vector for item in items for text, vector in zip(
        item_texts(item, settings), reference(tiny, item_texts(item, settings), "mean"), strict=True
    )}  # fmt: skip
    brazil, heat = (of["Brazil."] + of["Fox."]) / 2, (of["Heat."] + of["Warner."] + of["A heist."]) / 3
    expected = np.stack([brazil, heat, of["Jaws."]])
    np.testing.assert_allclose(cached_embeddings(items, tmp_path / "a.npz", settings), expected, atol=1e-5)
    unit = cached_embeddings(items, tmp_path / "b.npz", replace(settings, normalize=True), shard_items=2)
    np.testing.assert_allclose(unit, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)


def test_the_cache_is_used_until_items_or_settings_change(tiny: Path, tmp_path: Path) -> None:
    cache, settings = tmp_path / "D.text-emb.npz", EmbeddingSettings(model=tiny)
    first = cached_embeddings(ITEMS, cache, settings)
    written = cache.stat().st_ino
    assert cached_embeddings(ITEMS, cache, replace(settings, batch_size=2)).tobytes() == first.tobytes()
    assert cache.stat().st_ino == written
    changed = cached_embeddings(ITEMS[::-1], cache, settings)
    np.testing.assert_allclose(changed, first[::-1], atol=1e-6)
    last = replace(settings, pooling="last")
    assert np.abs(cached_embeddings(ITEMS[::-1], cache, last) - changed).max() > 1e-2
    cache.write_bytes(b"PK\x03\x04 cut short")
    assert stored_embeddings(ITEMS, cache, settings) is None
    assert cached_embeddings(ITEMS, cache, settings).tobytes() == first.tobytes()
    assert [path.name for path in tmp_path.iterdir()] == [cache.name]


def test_the_size_of_a_shard_changes_rounding_only(tiny: Path, tmp_path: Path) -> None:
    settings = EmbeddingSettings(model=tiny)
    whole = cached_embeddings(ITEMS, tmp_path / "whole.npz", settings)
    for size in (1, 2, 5):
        parts = cached_embeddings(ITEMS, tmp_path / f"{size}.npz", settings, shard_items=size)
        np.testing.assert_allclose(parts, whole, atol=1e-6)


def test_every_settings_have_a_cache_of_their_own(tiny: Path, tmp_path: Path) -> None:
    folder, settings = DataFolder(tmp_path, "toy"), EmbeddingSettings(model=tiny)
    assert cache_path(folder).name == "toy.text-emb.npz"
    assert cache_path(folder, EmbeddingSettings(batch_size=1)) == cache_path(folder)
    others = [settings, replace(settings, pooling="last"), EmbeddingSettings(normalize=False)]
    assert len({cache_path(folder), *(cache_path(folder, other) for other in others)}) == 4
    assert cache_path(folder, settings) == cache_path(folder, replace(settings, model=str(tiny), batch_size=1))
    for other in others[:2] * 2:
        cached_embeddings(ITEMS, cache_path(folder, other), other)
    assert all(stored_embeddings(ITEMS, cache_path(folder, other), other) is not None for other in others[:2])


def test_embeddings_of_other_settings_at_the_same_time_stay_apart(tiny: Path, tmp_path: Path) -> None:
    mean, cache = EmbeddingSettings(model=tiny, pooling="mean"), tmp_path / "D.npz"
    shards = shards_of(cache, ITEMS, mean)
    shards.mkdir()
    np.save(shards / "00001-of-2-items.npy", np.full((2, 64), 7, np.float32))
    np.save(shards / "00001-of-3-items.npy", np.full((2, 64), 9, np.float32))
    for other in (replace(mean, pooling="last"), replace(mean, model=tmp_path / "titel")):
        with open(shards / "lock", "w") as running:
            fcntl.flock(running, fcntl.LOCK_EX)
            with pytest.raises(InputError, match=r"in use by another run; wait for it"):
                cached_embeddings(ITEMS, cache, mean, shard_items=2)
            if other.pooling == "last":
                assert (cached_embeddings(ITEMS, cache, other, shard_items=2) != 7).all()
            else:
                with pytest.raises(InputError, match="no such model folder"):
                    cached_embeddings(ITEMS, cache, other, shard_items=2)
    vectors = cached_embeddings(ITEMS, cache, mean, shard_items=3)
    assert (vectors == 9).all(axis=1).tolist() == [False, False, False, True, True]
    assert [path.name for path in tmp_path.iterdir()] == [cache.name]


def test_a_folder_that_cannot_be_made_is_one_clear_sentence(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cannot be written \(.*\); choose another folder"):
        cached_embeddings(ITEMS, tmp_path / "file/D.npz", EmbeddingSettings(model=tiny))


@pytest.mark.timeout(120)
def test_a_call_that_was_killed_goes_on_with_the_shards_that_are_finished(tiny: Path, tmp_path: Path) -> None:
    items, settings = catalogue(), EmbeddingSettings(model=str(tiny))
    undisturbed = cached_embeddings(items, tmp_path / "undisturbed.npz", settings, shard_items=2)
    shards = shards_of(tmp_path / "killed.npz", items, settings)
    command = [sys.executable, "-c", EMBED_IN_A_CHILD, str(tmp_path / "killed.npz"), str(tiny)]
    child = subprocess.Popen(command, cwd=Path(__file__).parent, env=_environment())
    deadline = time.monotonic() + 90
    while len(list(shards.glob("[0-9]*.npy"))) < 20:
        assert child.poll() is None, "the child ended by itself"
        assert time.monotonic() < deadline, "no shards"
        time.sleep(0.002)
    child.send_signal(signal.SIGKILL)
    child.wait(30)
    finished = sorted(path.name for path in shards.glob("[0-9]*.npy"))
    assert 20 <= len(finished) < 301
    assert not (tmp_path / "killed.npz").exists()

    # A mark in a finished shard is still there afterwards: that shard was not computed again. All others were.
    marks = shards_of(tmp_path / "marked.npz", items, settings)
    shutil.copytree(shards, marks)
    np.save(marks / finished[7], np.full((2, 64), 7, np.float32))
    marked = cached_embeddings(items, tmp_path / "marked.npz", settings, shard_items=2)
    assert (marked[14:16] == 7).all()
    assert np.delete(marked, [14, 15], axis=0).tobytes() == np.delete(undisturbed, [14, 15], axis=0).tobytes()

    resumed = cached_embeddings(items, tmp_path / "killed.npz", settings, shard_items=2)
    assert resumed.tobytes() == undisturbed.tobytes()
    assert (tmp_path / "killed.npz").read_bytes() == (tmp_path / "undisturbed.npz").read_bytes()
    assert not shards.exists()


def _environment() -> dict[str, str]:
    tests = Path(__file__).parent.parent
    return os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tests, tests.parent)))}


def test_a_broken_shard_is_one_clear_sentence(tiny: Path, tmp_path: Path) -> None:
    settings = EmbeddingSettings(model=tiny)
    shard = shards_of(tmp_path / "D.npz", ITEMS, settings) / "00001-of-2-items.npy"
    shard.parent.mkdir()
    shard.write_bytes(b"\x93NUMPY cut short")
    with pytest.raises(InputError, match=r"00001-of-2-items\.npy: is broken or gone .*; delete it and call again"):
        cached_embeddings(ITEMS, tmp_path / "D.npz", settings, shard_items=2)
    shard.unlink()
    with pytest.raises(InputError, match=r"00000-of-2-items\.npy: is broken or gone"):
        embed._gather(tmp_path, len(ITEMS), 2)
    assert len(cached_embeddings(ITEMS, tmp_path / "D.npz", settings, shard_items=2)) == len(ITEMS)


def test_the_fingerprint_tells_texts_their_order_models_and_settings_apart(tmp_path: Path) -> None:
    def of(*titles: str, **settings: object) -> str:
        return fingerprint([Item(title, "about") for title in titles], EmbeddingSettings(**settings))  # type: ignore[arg-type]

    averaged = {"fields": ("title", "description"), "combine": "averaged"}
    (tmp_path / "config.json").write_text("{}")
    before = of("a", "b", model=tmp_path)
    (tmp_path / "config.json").write_text("{ }")  # another model in the same folder
    whole = of("a", "b", model=tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text("{}")
    pooled = of("a", "b", model=tmp_path)
    (tmp_path / "1_Pooling/config.json").write_text("{ }")
    (tmp_path / ".git").mkdir()
    here = of("a", "b", model=tmp_path)
    (tmp_path / ".git/index").write_text("")
    assert of("a", "b", model=tmp_path) == here
    keys = [of("a", "b"), of("b", "a"), of("ab"), of("a", "b", model="other"), of("a", "b", **averaged)]
    keys += [of("a", "b", normalize=False), of("a", "b", max_tokens=9), before, whole, pooled, here]
    assert len(set(keys)) == len(keys)
    assert of("a", "b", batch_size=1) == of("a", "b")


def test_no_items_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no items to embed"):
        cached_embeddings([], tmp_path / "D.npz")


def test_a_missing_model_folder_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such model folder; give the folder or hub name"):
        embed_texts(["a"], EmbeddingSettings(model=tmp_path / "nowhere"))


def test_a_folder_that_is_no_model_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be loaded as an embedding model .*; check its files") as raised:
        embed_texts(["a"], EmbeddingSettings(model=tmp_path))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("weights", [True, False])
def test_a_model_that_is_cut_short_or_does_not_fit_is_one_clear_sentence(
    tiny: Path, tmp_path: Path, weights: bool
) -> None:
    for name, file, change in (
        ("cut", "model.safetensors", lambda old: old[: len(old) // 2]),
        ("wide", "config.json", lambda old: json.dumps(json.loads(old) | {"hidden_size": 32}).encode()),
    ):
        shutil.copytree(tiny, tmp_path / name)
        (tmp_path / name / file).write_bytes(change((tiny / file).read_bytes()))
        with pytest.raises(InputError, match=rf"{name}: cannot be loaded as an embedding model .*; check its files"):
            load_encoder(EmbeddingSettings(model=tmp_path / name), weights=weights)


def test_a_model_without_tokenizer_is_one_clear_sentence(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny, tmp_path / "model", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(
        InputError, match="has no tokenizer that knows a word; check that its tokenizer files are there"
    ):
        embed_texts(["a"], EmbeddingSettings(model=tmp_path / "model"))


def test_a_name_that_no_hub_gives_names_what_to_check() -> None:
    with pytest.raises(InputError, match="check the name and the network, or give a folder"):
        load_encoder(EmbeddingSettings(model="no name/of a/hub model"))


def test_a_model_without_transformer_is_run_in_our_precision_and_cannot_be_pooled_anew(
    tiny: Path, tmp_path: Path
) -> None:
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from transformers import AutoTokenizer

    words = StaticEmbedding(AutoTokenizer.from_pretrained(tiny).backend_tokenizer, embedding_dim=8)
    SentenceTransformer(modules=[words.half()]).save(str(tmp_path))
    assert embed_texts(TITLES, EmbeddingSettings(model=tmp_path)).shape == (3, 8)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    assert {one.dtype for one in load_encoder(EmbeddingSettings(model=tmp_path)).parameters()} == {dtype}
    with pytest.raises(InputError, match="StaticEmbedding is no transformer; use the pooling 'model'"):
        embed_texts(TITLES, EmbeddingSettings(model=tmp_path, pooling="mean"))


def test_vectors_that_are_not_finite_are_refused(tiny: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tiny)
    torch.nn.init.constant_(model.model.norm.weight, torch.inf)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="vectors that are not finite; choose another model"):
        cached_embeddings(ITEMS, tmp_path / "D.npz", EmbeddingSettings(model=tmp_path / "model"))
    assert not (tmp_path / "D.npz").exists()


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed, "OFFLINE_PACKAGE", "no_such_package_at_all")
    with pytest.raises(InputError, match="pip install"):
        default_model()


def test_the_command_embeds_once_and_says_what_it_did(tiny: Path, tmp_path: Path) -> None:
    folder = DataFolder(tmp_path, "toy")
    folder.item.write_text(json.dumps({str(row): vars(item) for row, item in enumerate(ITEMS)}))
    command = ["embed", "--data", str(tmp_path), "--dataset", "toy", "--model", str(tiny), "--pooling", "mean"]
    command += ["--field", "title", "--field", "description", "--combine", "averaged", "--max-tokens", "32"]
    command += ["--description-characters", "150", "--no-normalize"]
    first, second = (CliRunner().invoke(index_app, command, catch_exceptions=False).output for _ in range(2))
    settings = EmbeddingSettings(
        model=str(tiny), pooling="mean", fields=("title", "description"), combine="averaged", max_tokens=32,
        description_characters=150, normalize=False,
    )  # fmt: skip
    assert stored_embeddings(ITEMS, cache_path(folder, settings), settings) is not None
    assert "items a second" in first
    assert "kept from an earlier call" in second
    wrong = CliRunner().invoke(index_app, [*command, "--field", "titel"])
    assert "did you mean 'title'?" in str(wrong.exception)
    for option, value in {"--max-tokens": "7", "--batch-size": "0", "--description-characters": "-1"}.items():
        refused = CliRunner(env={"COLUMNS": "200"}).invoke(index_app, [*command, option, value])
        assert refused.exit_code == 2
        assert f"'{option}'" in refused.output
