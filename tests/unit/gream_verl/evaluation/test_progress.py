from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from gream_verl.core.errors import InputError
from gream_verl.evaluation.progress import ProgressFile

HEADER = {"seed": 0, "model": "a"}
ROWS: list[dict[str, Any]] = [{"user": str(user), "recommended": ["1", "2"]} for user in range(4)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "new" / "progress.jsonl"
    with closing(ProgressFile(path, HEADER)) as done:
        done.add(ROWS[:2])
        done.add(ROWS[1:3])  # one is known
    return path


def read(path: Path, header: dict[str, Any] = HEADER, **options: bool) -> list[dict[str, Any]]:
    with closing(ProgressFile(path, header, **options)) as done:
        return list(done.rows.values())


def test_finished_users_are_found_again_each_once(path: Path) -> None:
    assert read(path) == ROWS[:3]
    assert path.read_bytes().count(b"\n") == 1 + 3


def test_a_file_cut_anywhere_is_gone_on_with_from_its_last_whole_line(path: Path) -> None:
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        kept = max(0, whole[:size].count(b"\n") - 1)
        with closing(ProgressFile(path, HEADER)) as done:
            assert list(done.rows.values()) == ROWS[:kept]
            done.add(ROWS[kept:3])
        assert path.read_bytes() == whole


def test_another_header_is_refused_and_replaced_only_when_asked(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(InputError, match="another evaluation; replace them with --overwrite"):
        read(path, {"seed": 1})
    assert path.read_bytes() == before
    assert read(path, HEADER, overwrite=True) == ROWS[:3]
    assert read(path, {"seed": 1}, overwrite=True) == []
    with pytest.raises(InputError, match="--overwrite"):
        read(path)


def test_two_evaluations_cannot_write_one_file(path: Path) -> None:
    with closing(ProgressFile(path, HEADER)), pytest.raises(InputError, match="another evaluation is writing it"):
        ProgressFile(path, HEADER)
    assert read(path) == ROWS[:3]
