from __future__ import annotations

import copy
import dataclasses
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import verl
from hydra import compose, initialize_config_module
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict

import recipes
from gream_verl import cpu

BASES = (
    "gream_srpo",
    "gream_srpo_cpu",
    "gream_srpo_smollm2_cpu",
    "gream_srpo_megatron",
    "gream_srpo_async",
    "gream_srpo_lora",
)
MIX_INS = ("constrained", "direct", "on_the_fly", "no_bonus", "binary_reward", "no_filter")
MEGATRON_64 = "[gream_srpo_megatron,megatron_64_gpus]"
RECIPES = (*BASES, MEGATRON_64, *(f"[{base},{mix_in}]" for base in BASES for mix_in in MIX_INS))

# Nodes whose keys verl's configuration does not list, and who reads them.
FREE_FORM = {
    "gream": "interpolated by the recipes",
    "algorithm.bgae": "BgaeOptions, which refuses unknown keys",
    "reward.reward_kwargs": "RsvrOptions, which refuses unknown keys",
    "trainer.v1.sampler.sampler_kwargs": "GroupFilterOptions, which refuses unknown keys",
    "data.index_file": "SemanticIdDataset",
    "data.next_item": "NextItemOptions, which refuses unknown keys",
    "actor_rollout_ref.model.override_config": "the model's config.json",
    "actor_rollout_ref.rollout.engine_kwargs": "vLLM",
    "ray_kwargs.ray_init": "ray.init",
}

# verl reads these as they are: its own defaults do not fit its dataclasses.
NEVER_CONVERTED = ("reward", "global_profiler")


@pytest.fixture(scope="module", autouse=True)
def verl_configuration():
    with initialize_config_module("verl.trainer.config", version_base=None):
        yield


@cache
def recipe(name: str, *overrides: str) -> DictConfig:
    """Return the composed recipe, for reading only."""
    return compose("ppo_trainer", overrides=[f"+recipe={name}", *overrides])


@cache
def stock(model_engine: str) -> DictConfig:
    config = compose("ppo_trainer", overrides=[f"model_engine={model_engine}"])
    OmegaConf.resolve(config)
    return config


def unknown_keys(config: DictConfig) -> list[str]:
    """Return the keys that neither verl's configuration nor the dataclass that reads them has."""
    return list(_unknown_keys(config, stock(config.model_engine), ""))


def _unknown_keys(node: DictConfig, known: DictConfig, prefix: str) -> Iterator[str]:
    declared = {field.name for field in dataclasses.fields(get_class(node._target_))} if "_target_" in node else set()
    for key in node:
        path = f"{prefix}{key}"
        if path in FREE_FORM or OmegaConf.is_missing(node, key):
            continue
        if key not in known:
            if key not in declared:
                yield path
        elif isinstance(node[key], DictConfig) and isinstance(known[key], DictConfig):
            yield from _unknown_keys(node[key], known[key], f"{path}.")


def dataclass_nodes(node: DictConfig, prefix: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Yield the outermost nodes that verl has a dataclass for, with their paths."""
    for key in node:
        if OmegaConf.is_missing(node, key) or not isinstance(node[key], DictConfig):
            continue
        if "_target_" in node[key]:
            yield f"{prefix}{key}", node[key]
        else:
            yield from dataclass_nodes(node[key], f"{prefix}{key}.")


def prepare_for_conversion(config: DictConfig) -> None:
    """Make the changes that verl makes before a node becomes a dataclass, and remove what never becomes one."""
    with open_dict(config):
        config.algorithm.pop("bgae")
        reference = config.actor_rollout_ref.ref
        for key in [key for key in reference if key.startswith("log_prob_")]:  # verl/workers/engine_workers.py:546
            name = key.removeprefix("log_prob_")
            reference["use_dynamic_bsz" if name == "use_dynamic_bsz" else f"ppo_{name}"] = reference.pop(key)
        for path in NEVER_CONVERTED:
            config.pop(path)


@pytest.fixture
def no_model_on_disk(monkeypatch):
    from verl.workers.config import HFModelConfig

    monkeypatch.setattr(HFModelConfig, "__post_init__", lambda self: None)  # loads the checkpoint


@pytest.mark.filterwarnings("ignore::FutureWarning")  # verl itself finds samplers with this function
@pytest.mark.parametrize("name", RECIPES)
def test_verl_accepts_the_recipe(name, no_model_on_disk):
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.trainer.ppo.v1 import get_trainer_cls
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    from gream_verl.plugin.bgae import BgaeOptions
    from gream_verl.plugin.reward_manager import RsvrOptions

    config = copy.deepcopy(recipe(name))
    assert need_reference_policy(config)
    assert not need_critic(config)
    validate_config(config, use_reference_policy=True, use_critic=False)
    OmegaConf.resolve(config)
    assert unknown_keys(config) == []
    RsvrOptions.from_config(config)
    BgaeOptions.from_config(config.algorithm)
    # The trainer checks the keys of its mode and builds the sampler; models come later, in init().
    get_trainer_cls(config.trainer.v1.trainer_mode)(config=config)
    prepare_for_conversion(config)
    for path, node in dataclass_nodes(config):
        assert dataclasses.is_dataclass(omega_conf_to_dataclass(node)), path


@pytest.mark.parametrize(
    ("base", "typo"),
    [
        ("gream_srpo", "actor_rollout_ref.actor.klloss_coef"),
        ("gream_srpo", "actor_rollout_ref.rollout.val_kwargs.temprature"),
        ("gream_srpo", "actor_rollout_ref.model.lora_ranks"),
        ("gream_srpo", "data.max_respose_length"),
        ("gream_srpo_megatron", "actor_rollout_ref.actor.megatron.tensor_parallel_size"),
        ("gream_srpo_megatron", "actor_rollout_ref.actor.fsdp_config"),
        ("gream_srpo_async", "trainer.v1.separate_async.sync_step"),
    ],
)
def test_a_key_that_verl_does_not_know_is_reported(base, typo):
    assert unknown_keys(recipe(base, f"+{typo}=1")) == [typo]


def test_a_key_of_a_dataclass_that_verls_yaml_leaves_out_is_known():
    config = recipe("gream_srpo", "+actor_rollout_ref.rollout.repetition_penalty=1.1")
    assert "repetition_penalty" not in stock("dp").actor_rollout_ref.rollout
    assert unknown_keys(config) == []


def documented_commands() -> list[list[str]]:
    docs = Path(__file__).parents[2] / "docs"
    text = "".join((docs / name).read_text() for name in ("recipes.md", "multi-node.md")).replace("\\\n", "")
    lines = re.findall(r"^    python -m verl\.trainer\.main_ppo (.*)$", text, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def test_every_documented_command_composes_without_unknown_keys():
    commands = documented_commands()
    assert len(commands) > len(BASES) + len(MIX_INS)
    for command in commands:
        assert unknown_keys(compose("ppo_trainer", overrides=command)) == [], command


@pytest.mark.parametrize(
    ("name", "sizes"), [("gream_srpo_megatron", (8, 2, 1)), (MEGATRON_64, (64, 2, 2))], ids=["8 GPUs", "64 GPUs"]
)
def test_megatron_can_split_qwen3_4b_like_this(name, sizes):
    config = recipe(name)
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    for parallel in (actor.megatron, config.actor_rollout_ref.ref.megatron):
        gpus, tensor, pipeline = sizes
        assert config.trainer.nnodes * config.trainer.n_gpus_per_node == gpus
        assert (parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size) == (tensor, pipeline)
        assert (parallel.context_parallel_size, parallel.sequence_parallel) == (1, True)
        heads, key_value_heads, layers = 32, 8, 36
        assert heads % tensor == key_value_heads % tensor == layers % pipeline == gpus % (tensor * pipeline) == 0
        # verl/workers/engine_workers.py:267
        assert actor.ppo_mini_batch_size * rollout.n % (gpus // (tensor * pipeline)) == 0
    # verl exports hf_model through Megatron-Bridge (verl/utils/checkpoint/megatron_checkpoint_manager.py:211)
    assert "hf_model" in actor.checkpoint.save_contents
    assert actor.megatron.use_mbridge
    assert not actor.megatron.vanilla_mbridge
    assert actor.optim.clip_grad == 1.0


def test_async_shares_eight_gpus_and_lets_verl_sample_and_filter():
    from verl.trainer.ppo.v1 import get_trainer_cls
    from verl.trainer.ppo.v1.replay_buffer import ReplayBufferAsync

    config = recipe("gream_srpo_async")
    rollout = config.actor_rollout_ref.rollout
    assert config.trainer.nnodes * config.trainer.n_gpus_per_node == rollout.nnodes * rollout.n_gpus_per_node == 4
    trainer = get_trainer_cls("separate_async")(config=config)
    assert type(trainer.replay_buffer) is ReplayBufferAsync
    assert trainer.replay_buffer.filter_groups_metric == "match"
    assert trainer.parameter_sync_step == 4


def test_async_stays_with_the_mini_batches_that_verl_wants():
    from verl.trainer.ppo.v1 import get_trainer_cls

    config = recipe("gream_srpo_async", "data.train_batch_size=128")
    with pytest.raises(AssertionError, match="parameter_sync_step"):
        get_trainer_cls("separate_async")(config=config)


def test_verl_still_cannot_train_rows_of_the_embedding_beside_lora():
    """The day this fails, gream_srpo_lora.yaml can train the semantic IDs."""
    folder = Path(verl.__file__).parent
    for name in ("modules_to_save", "trainable_token_indices"):
        assert not [file for file in folder.rglob("*.py") if name in file.read_text()], name


def test_the_gpu_recipe_has_the_authors_settings():
    config = recipe("gream_srpo")
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert (rollout.n, rollout.temperature, config.data.train_batch_size, actor.ppo_mini_batch_size) == (10, 1, 256, 64)
    assert (actor.optim.lr, actor.optim.lr_warmup_steps, actor.optim.weight_decay) == (2e-6, 10, 0.1)
    assert (actor.use_kl_loss, actor.kl_loss_coef, config.algorithm.use_kl_in_reward) == (True, 0.001, False)
    assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.clip_ratio_c) == (0.2, 0.2, 10)
    assert (actor.loss_agg_mode, actor.optim.clip_grad) == ("token-mean", 1.0)
    assert (config.data.max_prompt_length, config.data.max_response_length) == (768, 1560)
    assert (config.data.truncation, config.trainer.total_training_steps) == ("left", 150)
    assert (rollout.val_kwargs.temperature, rollout.val_kwargs.top_p, rollout.val_kwargs.n) == (0.6, 0.8, 5)
    filter_groups = config.algorithm.filter_groups
    assert (filter_groups.enable, filter_groups.metric, filter_groups.max_num_gen_batches) == (True, "match", 9)
    assert (config.trainer.n_gpus_per_node, config.trainer.device) == (8, "cuda")


def test_the_cpu_recipe_is_the_gpu_recipe_plus_overrides():
    gpu, small = recipe("gream_srpo"), recipe("gream_srpo_cpu")
    same = [
        "algorithm.adv_estimator",
        "algorithm.bgae",
        "algorithm.filter_groups.metric",
        "reward.reward_manager",
        "reward.reward_kwargs",
        "data.custom_cls",
        "trainer.v1.sampler",
        "actor_rollout_ref.actor.kl_loss_coef",
        "actor_rollout_ref.actor.clip_ratio_c",
        "actor_rollout_ref.rollout.val_kwargs.temperature",
    ]
    for key in same:
        assert OmegaConf.to_container(
            OmegaConf.create({"value": OmegaConf.select(gpu, key)})
        ) == OmegaConf.to_container(OmegaConf.create({"value": OmegaConf.select(small, key)})), key
    assert small.trainer.device == "cpu"
    assert small.data.train_files == "runs/quickstart/data/ml-100k-rl.parquet"
    assert small.actor_rollout_ref.model.path == "runs/quickstart/sft"
    assert small.reward.reward_kwargs.rsvr.index_file == "runs/quickstart/data/ml-100k.index.json"
    assert "hf_model" in small.actor_rollout_ref.actor.checkpoint.save_contents


def test_the_command_line_still_wins():
    config = recipe("gream_srpo_cpu", "gream.run=/elsewhere", "algorithm.bgae.k=2", "actor_rollout_ref.rollout.n=3")
    assert config.data.val_files == "/elsewhere/data/ml-100k-val.parquet"
    assert config.algorithm.bgae.k == 2
    assert config.actor_rollout_ref.rollout.n == 3


@pytest.mark.filterwarnings("ignore::FutureWarning")  # verl itself finds samplers with this function
def test_what_the_recipe_says_reaches_reward_filter_and_advantage():
    from verl.utils.config import omega_conf_to_dataclass
    from verl.utils.import_utils import load_extern_type

    from gream_verl.plugin.bgae import BgaeOptions
    from gream_verl.plugin.group_filter import BoundedGroupFilter, read_options
    from gream_verl.plugin.reward_manager import RsvrOptions

    config = recipe("gream_srpo_cpu")
    assert RsvrOptions.from_config(config).format == "strict"
    assert BgaeOptions.from_config(config.algorithm) == BgaeOptions(k=4, weight=1.0, success=0.999)
    sampler = config.trainer.v1.sampler
    assert read_options(sampler.sampler_kwargs).train_batch_size == config.data.train_batch_size
    assert load_extern_type(sampler.custom_sampler.path, sampler.custom_sampler.name) is BoundedGroupFilter
    assert omega_conf_to_dataclass(config.actor_rollout_ref.rollout).n == config.actor_rollout_ref.rollout.n


def test_a_whole_batch_fits_into_the_lengths_and_mini_batches():
    for name in BASES:
        config = recipe(name)
        longest = config.data.max_prompt_length + config.data.max_response_length
        assert config.actor_rollout_ref.rollout.max_model_len >= longest
        assert config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu >= longest
        assert config.data.train_batch_size % config.actor_rollout_ref.actor.ppo_mini_batch_size == 0


@pytest.mark.skipif(not cpu.is_active(), reason="torch was built for an accelerator")
def test_main_ppo_finds_the_recipe_from_any_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", "+recipe=gream_srpo_cpu", "--cfg", "job", "--package", "gream"],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "model: ${gream.run}/sft" in done.stdout


def test_every_recipe_is_a_base_a_mix_in_or_a_part():
    folder = Path(recipes.__file__).parent / "recipe"
    assert {file.stem for file in folder.glob("*.yaml")} == {*BASES, *MIX_INS, "cpu", "megatron_64_gpus"}


@pytest.mark.parametrize(
    ("mix_in", "changed"),
    [
        ("no_bonus", {"algorithm.bgae.weight": 0.0}),
        ("binary_reward", {"reward.reward_kwargs.rsvr.binary": True, "algorithm.filter_groups.metric": "acc"}),
        ("no_filter", {"algorithm.filter_groups.enable": False, "trainer.v1.sampler.sampler_kwargs.metric": None}),
        (
            "direct",
            {
                "reward.reward_kwargs.rsvr.mode": "direct",
                "data.train_files": "runs/quickstart/data/ml-100k-rl-direct.parquet",
                "data.val_files": "runs/quickstart/data/ml-100k-val-direct.parquet",
                "actor_rollout_ref.rollout.val_kwargs.n": 1,
            },
        ),
        (
            "on_the_fly",
            {"data.train_files": "runs/quickstart/data/ml-100k.inter.json", "data.next_item.mode": "reasoning"},
        ),
        ("constrained", {"actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config.gream.mode": "reasoning"}),
    ],
)
def test_a_mix_in_changes_what_it_says_and_its_options_are_known(mix_in, changed):
    from gream_verl.plugin.bgae import BgaeOptions
    from gream_verl.plugin.group_filter import read_options
    from gream_verl.plugin.reward_manager import RsvrOptions

    config = recipe(f"[gream_srpo_cpu,{mix_in}]")
    for key, value in changed.items():
        assert OmegaConf.select(config, key) == value, key
    RsvrOptions.from_config(config)
    BgaeOptions.from_config(config.algorithm)
    assert read_options(config.trainer.v1.sampler.sampler_kwargs).metric == config.algorithm.filter_groups.metric
