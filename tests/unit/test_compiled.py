from __future__ import annotations

import numba
import pytest

from data_processing.compiled import compiled


def test_it_compiles_where_machine_code_cannot_be_kept() -> None:
    def double(number: int) -> int:
        return 2 * number

    double.__code__ = double.__code__.replace(co_filename="<no such file>")
    with pytest.raises(RuntimeError, match="cannot cache"):
        numba.njit(cache=True)(double)
    assert compiled(double)(21) == 42
