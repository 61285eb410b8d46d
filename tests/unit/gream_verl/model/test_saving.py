import errno
import os
import resource
import shutil
from pathlib import Path

import pytest
import torch
from assets import make_index, make_tiny_model, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, write_json
from gream_verl.model.folder import MANIFEST, load_model, load_tokenizer, new_folder, save_model


def write(output, text="one", command="extend", inputs=(), replace=False):
    with new_folder(output, command, inputs, replace=replace) as folder:
        (folder / "model.safetensors").write_text(text)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def out(tmp_path):
    write(tmp_path / "out")
    return tmp_path / "out"


def test_a_new_or_empty_folder_is_written_with_a_manifest(tmp_path):
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "empty", tmp_path / "deep" / "new"):
        write(output)
        assert names(output) == [MANIFEST, "model.safetensors"]
        assert read_json(output / MANIFEST)["command"] == "extend"
    assert names(tmp_path) == ["deep", "empty"]


def test_a_folder_is_replaced_by_the_command_that_wrote_it_when_asked_to(out):
    with pytest.raises(InputError, match="--overwrite"):
        write(out, "two")
    with pytest.raises(InputError, match="`gream model merge` did not write it"):
        write(out, "two", command="merge", replace=True)
    assert (out / "model.safetensors").read_text() == "one"
    write(out, "two", replace=True)
    assert (out / "model.safetensors").read_text() == "two"
    assert names(out.parent) == ["out"]


@pytest.mark.parametrize("change", ["added", "folder", "same size", "gone", "manifest"])
def test_a_folder_that_is_not_as_written_is_kept(out, change):
    weights = out / "model.safetensors"
    if change == "added":
        (out / "notes.txt").write_text("dear")
    elif change == "folder":
        (out / "checkpoint-4").mkdir()
    elif change == "same size":
        times = weights.stat()
        weights.write_text("two")
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    elif change == "gone":
        weights.rename(out / "other.safetensors")
    else:
        write_json(out / MANIFEST, [])
    named = {"added": "notes.txt", "folder": "checkpoint-4", "manifest": "did not write it"}
    before = names(out)
    with pytest.raises(InputError, match=rf"{named.get(change, 'model.safetensors')}.*choose another folder"):
        write(out, "three", replace=True)
    assert names(out) == before


def test_inputs_the_current_folder_and_files_are_never_an_output(out, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(out)
    (tmp_path / "file").write_text("dear")
    with pytest.raises(InputError, match="is an input"):
        write(tmp_path / "link", inputs=[out], replace=True)
    with pytest.raises(InputError, match="is a file"):
        write(tmp_path / "file", replace=True)
    with pytest.raises(InputError, match="cannot be written"):
        write(tmp_path / "file" / "x", replace=True)
    monkeypatch.chdir(out)
    with pytest.raises(InputError, match="current folder"):
        write(tmp_path / "out" / "..", inputs=[tmp_path], replace=True)
    with pytest.raises(InputError, match="current folder"):
        write(tmp_path / "out", replace=True)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "link", "two", replace=True)
    assert (tmp_path / "link").is_symlink()
    assert (out / "model.safetensors").read_text() == "two"


def test_what_appears_during_the_work_is_kept(out):
    with (
        pytest.raises(InputError, match=r"notes\.txt"),
        new_folder(out, "extend", replace=True) as folder,
    ):
        (folder / "model.safetensors").write_text("two")
        (out / "notes.txt").write_text("dear")
    assert (out / "model.safetensors").read_text() == "one"
    assert names(out.parent) == ["out"]


def test_one_process_writes_at_a_time(out):
    with (
        new_folder(out, "extend", replace=True) as folder,
        pytest.raises(InputError, match="another process"),
    ):
        write(out, replace=True)
    assert not folder.exists()


def test_what_a_kill_left_is_cleared_and_what_it_moved_away_comes_back(out):
    work = out.with_name(".out.new")
    (work / "new").mkdir(parents=True)
    (work / "new" / "model.safetensors").write_text("torn")
    out.rename(work / "previous")  # killed between the two renames
    with pytest.raises(InputError, match="--overwrite"):
        write(out)
    assert (out / "model.safetensors").read_text() == "one"
    assert names(out.parent) == ["out"]


def test_a_failed_rename_puts_the_old_folder_back(out, monkeypatch):
    rename = Path.rename

    def fail_last(path, target):
        if path.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fail_last)
    with pytest.raises(InputError, match="cannot be written"):
        write(out, "two", replace=True)
    assert (out / "model.safetensors").read_text() == "one"
    assert names(out.parent) == ["out"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "model", make_index())


def test_a_full_disk_is_one_sentence(model, tmp_path):
    loaded, tokenizer = load_model(model), load_tokenizer(model)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with (
            pytest.raises(InputError, match="out: cannot be written"),
            new_folder(tmp_path / "out", "extend", replace=False) as folder,
        ):
            save_model(loaded, tokenizer, folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == []


def test_a_model_that_is_not_whole_is_refused(model, tmp_path):
    for name in ("less", "torn", "wrong", "mute"):
        shutil.copytree(model, tmp_path / name)
    weights = load_file(model / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "less" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"1 weights are missing, model.layers.1.mlp.up_proj.weight"):
        load_model(tmp_path / "less")
    whole = (model / "model.safetensors").read_bytes()
    (tmp_path / "torn" / "model.safetensors").write_bytes(whole[:-9])
    with pytest.raises(InputError, match="torn: cannot be loaded"):
        load_model(tmp_path / "torn")
    write_json(tmp_path / "wrong" / "config.json", {"model_type": "qwen3", "hidden_size": "wide"})
    with pytest.raises(InputError, match="wrong: cannot be loaded"):
        load_tokenizer(tmp_path / "wrong")
    for file in (tmp_path / "mute").glob("tokenizer*"):
        file.unlink()
    with pytest.raises(InputError, match="holds no tokenizer"):
        load_tokenizer(tmp_path / "mute")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no config\.json; not a model folder"):
        load_tokenizer(tmp_path / "empty")


def test_number_format_and_generation_config_are_kept(tmp_path):
    torch.manual_seed(0)
    tokenizer = make_tokenizer(["Heat"], make_index())
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), **sizes)).to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    refused = '{"do_sample": false,  "temperature": 0.6}'  # transformers loads it and does not save it
    (tmp_path / "base" / "generation_config.json").write_text(refused)
    (tmp_path / "copy").mkdir()
    save_model(load_model(tmp_path / "base"), tokenizer, tmp_path / "copy", str(tmp_path / "base"))
    assert (tmp_path / "copy" / "generation_config.json").read_text() == refused
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype="auto").dtype == torch.bfloat16
