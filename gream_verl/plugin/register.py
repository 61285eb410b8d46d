"""The one entry point of gream-verl in verl: ``import verl`` loads it in every process (group ``verl.plugins``).

It registers the advantage estimator ``bgae``, the reward manager ``rsvr``, the agent loop ``gream``, the engine that
trains on constrained rollouts and, without an accelerator, the platform ``cpu``: each when verl imports the module it
belongs to. verl finds dataset and sampler by their paths.
"""

from __future__ import annotations

import importlib
import sys
import traceback
from types import ModuleType

from gream_verl import cpu
from gream_verl.core.import_hooks import when_imported

AFTER = {
    "verl.experimental.reward_loop.reward_manager": "reward_manager",
    "verl.experimental.agent_loop.single_turn_agent_loop": "agent_loop",
    "verl.workers.engine.fsdp.transformer_impl": "constrained_engine",
}
"""Modules of verl, and the modules of this room that register something with them."""


def _register_recipes(plugins: ModuleType) -> None:
    # hydra looks for plugins in folders on sys.path, and so misses an editable installation.
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    from hydra_plugins.gream import GreamSearchPath

    registry = plugins.Plugins.instance()
    if GreamSearchPath not in registry.discover(SearchPathPlugin):
        registry.register(GreamSearchPath)


def _register_advantage(core_algos: ModuleType) -> None:
    from gream_verl.plugin.bgae import compute_bgae

    core_algos.register_adv_est("bgae")(compute_bgae)


def _register_after(module: ModuleType) -> None:
    importlib.import_module(f"gream_verl.plugin.{AFTER[module.__name__]}")


def register() -> None:
    """Register everything with verl; costs milliseconds, because every Ray process does it."""
    cpu.activate()
    when_imported("hydra.core.plugins", _register_recipes)
    when_imported("verl.trainer.ppo.core_algos", _register_advantage)
    for module in AFTER:
        when_imported(module, _register_after)


try:
    register()
except Exception as error:
    # verl swallows what a plugin raises (verl/__init__.py:76), and would then train without it.
    traceback.print_exc()
    print(f"gream-verl: its verl plugin failed to load ({error}); run `gream doctor`", file=sys.stderr, flush=True)
    raise
