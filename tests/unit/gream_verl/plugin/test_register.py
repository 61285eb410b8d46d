from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
import verl  # noqa: F401  loads the plugin

from gream_verl.core.import_hooks import when_imported

LOADED_BY_VERL = "gream_verl.plugin.register" in sys.modules

COST = """
import os
os.environ["VERL_USE_EXTERNAL_PLUGINS"] = "none"
import sys, verl
before = set(sys.modules)
assert not [name for name in before if name.startswith("gream_verl")]
import gream_verl.plugin.register
added = set(sys.modules) - before
assert len(added) < 40, sorted(added)
heavy = {"pydantic", "vllm", "hydra", "rich", "typer", "gream_verl.plugin.reward_manager", "gream_verl.plugin.bgae"}
assert not heavy & added, heavy & added
assert not [name for name in added if name.startswith(("verl.trainer", "verl.workers", "verl.experimental"))]
"""


def run_python(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=110, check=False)


def test_import_verl_loads_the_plugin():
    assert LOADED_BY_VERL


def test_the_plugin_adds_few_modules_to_those_of_verl():
    done = run_python(COST)
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
