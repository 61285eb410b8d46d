from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

from gream_verl.core.import_hooks import when_imported

COST = """
import sys
import gream_verl.cpu
gream_verl.cpu.is_active = lambda: False  # as on a GPU node
before = set(sys.modules)
import gream_verl.plugin.register
added = {name for name in set(sys.modules) - before if name.partition(".")[0] not in sys.stdlib_module_names}
assert added == {"gream_verl.core", "gream_verl.core.import_hooks", "gream_verl.plugin", "gream_verl.plugin.register"}
"""


WITHOUT_TRANSFER_QUEUE = """
import importlib, sys

class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "transfer_queue" or name.startswith("verl.trainer.ppo.v1"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
import hydra, verl
from gream_verl.cli.doctor import PLUGINS, _plugin

faults = [part for part, where in PLUGINS.items() if _plugin(part, *where).remedy]
assert faults == ["group filter"], faults
importlib.import_module("gream_verl.plugin.agent_loop")
importlib.import_module("gream_verl.plugin.constrained_engine")
"""


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=110, check=False)


def test_the_plugin_adds_no_module_but_its_own_to_those_of_verl():
    done = run_python(COST)
    assert done.returncode == 0, done.stderr


def test_only_the_group_filter_needs_the_v1_trainer_and_transfer_queue():
    done = run_python(WITHOUT_TRANSFER_QUEUE)
    assert done.returncode == 0, done.stderr


def test_a_broken_plugin_is_loud():
    done = run_python(
        "import gream_verl.cpu\n"
        "def broken(): raise RuntimeError('the roof is on fire')\n"
        "gream_verl.cpu.activate = broken\n"
        "import gream_verl.plugin.register\n"
    )
    assert done.returncode == 1
    assert "the roof is on fire" in done.stderr
    assert "run `gream doctor`" in done.stderr


def test_a_hook_runs_once_after_the_import_and_leaves_the_module_as_it_is(monkeypatch):
    monkeypatch.delitem(sys.modules, "tabnanny", raising=False)
    seen: list = []
    when_imported("tabnanny", seen.append)
    assert not seen
    import tabnanny

    assert seen == [tabnanny]
    assert "def process_tokens" in inspect.getsource(tabnanny)
    when_imported("tabnanny", seen.append)  # at once, as it is there
    assert seen == [tabnanny, tabnanny]


def test_an_error_in_a_hook_fails_the_import(monkeypatch):
    def fail(module):
        raise RuntimeError(f"no {module.__name__}")

    monkeypatch.delitem(sys.modules, "pyclbr", raising=False)
    when_imported("pyclbr", fail)
    with pytest.raises(RuntimeError, match="no pyclbr"):
        import pyclbr  # noqa: F401
