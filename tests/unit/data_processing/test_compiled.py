from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import numba
import pytest

from data_processing.compiled import compiled

MODULE = """
from data_processing.compiled import compiled

@compiled
def double(number):
    return 2 * number
"""


def test_it_compiles_where_machine_code_cannot_be_kept() -> None:
    def double(number: int) -> int:
        return 2 * number

    double.__code__ = double.__code__.replace(co_filename="<no such file>")
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(double)
    assert compiled(double)(21) == 42


def test_machine_code_is_kept_and_a_folder_that_is_lost_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "loops.py").write_text(MODULE)
    spec = importlib.util.spec_from_file_location("loops", tmp_path / "loops.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.double(21) == 42
    assert list((tmp_path / "__pycache__").glob("*.nbc"))
    shutil.rmtree(tmp_path / "__pycache__")
    (tmp_path / "__pycache__").write_text("no folder")
    assert module.double(1.5) == 3


def test_two_processes_may_compile_at_once(tmp_path: Path) -> None:
    (tmp_path / "loops.py").write_text(MODULE)
    command = [sys.executable, "-c", "import loops; assert loops.double(21) == 42"]
    paths = [str(tmp_path), str(Path(__file__).parents[3])]
    running = [subprocess.Popen(command, cwd=tmp_path, env={"PYTHONPATH": ":".join(paths)}) for _ in range(2)]
    assert [process.wait(timeout=60) for process in running] == [0, 0]
