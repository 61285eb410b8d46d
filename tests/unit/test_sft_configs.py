"""Every SFT config, with every ZeRO stage, through LLaMA-Factory's own parser; and copies that stay copies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from sft_run import make_sft_run, sft_arguments

from data_processing.sft.check import read_config

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "sft_configs"
YAMLS = sorted(path.name for path in CONFIGS.glob("*.yaml"))
STAGES = {path.name: int(path.stem[-1]) for path in sorted(CONFIGS.glob("deepspeed_*.json"))}
REFERENCE = "qwen3_4b_mix.yaml"
CPU = {
    "model_name_or_path", "train_on_prompt", "deepspeed", "dataset_dir", "dataset", "cutoff_len", "learning_rate",
    "preprocessing_num_workers", "per_device_train_batch_size", "gradient_accumulation_steps", "warmup_steps",
    "use_cpu", "bf16", "flash_attn", "disable_gradient_checkpointing", "output_dir", "save_steps", "save_total_limit",
    "eval_dataset", "eval_on_each_dataset", "eval_strategy", "eval_steps", "per_device_eval_batch_size",
    "logging_steps",
}  # fmt: skip
# In what a config may differ from the reference; everything else must not drift apart.
DIFFERENCES = {
    "qwen3_4b_alignment.yaml": {"dataset", "eval_dataset", "output_dir"},
    "qwen3_4b_reasoning.yaml": {
        "model_name_or_path",
        "dataset",
        "eval_dataset",
        "eval_steps",
        "learning_rate",
        "output_dir",
        "save_steps",
    },
    "qwen3_4b_lora.yaml": {"finetuning_type", "adapter_name_or_path", "deepspeed", "learning_rate", "output_dir"},
    "smollm2_cpu.yaml": CPU | {"template", "default_system"},
    "tiny_cpu.yaml": CPU | {"use_muon"},
    "windows_cpu.yaml": CPU | {"use_muon", "neat_packing", "disable_shuffling"},
}


def load(name: str) -> dict[str, object]:
    return yaml.safe_load((CONFIGS / name).read_text())


@pytest.mark.parametrize("name", YAMLS)
def test_llamafactory_accepts_the_arguments(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llamafactory.hparams import get_train_args

    monkeypatch.chdir(tmp_path)
    # On a CPU, and without torchrun, which DeepSpeed needs: that is the next test.
    given = {key: value for key, value in load(name).items() if key != "deepspeed"} | {"use_cpu": True}
    model, data, training, finetuning, _ = get_train_args(given)
    assert finetuning.disable_shuffling != data.packing == data.neat_packing == (name == "windows_cpu.yaml")
    assert not model.trust_remote_code
    assert data.eval_on_each_dataset == training.do_eval == name.startswith("qwen3")
    assert not data.eval_dataset or all(part.startswith(f"{data.dataset[0]}-eval-") for part in data.eval_dataset)
    assert data.cutoff_len == given["cutoff_len"] - data.packing  # LLaMA-Factory takes one token off


PARSE_ALL = """
import json, sys
from accelerate.state import AcceleratorState
from deepspeed.runtime.config import DeepSpeedConfig
from llamafactory.hparams import get_train_args
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

for arguments in json.loads(sys.stdin.read()):
    _, _, training, _, _ = get_train_args(arguments)
    filled = training.hf_deepspeed_config
    third = is_deepspeed_zero3_enabled()
    filled.fill_only("zero_optimization.reduce_bucket_size", 1)
    filled.fill_only("zero_optimization.stage3_prefetch_bucket_size", 1)
    filled.fill_only("zero_optimization.stage3_param_persistence_threshold", 1)
    read = DeepSpeedConfig(filled.config)
    print("read", json.dumps({
        "stage": int(read.zero_optimization_stage), "third": third, "bf16": read.bfloat16_config.enabled,
        "batch": read.train_micro_batch_size_per_gpu, "accumulation": read.gradient_accumulation_steps,
        "clipping": read.gradient_clipping,
    }))
    unset_hf_deepspeed_config()
"""


@pytest.mark.skipif(not find_spec("deepspeed"), reason="deepspeed is not installed: uv pip install deepspeed (12 MB)")
def test_llamafactory_and_deepspeed_read_every_config_with_every_stage(tmp_path: Path) -> None:
    names = [name for name in YAMLS if name.startswith("qwen3")]
    runs = [(load(name), stage) for name in names for stage in STAGES]
    arguments = [given | {"deepspeed": str(CONFIGS / stage), "use_cpu": True} for given, stage in runs]
    torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", PARSE_ALL],
        input=json.dumps(arguments),
        env={**os.environ, **torchrun, "DS_ACCELERATOR": "cpu"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    read = [json.loads(line[5:]) for line in done.stdout.splitlines() if line.startswith("read {")]
    assert len(read) == len(runs)
    for (given, stage), got in zip(runs, read, strict=True):
        assert got == {
            "stage": STAGES[stage],
            "third": STAGES[stage] == 3,
            "bf16": True,
            "batch": given["per_device_train_batch_size"],
            "accumulation": given["gradient_accumulation_steps"],
            "clipping": given["max_grad_norm"],
        }


def test_an_unknown_key_is_refused(tmp_path: Path) -> None:
    from llamafactory.hparams import get_train_args

    with pytest.raises(ValueError, match="not used"):
        get_train_args(load("tiny_cpu.yaml") | {"output_dir": str(tmp_path), "no_such_key": 1})


def test_packed_windows_do_not_see_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from llamafactory.data import SFTDataCollatorWith4DAttentionMask, get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_model, load_tokenizer

    make_sft_run(tmp_path, {"window": 40})
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    keys = read_config(CONFIGS / "windows_cpu.yaml", sft_arguments(tmp_path)[1:])
    arguments, data, training, finetuning, _ = get_train_args(keys)
    modules = load_tokenizer(arguments)
    tokenizer = modules["tokenizer"]
    template = get_template_and_fix_tokenizer(tokenizer, data)
    packs = get_dataset(template, arguments, data, training, stage="sft", **modules)["train_dataset"]
    model = load_model(tokenizer, arguments, finetuning)
    collate = SFTDataCollatorWith4DAttentionMask(
        template=template,
        model=model,
        block_diag_attn=arguments.block_diag_attn,
        attn_implementation=model.config._attn_implementation,
        compute_dtype=torch.float32,
        **modules,
    )
    batch, rows = collate([packs[0]]), torch.tensor(packs[0]["attention_mask"])
    assert rows.max() > 1
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[0]
        for row in range(1, int(rows.max()) + 1):
            places = torch.nonzero(rows == row)[:, 0]
            alone = model(input_ids=batch["input_ids"][:, places]).logits[0]
            torch.testing.assert_close(packed[places], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(set(YAMLS) - {REFERENCE}))
def test_configs_do_not_drift_apart(name: str) -> None:
    own, reference = load(name), load(REFERENCE)
    assert {key for key in own | reference if own.get(key) != reference.get(key)} <= DIFFERENCES[name]


def test_a_config_names_a_stage_that_is_there() -> None:
    named = {Path(str(stage)).name for name in YAMLS if (stage := load(name).get("deepspeed"))}
    assert named <= STAGES.keys()
    assert set(STAGES.values()) == {0, 2, 3}


@pytest.mark.parametrize("name", STAGES)
def test_the_deepspeed_json_leaves_to_the_trainer_what_the_yaml_says(name: str) -> None:
    given = json.loads((CONFIGS / name).read_text())
    left = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"}
    assert {key for key, value in given.items() if value == "auto"} == left
    assert given["bf16"] == {"enabled": "auto"}
    assert given["zero_optimization"]["stage"] == STAGES[name]
