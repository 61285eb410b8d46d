import pytest
import torch
from assets import TITLES
from safetensors.torch import load_file
from small_data import make_data
from transformers import Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from data_processing.sft.mix import MixOptions, write_mix
from gream_verl.cli.model import model_app
from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, write_json
from gream_verl.model.tiny_model import train_tokenizer


def model(*words):
    result = CliRunner().invoke(model_app, [str(word) for word in words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def run(tmp_path):
    """A run with data and an index, and a pretrained base."""
    run = tmp_path / "[run]"
    make_data(run / "data", users=40)
    tokenizer = train_tokenizer(TITLES, 300)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return run


def test_a_tiny_model_learns_its_words_from_the_mix(run):
    data = make_data(run / "data", users=40)
    with pytest.raises(InputError, match="gream data mix"):
        model("tiny", run)
    write_mix(data, MixOptions({"seqrec": 20}))
    printed = model("tiny", run, "--hidden-size", 16, "--layers", 1)
    assert "parameters" in printed
    assert read_json(run / "model" / "config.json")["num_hidden_layers"] == 1


def test_a_model_is_extended_adapted_and_merged(run):
    base = run.parent / "base"
    assert "added" in model("extend", run, "--base", base)
    assert "token_rows" in model("adapter", run, "--rank", 2)
    config = read_json(run / "adapter" / "adapter_config.json")
    assert config["target_modules"] == sorted(config["target_modules"])
    (run / "adapter").rename(run / "sft-lora")  # an untrained adapter changes nothing
    model("merge", run)
    record = read_json(run / "model" / "semantic_ids.json")
    assert read_json(run / "sft" / "semantic_ids.json") == {**record, "merged": str(run / "sft-lora")}
    assert (run / "sft" / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()

    before = load_file(run / "model" / "model.safetensors")
    for command in (["extend", run, "--base", base], ["merge", run]):
        with pytest.raises(InputError, match="--overwrite"):
            model(*command)
        model(*command, "--overwrite")
    after = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
    model("extend", run, "--base", base, "--overwrite", "--seed", 1)
    assert not torch.equal(
        load_file(run / "model" / "model.safetensors")["model.embed_tokens.weight"], before["model.embed_tokens.weight"]
    )


def test_an_adapter_that_does_not_fit_is_refused(run):
    model("extend", run, "--base", run.parent / "base")
    model("adapter", run, "--rank", 2)
    config = read_json(run / "adapter" / "adapter_config.json")
    rows = "trainable_token_indices"
    for saved, sentence in (
        (config | {rows: None}, "trains no rows of SID tokens"),
        ([], "trains no rows of SID tokens"),
        (config | {rows: {"embed_tokens": [3]}}, "does not train the SID tokens"),
        (config | {"base_model_name_or_path": str(run.parent / "base")}, "does not train the SID tokens"),
        (config | {"base_model_name_or_path": str(run / "absent")}, "cannot be loaded"),
        (config | {"r": 3}, "cannot be loaded"),
    ):
        write_json(run / "adapter" / "adapter_config.json", saved)
        with pytest.raises(InputError, match=sentence):
            model("merge", run, "--adapter", run / "adapter")
    assert not (run / "sft").exists()
    with pytest.raises(InputError, match="is an input"):
        model("extend", run, "--base", run / "model", "--overwrite")
