"""Scripts under benchmarks/ as modules, for tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).parents[1] / "benchmarks"


def load_benchmark(script: str) -> ModuleType:
    """Return the module of a script, such as ``baselines/sasrec.py``."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, FOLDER / script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
