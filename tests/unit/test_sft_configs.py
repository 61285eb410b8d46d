import json
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "sft_configs"
# What may differ between the tiny model on a CPU and Qwen3-4B on GPUs; everything else must not drift apart.
DIFFERENCES = {
    "model_name_or_path", "train_on_prompt", "deepspeed", "dataset_dir", "dataset", "cutoff_len", "learning_rate",
    "preprocessing_num_workers", "per_device_train_batch_size", "gradient_accumulation_steps", "warmup_steps",
    "use_cpu", "bf16", "flash_attn", "disable_gradient_checkpointing", "output_dir", "save_steps", "save_total_limit",
}  # fmt: skip


def load(name):
    return yaml.safe_load((CONFIGS / name).read_text())


@pytest.mark.parametrize("name", ["tiny_cpu.yaml", "qwen3_4b_mix.yaml"])
def test_llamafactory_accepts_the_arguments(name, tmp_path, monkeypatch):
    from llamafactory.hparams import get_train_args

    monkeypatch.chdir(tmp_path)
    arguments = load(name) | {"output_dir": str(tmp_path / "out")}
    # What needs an accelerator or deepspeed itself is left out here; its JSON is checked below.
    arguments.pop("deepspeed", None)
    arguments["use_cpu"] = True
    model, data, training, finetuning, _ = get_train_args(arguments)
    assert data.template == "qwen3_nothink"
    assert training.disable_shuffling if hasattr(training, "disable_shuffling") else finetuning.disable_shuffling
    assert not data.packing
    assert data.cutoff_len == load(name)["cutoff_len"]
    assert not model.trust_remote_code


def test_an_unknown_key_is_refused(tmp_path):
    from llamafactory.hparams import get_train_args

    with pytest.raises(ValueError, match="not used"):
        get_train_args(load("tiny_cpu.yaml") | {"output_dir": str(tmp_path), "no_such_key": 1})


def test_the_two_configs_do_not_drift_apart():
    tiny, large = load("tiny_cpu.yaml"), load("qwen3_4b_mix.yaml")
    drifted = {key for key in tiny.keys() | large.keys() if tiny.get(key) != large.get(key)}
    assert drifted <= DIFFERENCES


def test_the_deepspeed_json_leaves_to_the_trainer_what_the_yaml_says():
    config = json.loads((ROOT / load("qwen3_4b_mix.yaml")["deepspeed"]).read_text())
    for key in (
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
    ):
        assert config[key] == "auto"
    assert config["bf16"] == {"enabled": "auto"}
    assert config["zero_optimization"]["stage"] == 2
