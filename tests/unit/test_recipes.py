"""Every recipe and mix-in, composed once and given to verl's own checks, dataclasses and trainers."""

from __future__ import annotations

import copy
import dataclasses
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import verl
from hydra import compose, initialize_config_module
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict

import recipes
from gream_verl.core.errors import InputError
from gream_verl.core.options import checked_options
from gream_verl.plugin.bgae import BgaeOptions
from gream_verl.plugin.group_filter import OPTIONS, BoundedGroupFilter, GroupFilterOptions
from gream_verl.plugin.reward_manager import RsvrOptions

BASES = (
    "gream_srpo",
    "gream_srpo_cpu",
    "gream_srpo_smollm2_cpu",
    "gream_srpo_megatron",
    "gream_srpo_async",
    "gream_srpo_lora",
    "gream_srpo_reference",
)
MIX_INS = ("constrained", "direct", "no_bonus", "binary_reward", "no_filter", "sampled_reward")
MEGATRON_64 = ("gream_srpo_megatron", "megatron_64_gpus")
FILES = Path(recipes.__file__).parent / "recipe"

# Nodes whose keys verl's configuration does not list, and their readers.
FREE_FORM = {
    "gream": "interpolated by the recipes",
    "algorithm.bgae": "BgaeOptions, which refuses unknown keys",
    "reward.reward_kwargs": "RsvrOptions, which refuses unknown keys",
    "trainer.v1.sampler.sampler_kwargs": "GroupFilterOptions, which refuses unknown keys",
    "data.index_file": "SemanticIdDataset",
    "actor_rollout_ref.model.fused_kernel_options.gream": "ConstraintOptions, which refuses unknown keys",
    "actor_rollout_ref.model.override_config": "the model's config.json",
    "actor_rollout_ref.rollout.engine_kwargs": "vLLM",
    "ray_kwargs.ray_init": "ray.init",
}

# verl reads these as they are: its own defaults do not fit its dataclasses.
NEVER_CONVERTED = ("reward", "global_profiler")


@cache
def recipe(name: str, *mix_ins: str) -> DictConfig:
    """Return the composed recipe, for reading only; mix-ins are merged over it as hydra does, which is faster."""
    if mix_ins:
        with open_dict(copy.deepcopy(recipe(name))) as base:
            return OmegaConf.merge(base, *(OmegaConf.load(FILES / f"{part}.yaml") for part in mix_ins))
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", overrides=[f"+recipe={name}"])


@cache
def stock(model_engine: str) -> DictConfig:
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=[f"model_engine={model_engine}"])
    OmegaConf.resolve(config)
    return config


def changed(name: str, **values: object) -> DictConfig:
    """Return a copy of the recipe with other values, "." in their keys written "__"."""
    config = copy.deepcopy(recipe(name))
    for key, value in values.items():
        OmegaConf.update(config, key.replace("__", "."), value, force_add=True)
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
@pytest.mark.parametrize("names", [*((base,) for base in BASES), MEGATRON_64, ("gream_srpo_cpu", *MIX_INS)], ids=str)
def test_verl_accepts_the_recipe(names, no_model_on_disk):
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.trainer.ppo.v1 import get_trainer_cls
    from verl.trainer.ppo.v1.replay_buffer import ReplayBufferAsync
    from verl.utils.config import omega_conf_to_dataclass, validate_config

    config = copy.deepcopy(recipe(*names))
    assert need_reference_policy(config) == config.actor_rollout_ref.actor.use_kl_loss
    assert not need_critic(config)
    validate_config(config, use_reference_policy=True, use_critic=False)
    OmegaConf.resolve(config)
    assert unknown_keys(config) == []
    # The trainer checks the keys of its mode and builds the sampler; models come later, in init().
    trainer = get_trainer_cls(config.trainer.v1.trainer_mode)(config=config)
    assert isinstance(
        trainer.replay_buffer, ReplayBufferAsync if names == ("gream_srpo_async",) else BoundedGroupFilter
    )
    if names == ("gream_srpo_async",):
        assert trainer.replay_buffer.filter_groups_metric == config.algorithm.filter_groups.metric
        assert trainer.parameter_sync_step == 4
    assert RsvrOptions.from_config(config).format == "strict"
    assert BgaeOptions.from_config(config.algorithm).k == 4
    data, actor = config.data, config.actor_rollout_ref.actor
    assert config.actor_rollout_ref.rollout.max_model_len >= data.max_prompt_length + data.max_response_length
    assert actor.ppo_max_token_len_per_gpu >= data.max_prompt_length + data.max_response_length
    assert data.train_batch_size % actor.ppo_mini_batch_size == 0
    prepare_for_conversion(config)
    for path, node in dataclass_nodes(config):
        assert dataclasses.is_dataclass(omega_conf_to_dataclass(node)), path


@pytest.mark.parametrize(
    ("base", "typo"),
    [
        ("gream_srpo", "actor_rollout_ref.actor.klloss_coef"),
        ("gream_srpo", "data.max_respose_length"),
        ("gream_srpo_megatron", "actor_rollout_ref.actor.fsdp_config"),
        ("gream_srpo_async", "trainer.v1.separate_async.sync_step"),
    ],
)
def test_a_key_that_verl_does_not_know_is_reported(base, typo):
    assert unknown_keys(changed(base, **{typo: 1})) == [typo]


def test_a_key_of_a_dataclass_that_verls_yaml_leaves_out_is_known():
    assert "repetition_penalty" not in stock("dp").actor_rollout_ref.rollout
    assert unknown_keys(changed("gream_srpo", actor_rollout_ref__rollout__repetition_penalty=1.1)) == []


def test_every_documented_command_names_recipes_and_keys_that_exist():
    docs = Path(__file__).parents[2] / "docs"
    text = "".join((docs / name).read_text() for name in ("recipes.md", "multi-node.md", "cpu.md")).replace("\\\n", "")
    commands = re.findall(r"^    python -m verl\.trainer\.main_ppo (.*)$", text, re.MULTILINE)
    assert len(commands) > len(BASES) + len(MIX_INS)
    for command in commands:
        chosen, *overrides = shlex.split(command)
        names = chosen.removeprefix("+recipe=").strip("[]").split(",")
        assert names[0] in BASES
        assert set(names[1:]) <= {*MIX_INS, "megatron_64_gpus"}, command
        for override in overrides:
            key, _, value = override.partition("=")
            if not key.startswith("+ray_kwargs.ray_init."):
                assert OmegaConf.select(recipe(names[0]), key) is not None, override
                assert value, override


@pytest.mark.parametrize(("names", "sizes"), [(MEGATRON_64[:1], (8, 2, 1)), (MEGATRON_64, (64, 2, 2))])
def test_megatron_can_split_qwen3_4b_like_this(names, sizes):
    config = recipe(*names)
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


def test_async_shares_eight_gpus_and_keeps_the_mini_batches_that_verl_wants():
    from verl.trainer.ppo.v1 import get_trainer_cls

    config = changed("gream_srpo_async", data__train_batch_size=128)
    rollout = config.actor_rollout_ref.rollout
    assert config.trainer.nnodes * config.trainer.n_gpus_per_node == rollout.nnodes * rollout.n_gpus_per_node == 4
    with pytest.raises(AssertionError, match="parameter_sync_step"):
        get_trainer_cls("separate_async")(config=config)


def test_bounded_group_filter_is_refused_outside_sync():
    from verl.trainer.ppo.v1 import get_trainer_cls

    config = changed("gream_srpo", trainer__v1__trainer_mode="colocate_async")
    with pytest.raises(InputError, match="works with 'sync' only"):
        get_trainer_cls("colocate_async")(config=config)


def test_verl_still_cannot_train_rows_of_the_embedding_with_lora():
    """The day this fails, gream_srpo_lora.yaml can train the semantic IDs."""
    folder = Path(verl.__file__).parent
    for name in ("modules_to_save", "trainable_token_indices"):
        assert not [file for file in folder.rglob("*.py") if name in file.read_text()], name


def test_the_gpu_recipe_has_the_authors_settings():
    config = recipe("gream_srpo_reference")
    assert not config.reward.reward_kwargs.rsvr.expected
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
    for key in ("algorithm.bgae", "reward.reward_manager", "data.custom_cls", "trainer.v1.sampler.custom_sampler"):
        assert OmegaConf.select(gpu, key) == OmegaConf.select(small, key) is not None, key
    assert small.trainer.device == "cpu"
    assert small.data.train_files == "runs/quickstart/data/ml-100k-rl.parquet"
    assert small.actor_rollout_ref.model.path == "runs/quickstart/sft"
    assert small.reward.reward_kwargs.rsvr.index_file == "runs/quickstart/data/ml-100k.index.json"
    assert "hf_model" in small.actor_rollout_ref.actor.checkpoint.save_contents
    elsewhere = changed("gream_srpo_cpu", gream__run="/elsewhere")
    assert elsewhere.data.val_files == "/elsewhere/data/ml-100k-val.parquet"


def test_every_recipe_is_a_base_a_mix_in_or_a_part():
    assert {file.stem for file in FILES.glob("*.yaml")} == {*BASES, *MIX_INS, "cpu", "megatron_64_gpus"}


@pytest.mark.parametrize(
    ("mix_in", "values"),
    [
        ("no_bonus", {"algorithm.bgae.weight": 0.0}),
        ("binary_reward", {"reward.reward_kwargs.rsvr.binary": True, "algorithm.filter_groups.metric": "expected"}),
        ("sampled_reward", {"algorithm.bgae.expected": False, "algorithm.filter_groups.metric": "match"}),
        ("no_filter", {"algorithm.filter_groups.enable": False, "trainer.v1.sampler.sampler_kwargs.metric": None}),
        (
            "direct",
            {
                "reward.reward_kwargs.rsvr.mode": "direct",
                "data.train_files": "runs/quickstart/data/ml-100k-rl-direct.parquet",
                "data.val_files": "runs/quickstart/data/ml-100k-val-direct.parquet",
            },
        ),
        (
            "constrained",
            {
                "actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config.gream.mode": "reasoning",
                "actor_rollout_ref.model.fused_kernel_options.gream.mode": "reasoning",
            },
        ),
    ],
)
def test_a_mix_in_changes_what_it_says_and_its_options_are_known(mix_in, values):
    config = recipe("gream_srpo_cpu", mix_in)
    for key, value in values.items():
        assert OmegaConf.select(config, key) == value, key
    RsvrOptions.from_config(config)
    BgaeOptions.from_config(config.algorithm)
    options = checked_options(GroupFilterOptions, OPTIONS, config.trainer.v1.sampler.sampler_kwargs)
    assert options.metric == config.algorithm.filter_groups.metric
    assert options.train_batch_size == config.data.train_batch_size
