from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import verl  # noqa: F401  loads the plugin
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

import recipes
from gream_verl import cpu


@pytest.fixture(scope="module", autouse=True)
def verl_configuration():
    with initialize_config_module("verl.trainer.config", version_base=None):
        yield


def recipe(name: str, *overrides: str) -> DictConfig:
    return compose("ppo_trainer", overrides=[f"+recipe={name}", *overrides])


BASES = ("gream_srpo", "gream_srpo_cpu")
MIX_INS = ("constrained", "no_bonus", "binary_reward", "no_filter")


@pytest.mark.parametrize("name", [*BASES, *(f"[{base},{mix_in}]" for base in BASES for mix_in in MIX_INS)])
def test_verl_accepts_the_recipe(name):
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    config = recipe(name)
    assert need_reference_policy(config)
    assert not need_critic(config)
    validate_config(config, use_reference_policy=True, use_critic=False)
    OmegaConf.resolve(config)


def test_the_gpu_recipe_has_the_authors_settings():
    config = recipe("gream_srpo")
    OmegaConf.resolve(config)
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert (rollout.n, rollout.temperature, config.data.train_batch_size, actor.ppo_mini_batch_size) == (10, 1, 256, 64)
    assert (actor.optim.lr, actor.optim.lr_warmup_steps, actor.optim.weight_decay) == (2e-6, 10, 0.1)
    assert (actor.use_kl_loss, actor.kl_loss_coef, config.algorithm.use_kl_in_reward) == (True, 0.001, False)
    assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.clip_ratio_c) == (0.2, 0.2, 10)
    assert (actor.loss_agg_mode, actor.grad_clip) == ("token-mean", 1.0)
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

    from gream_verl.bgae import BgaeOptions
    from gream_verl.group_filter import BoundedGroupFilter, read_options
    from gream_verl.reward_manager import RsvrOptions

    config = recipe("gream_srpo_cpu")
    assert RsvrOptions.from_config(config).format == "strict"
    assert BgaeOptions.from_config(config.algorithm) == BgaeOptions(k=4, weight=1.0, success=0.999)
    sampler = config.trainer.v1.sampler
    assert read_options(sampler.sampler_kwargs).train_batch_size == config.data.train_batch_size
    assert load_extern_type(sampler.custom_sampler.path, sampler.custom_sampler.name) is BoundedGroupFilter
    assert omega_conf_to_dataclass(config.actor_rollout_ref.rollout).n == config.actor_rollout_ref.rollout.n


def test_a_whole_batch_fits_into_the_lengths_and_mini_batches():
    for name in ("gream_srpo", "gream_srpo_cpu"):
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
    assert {file.stem for file in folder.glob("*.yaml")} == {*BASES, *MIX_INS, "cpu"}


@pytest.mark.parametrize(
    ("mix_in", "changed"),
    [
        ("no_bonus", {"algorithm.bgae.weight": 0.0}),
        ("binary_reward", {"reward.reward_kwargs.rsvr.binary": True, "algorithm.filter_groups.metric": "acc"}),
        ("no_filter", {"algorithm.filter_groups.enable": False, "trainer.v1.sampler.sampler_kwargs.metric": None}),
        ("constrained", {"actor_rollout_ref.rollout.engine_kwargs.vllm.additional_config.gream.mode": "reasoning"}),
    ],
)
def test_a_mix_in_changes_what_it_says_and_its_options_are_known(mix_in, changed):
    from gream_verl.bgae import BgaeOptions
    from gream_verl.group_filter import read_options
    from gream_verl.reward_manager import RsvrOptions

    config = recipe(f"[gream_srpo_cpu,{mix_in}]")
    for key, value in changed.items():
        assert OmegaConf.select(config, key) == value, key
    RsvrOptions.from_config(config)
    BgaeOptions.from_config(config.algorithm)
    assert read_options(config.trainer.v1.sampler.sampler_kwargs).metric == config.algorithm.filter_groups.metric
