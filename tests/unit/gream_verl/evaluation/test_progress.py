from __future__ import annotations

import json
from pathlib import Path
from typing import IO

import pytest

import gream_verl.evaluation.progress
from gream_verl.core.errors import InputError
from gream_verl.core.files import hold
from gream_verl.evaluation.progress import ProgressFile


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


def test_a_file_that_comes_to_the_place_before_it_is_held_is_not_wiped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "p.jsonl"
    for seed in (0, 1):
        with ProgressFile(path, {"seed": seed}) as progress:
            progress.add([{"user": f"of {seed}"}])
    hold, others = gream_verl.evaluation.progress.hold, [0, 1]

    def another_is_faster(file: IO[bytes], refusal: str) -> None:
        if others:  # between the opening of a file and its lock, of the first and of the next one
            seed = others.pop(0)
            with monkeypatch.context() as alone:
                alone.setattr(gream_verl.evaluation.progress, "hold", hold)
                assert rows_of(path, seed) == [f"of {seed}"]
        hold(file, refusal)

    monkeypatch.setattr(gream_verl.evaluation.progress, "hold", another_is_faster)
    assert rows_of(path, 2) == []
    assert not others
    monkeypatch.setattr(gream_verl.evaluation.progress, "hold", hold)
    for seed in (0, 1):
        assert rows_of(path, seed) == [f"of {seed}"]


def test_a_file_that_cannot_be_used_is_not_held_and_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    for content, sentence in ((b"notes of mine", "no progress file"), (b'{"settings": {}}\n{}\n', "line 2 ")):
        path.write_bytes(content)
        for _ in range(2):
            with pytest.raises(InputError, match=sentence) as kept:  # with its traceback, which has the file
                ProgressFile(path, {})
            assert path.read_bytes() == content
            with path.open("rb") as file:
                hold(file, "held")
        del kept


def test_finished_users_are_never_overwritten_by_those_of_the_same_settings(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    assert rows_of(path, 0) == rows_of(path, 1) == []
    [aside] = [other for other in tmp_path.iterdir() if other != path]
    before = aside.read_bytes()
    path.write_bytes(before)
    with pytest.raises(InputError, match="are of the same settings; delete one"):
        ProgressFile(path, {"seed": 2})
    assert aside.read_bytes() == path.read_bytes() == before


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
