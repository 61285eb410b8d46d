"""The one entry point of gream-verl in verl: ``import verl`` loads it in every process (group ``verl.plugins``).

It registers what verl finds by name: the advantage estimator ``bgae``, the reward manager ``rsvr`` and, without an
accelerator, the platform ``cpu`` and the rollout ``hf_cpu``. What verl finds by path (dataset, sampler) needs no
registration. Nothing of verl is imported here: each part registers itself when verl imports the module it belongs to.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

from gream_verl import cpu
from gream_verl.core.import_hooks import when_imported


def _register_recipes(plugins: ModuleType) -> None:
    # hydra looks for plugins in folders on sys.path only, so that it does not see an editable installation.
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    from hydra_plugins.gream import GreamSearchPath

    registry = plugins.Plugins.instance()
    if GreamSearchPath not in registry.discover(SearchPathPlugin):
        registry.register(GreamSearchPath)


def _register_advantage(core_algos: ModuleType) -> None:
    from gream_verl.plugin.bgae import compute_bgae

    core_algos.register_adv_est("bgae")(compute_bgae)


def _register_reward(_: ModuleType) -> None:
    importlib.import_module("gream_verl.plugin.reward_manager")


def register() -> None:
    """Register everything with verl; costs milliseconds, because every Ray process does it."""
    cpu.activate()
    when_imported("hydra.core.plugins", _register_recipes)
    when_imported("verl.trainer.ppo.core_algos", _register_advantage)
    when_imported("verl.experimental.reward_loop.reward_manager", _register_reward)


class Finding(NamedTuple):
    """What a check of the installation found.

    Attributes:
        what: What was looked for.
        ok: Whether it is as it should be.
        detail: What is there, or what went wrong and how to put it right.
    """

    what: str
    ok: bool
    detail: str


def self_check() -> list[Finding]:
    """Return whether verl has really loaded each part of this plugin; imports verl, so it takes seconds."""
    checks: dict[str, Callable[[], str]] = {
        "verl": _check_verl,
        "platform": _check_platform,
        "advantage estimator bgae": _check_advantage,
        "reward manager rsvr": _check_reward,
        "dataset and group filter": _check_found_by_path,
        "recipes": _check_recipes,
    }
    if cpu.is_active():
        checks["rollout hf_cpu"] = _check_hf_rollout
        if importlib.util.find_spec("vllm"):
            checks["vLLM on the CPU"] = _check_vllm
    findings = []
    for what, check in checks.items():
        try:
            findings.append(Finding(what, True, check()))
        except Exception as error:
            findings.append(Finding(what, False, f"{type(error).__name__}: {error}"))
    return findings


def _check_verl() -> str:
    import verl

    names = {entry_point.name for entry_point in importlib.metadata.entry_points(group="verl.plugins")}
    if "gream" not in names:
        raise LookupError("the entry point `gream` is missing; install gream-verl again (`pip install -e .`)")
    return f"{verl.__version__}, plugins: {', '.join(sorted(names))}"


def _check_platform() -> str:
    from verl.plugin.platform import get_platform

    name = get_platform().device_name
    if cpu.is_active() and name != "cpu":
        raise LookupError(f"verl settled for {name!r} with a torch that has no accelerator; unset VERL_PLATFORM")
    return str(name)


def _check_advantage() -> str:
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    return str(get_adv_estimator_fn("bgae").__module__)


def _check_reward() -> str:
    from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls

    return str(get_reward_manager_cls("rsvr").__module__)


def _check_found_by_path() -> str:
    from gream_verl.plugin.dataset import SemanticIdDataset
    from gream_verl.plugin.group_filter import BoundedGroupFilter

    return f"{SemanticIdDataset.__name__}, {BoundedGroupFilter.__name__}"


def _check_recipes() -> str:
    from hydra.core.plugins import Plugins
    from hydra.plugins.search_path_plugin import SearchPathPlugin

    from hydra_plugins.gream import GreamSearchPath

    if GreamSearchPath not in Plugins.instance().discover(SearchPathPlugin):
        raise LookupError("hydra does not see gream_verl.recipes; install gream-verl again (`pip install -e .`)")
    return "found by hydra"


def _check_hf_rollout() -> str:
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    return str(RolloutReplicaRegistry.get(cpu.HF_ROLLOUT).__module__)


def _check_vllm() -> str:
    version = importlib.metadata.version("vllm")
    names = {entry_point.name for entry_point in importlib.metadata.entry_points(group="vllm.general_plugins")}
    if "gream_cpu" not in names:
        raise LookupError("the entry point `gream_cpu` is missing; install gream-verl again (`pip install -e .`)")
    return version


try:
    register()
except Exception as error:
    # verl swallows what a plugin raises (verl/__init__.py:76), and would then train without it.
    traceback.print_exc()
    print(f"gream-verl: its verl plugin failed to load ({error}); run `gream doctor`", file=sys.stderr, flush=True)
    raise
