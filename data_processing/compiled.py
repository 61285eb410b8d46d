"""Compilation of inner loops."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numba
from numba.core.caching import FunctionCache


class _Cache(FunctionCache):
    """Machine code on disk; where it cannot be read or written, it is made anew or not kept."""

    def load_overload(self, *arguments: Any) -> Any:
        with suppress(OSError):
            return super().load_overload(*arguments)

    def save_overload(self, *arguments: Any) -> None:
        with suppress(OSError):
            super().save_overload(*arguments)


def compiled(function: Callable[..., Any]) -> Any:
    """Compile with numba; machine code is kept on disk, where there is a folder that can be written."""
    made = numba.njit(function)
    with suppress(RuntimeError):  # numba found no such folder
        made._cache = _Cache(function)
    return made
