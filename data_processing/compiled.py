"""Compilation of inner loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(function: Callable[..., Any]) -> Any:
    """Compile with numba; machine code is kept on disk, where there is a folder that can be written."""
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:  # numba found no such folder
        return numba.njit(function)
