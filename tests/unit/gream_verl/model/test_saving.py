import resource

import pytest
import torch
from assets import make_index, make_tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM

from gream_verl.core.errors import InputError
from gream_verl.model.loading import load_model
from gream_verl.model.saving import MARKER, new_folder, save_model


def write(output, text="one", command="extend", inputs=(), replace=False):
    with new_folder(output, command, inputs, replace=replace) as folder:
        (folder / "model.safetensors").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def out(tmp_path):
    write(tmp_path / "out")
    return tmp_path / "out"


def test_a_new_or_empty_folder_is_written_with_a_marker(tmp_path):
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "empty", tmp_path / "deep" / "new"):
        write(output)
        assert names(output) == [MARKER, "model.safetensors"]
        assert (output / MARKER).read_text() == "extend"
    assert names(tmp_path) == ["deep", "empty"]


def test_a_folder_is_replaced_only_by_the_command_that_wrote_it_and_when_asked_to(out):
    with pytest.raises(InputError, match="--overwrite"):
        write(out, "two")
    with pytest.raises(InputError, match="`gream model merge` did not write it"):
        write(out, "two", command="merge", replace=True)
    assert (out / "model.safetensors").read_text() == "one"
    write(out, "two", replace=True)
    assert (out / "model.safetensors").read_text() == "two"
    assert names(out.parent) == ["out"]


def test_inputs_the_current_folder_and_other_files_are_never_an_output(out, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "file").write_text("dear")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("dear")
    with pytest.raises(InputError, match="is an input"):
        write(tmp_path / "link", inputs=[out], replace=True)
    for kept in ("file", "mine"):
        with pytest.raises(InputError, match="did not write it"):
            write(tmp_path / kept, replace=True)
    with pytest.raises(InputError, match="cannot be written"):
        write(tmp_path / "file" / "x")
    monkeypatch.chdir(out)
    with pytest.raises(InputError, match="current folder"):
        write(out, replace=True)
    assert (tmp_path / "file").read_text() == (tmp_path / "mine" / "notes").read_text() == "dear"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tokenizer = make_tokenizer(["Heat"], make_index())
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **sizes)).to(torch.bfloat16), tokenizer


def test_a_failure_leaves_the_old_folder_and_nothing_else(out, model):
    with pytest.raises(KeyError), new_folder(out, "extend", replace=True) as folder:
        (folder / "model.safetensors").write_text("two")
        raise KeyError
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # as a full disk
    try:
        with (
            pytest.raises(InputError, match="out: cannot be written"),
            new_folder(out, "extend", replace=True) as folder,
        ):
            save_model(*model, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (out / "model.safetensors").read_text() == "one"
    assert names(out.parent) == ["out"]


def test_number_format_and_generation_config_are_kept(tmp_path, model):
    base, tokenizer = model
    base.save_pretrained(tmp_path / "base")
    refused = '{"do_sample": false,  "temperature": 0.6}'  # transformers loads it and does not save it
    (tmp_path / "base" / "generation_config.json").write_text(refused)
    (tmp_path / "copy").mkdir()
    save_model(load_model(tmp_path / "base"), tokenizer, tmp_path / "copy", tmp_path / "base")
    assert (tmp_path / "copy" / "generation_config.json").read_text() == refused
    assert load_model(tmp_path / "copy").dtype == torch.bfloat16
