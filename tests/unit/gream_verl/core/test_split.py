from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gream_verl.core.errors import InputError
from gream_verl.core.files import write_json
from gream_verl.core.split import by_time, leave_one_out, read_splits, training_parts

SEQUENCES = {"0": ["a", "b", "c", "d", "e"], "1": ["a", "b"]}


@given(length=st.integers(0, 30))
def test_leave_one_out_holds_out_the_last_two_and_needs_one_to_learn_from(length: int) -> None:
    training, validation, test = leave_one_out(length)
    places = list(range(length))
    if length > 2:
        assert [*places[:training], validation, test] == places
    else:
        assert (training, validation, test) == (0, None, None)


@given(
    times=st.lists(st.integers(0, 20), max_size=12).map(sorted),
    moments=st.tuples(st.integers(0, 21), st.integers(0, 21)).map(sorted),
)
def test_a_temporal_split_knows_nothing_of_the_time_it_is_tested_on(times: list[int], moments: list[int]) -> None:
    first, second = moments
    training, validation, test = by_time(times, first, second)
    assert all(time < first for time in times[:training])
    assert all(time >= first for time in times[training:])
    if validation is not None:
        assert validation == training > 0
        assert first <= times[validation] < second
    if test is not None:
        assert times[test] >= second
        assert all(time < second for time in times[:test])
        assert test > 0
    if training and any(time >= second for time in times):
        assert test is not None


def test_without_a_file_the_last_two_are_held_out(tmp_path: Path) -> None:
    assert training_parts(tmp_path / "x.inter.json", SEQUENCES) == {"0": ["a", "b", "c"], "1": []}


def test_a_file_next_to_the_interactions_says_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "x.inter.json"
    write_json(tmp_path / "x.split.json", {"users": {"0": [1, None, 3], "1": [2, None, None]}})
    assert training_parts(path, SEQUENCES) == {"0": ["a"], "1": ["a", "b"]}
    assert read_splits(path, SEQUENCES)["0"] == (1, None, 3)


@pytest.mark.parametrize(
    ("users", "said"),
    [
        (None, "expected {users:"),
        ({"0": [1, None, 3]}, "its users are not those of"),
        ({"0": [1, 3], "1": [0, None, None]}, "user '0': expected [training, validation"),
        ({"0": [1, 2, "3"], "1": [0, None, None]}, "user '0': expected [training, validation"),
        ({"0": [None, 2, 3], "1": [0, None, None]}, "user '0': [None, 2, 3] is no split of 5"),
        ({"0": [1, 3, 2], "1": [0, None, None]}, "user '0': [1, 3, 2] is no split of 5 interactions"),
        ({"0": [3, 2, 4], "1": [0, None, None]}, "user '0': [3, 2, 4] is no split of 5 interactions"),
        ({"0": [3, 3, 5], "1": [0, None, None]}, "user '0': [3, 3, 5] is no split of 5 interactions"),
        ({"0": [0, 0, 1], "1": [0, None, None]}, "user '0': [0, 0, 1] is no split of 5 interactions"),
        ({"0": [-1, None, 1], "1": [0, None, None]}, "user '0': [-1, None, 1] is no split of 5 interactions"),
        ({"0": [6, None, None], "1": [0, None, None]}, "user '0': [6, None, None] is no split of 5 interactions"),
    ],
)
def test_a_split_of_something_else_is_refused(tmp_path: Path, users: object, said: str) -> None:
    path = tmp_path / "x.inter.json"
    write_json(tmp_path / "x.split.json", {"users": users})
    with pytest.raises(InputError, match=re.escape(said)):
        read_splits(path, SEQUENCES)
