from __future__ import annotations

import json
from pathlib import Path

import pytest

from gream_verl.evaluation.progress import ProgressFile
from gream_verl.files import InputError


def rows_of(path: Path, seed: int) -> list[str]:
    with ProgressFile(path, {"seed": seed}) as progress:
        return list(progress.rows)


def test_rows_are_on_the_disk_when_added_and_read_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "p.jsonl"
    row = {"user": "a", "chains": [{"text": "line\u0085 \u2028end\n"}]}
    with ProgressFile(path, {"seed": 0}) as progress:
        progress.add([row])
        assert json.loads(path.read_bytes().split(b"\n")[1]) == row
        progress.add([row, {"user": "b"}])
        assert path.read_bytes().count(b"\n") == 3
    with ProgressFile(path, {"seed": 0}) as progress:
        assert progress.rows == {"a": row, "b": {"user": "b"}}


def test_a_kill_costs_the_line_that_was_being_written_whatever_byte_it_came_at(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with ProgressFile(path, {"seed": 0}) as progress:
        progress.add([{"user": "a"}, {"user": "b"}])
    whole = path.read_bytes()
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        complete = max(0, whole[:end].count(b"\n") - 1)
        with ProgressFile(path, {"seed": 0}) as progress:
            assert list(progress.rows) == ["a", "b"][:complete]
            progress.add([{"user": "c"}])
        assert rows_of(path, 0) == [*["a", "b"][:complete], "c"]
        assert [*tmp_path.iterdir()] == [path]


def test_rows_of_other_settings_are_moved_aside_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    for seed in (0, 1, 2):
        with ProgressFile(path, {"seed": seed}) as progress:
            assert not progress.rows
            progress.add([{"user": f"of {seed}"}])
    for seed in (1, 0, 2, 2, 1):
        assert rows_of(path, seed) == [f"of {seed}"]
    assert len([*tmp_path.iterdir()]) == 3
    path.unlink()  # those of seed 1; the others still stand aside
    assert rows_of(path, 0) == ["of 0"]


def test_two_evaluations_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with ProgressFile(path, {"seed": 0}) as progress:
        for seed in (0, 1):
            with pytest.raises(InputError, match="another evaluation"):
                ProgressFile(path, {"seed": seed})
        progress.add([{"user": "a"}])
    assert rows_of(path, 0) == ["a"]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with ProgressFile(path, {}) as progress:
        progress.add([{"user": "a"}, {"user": "b"}])
    path.write_bytes(path.read_bytes().replace(b'{"user": "b"}', b"nothing"))
    with pytest.raises(InputError, match="line 3 "):
        ProgressFile(path, {})


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        ProgressFile(tmp_path / "file" / "p.jsonl", {})


def test_without_a_path_rows_are_kept_in_memory() -> None:
    with ProgressFile(None, {}) as progress:
        progress.add([{"user": "a"}])
        assert progress.rows == {"a": {"user": "a"}}
