from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from assets import make_index, make_tiny_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, write_json, write_text
from gream_verl.model.loading import load_decoding_config, load_model, load_tokenizer, resolve_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tiny_model(tmp_path / "model", make_index())


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({"layer_types": ["full_attention", "sliding_attention"], "use_sliding_window": True, "sliding_window": 8},
         "sliding_attention"),
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"model_type": "mistral", "architectures": ["MistralForCausalLM"], "layer_types": None, "sliding_window": 8},
         "sliding_attention"),
    ],
)  # fmt: skip
def test_a_model_without_full_attention_in_each_layer_is_refused(
    folder: Path, values: dict[str, Any], kind: str
) -> None:
    tokenizer = load_tokenizer(folder)
    load_decoding_config(folder, tokenizer)
    write_json(folder / "config.json", read_json(folder / "config.json") | values)
    with pytest.raises(InputError, match=rf"layers of {kind}; take a model with full attention"):
        load_decoding_config(folder, tokenizer)


def test_a_tokenizer_of_a_larger_model_is_refused(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<more_{number}>" for number in range(read_json(folder / "config.json")["vocab_size"])])
    with pytest.raises(InputError, match="has no row in the model; copy both from the same checkpoint"):
        load_decoding_config(folder, tokenizer)


def test_a_checkpoint_in_half_precision_without_a_padding_token_is_taken(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16").save_pretrained(folder)
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        kept = {key: value for key, value in json.loads((folder / name).read_text()).items() if "pad_token" not in key}
        write_json(folder / name, kept)
    model, tokenizer = load_model(folder, inference=True), load_tokenizer(folder)
    assert tokenizer.pad_token is None
    assert model.dtype == (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    assert load_model(folder).dtype == torch.bfloat16


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def no_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def tekken_alone(folder: Path) -> None:
    no_tokenizer(folder)
    tokens = [{"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode()} for byte in range(256)]
    sizes = {"num_vocab_tokens": 256, "default_vocab_size": 356, "default_num_special_tokens": 100}
    config = {"pattern": ".", "version": "v3", **sizes}
    write_json(folder / "tekken.json", {"config": config, "vocab": [{**token, "token_str": None} for token in tokens]})
    write_json(folder / "config.json", read_json(folder / "config.json") | {"model_type": "mistral"})


def cut_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"cut short")


def weight_missing(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (no_config, "no Hugging Face model"),
        (no_tokenizer, "tokenizer"),
        (tekken_alone, "its tokenizer has no tokenizer.json"),
        (cut_weights, "cannot be loaded"),
        (weight_missing, "1 weights are missing, such as model.norm.weight"),
    ],
)
def test_a_damaged_model_is_refused(folder: Path, damage: Any, sentence: str) -> None:
    damage(folder)
    with pytest.raises(InputError, match=sentence):
        load_tokenizer(folder)
        load_model(folder)


def test_a_checkpoint_of_verl_stands_for_its_latest_export(tmp_path: Path) -> None:
    exported = tmp_path / "srpo" / "global_step_4" / "actor" / "huggingface"
    write_text(tmp_path / "srpo" / "latest_checkpointed_iteration.txt", "4")
    with pytest.raises(InputError, match="no exported model"):
        resolve_model(tmp_path / "srpo")
    for name in ("config.json", "model.safetensors"):
        write_text(exported / name, "")
    assert resolve_model(tmp_path / "srpo") == resolve_model(exported) == exported
    assert resolve_model(exported.parents[1]) == exported  # one step
    (tmp_path / "srpo" / "global_step_2").mkdir()
    with pytest.raises(InputError, match="take a later step"):
        resolve_model(tmp_path / "srpo" / "global_step_2")
    with pytest.raises(InputError, match="choose a model or verl's checkpoints"):
        resolve_model(tmp_path)
