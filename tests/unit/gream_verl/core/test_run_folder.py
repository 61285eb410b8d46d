from __future__ import annotations

from pathlib import Path

import pytest
from small_data import make_data

from gream_verl.core.errors import InputError
from gream_verl.core.run_folder import RunFolder


def test_a_run_holds_its_data_below_it_or_in_itself(tmp_path: Path) -> None:
    created = RunFolder.create(tmp_path / "small")
    make_data(created.data.root)
    assert RunFolder.open(tmp_path / "small").data.inter == created.data.inter
    assert created.data.inter == tmp_path / "small" / "data" / "small.inter.json"
    make_data(tmp_path / "published")
    assert RunFolder.open(tmp_path / "published").data.root == tmp_path / "published"


def test_a_data_set_that_is_not_clear_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"holds no data set .*run `gream data prepare"):
        RunFolder.open(tmp_path)
    for name in ("A", "B"):
        (tmp_path / f"{name}.inter.json").touch()
    with pytest.raises(InputError, match="holds several data sets; choose one with --dataset: A, B"):
        RunFolder.open(tmp_path)
    with pytest.raises(InputError, match="holds no data set 'C'; it holds A, B"):
        RunFolder.open(tmp_path, "C")
    assert RunFolder.open(tmp_path, "B").data.name == "B"
    for name in ("a/b", "a,b", "a=b", "käse"):
        with pytest.raises(InputError, match="a recipe could not take it"):
            RunFolder.create(tmp_path, name)
