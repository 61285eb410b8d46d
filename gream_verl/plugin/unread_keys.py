"""Settings that verl 0.9.1 accepts and does not read.

Its configuration still has the reward nodes of older releases (verl/trainer/config/legacy_reward_impl.yaml). Only
fully_async_main.py moves them to ``reward`` (verl/experimental/reward_loop/reward_loop.py:39); with main_ppo a run
trains on another reward than the one asked for.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from gream_verl.core.errors import InputError

LEGACY_NODES = ("custom_reward_function", "reward_model", "sandbox_fusion")
RENAMED = {
    "reward_model.num_workers": "reward.num_workers",
    "reward_model.reward_manager": "reward.reward_manager.name",
    "reward_model.reward_loop_source": "reward.reward_manager.source",
    "reward_model.reward_loop_module_path": "reward.reward_manager.module.path",
    "reward_model.reward_loop_class_name": "reward.reward_manager.name",
    "reward_model.reward_kwargs": "reward.reward_kwargs",
    "reward_model.model": "reward.reward_model.model_path",
}
"""New names of the keys that are not below ``reward`` under their old name."""


def refuse_unread_keys(config: DictConfig) -> None:
    """Refuse a whole configuration with a reward setting that verl would ignore; name the one to set instead."""
    for node in LEGACY_NODES:
        for name in OmegaConf.select(config, node) or ():
            key = f"{node}.{name}"
            if _is_set(OmegaConf.select(config, key)):
                raise InputError(f"{key}: verl 0.9.1 does not read it; set {RENAMED.get(key, f'reward.{key}')} instead")
    if OmegaConf.select(config, "data.reward_fn_key", default="data_source") != "data_source":
        raise InputError("data.reward_fn_key: verl 0.9.1 does not read it; name the column data_source in the files")


def _is_set(value: Any) -> bool:
    if isinstance(value, DictConfig | ListConfig):
        return any(map(_is_set, value.values() if isinstance(value, DictConfig) else value))
    return value is not None
