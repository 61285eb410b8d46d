from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import load_benchmark
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import make_data

from gream_verl.core.errors import InputError
from gream_verl.core.split import UserSplit, by_time, leave_one_out
from gream_verl.evaluation.prompts import Prompt
from gream_verl.evaluation.results import read_folder

sasrec = load_benchmark("baselines/sasrec.py")
Row = sasrec.Row
PROTOCOL = {"drop_history": True}
sequences = st.lists(st.lists(st.integers(0, 9), max_size=8), max_size=5)


def python_that(tmp_path: Path, script: str) -> Path:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@given(sequences, st.integers(1, 9))
def test_rows_are_the_beginnings_of_the_training_part_and_the_validation_item(
    users: list[list[int]], longest: int
) -> None:
    training, validation = sasrec.training_rows(users, [leave_one_out(len(user)) for user in users], longest)
    expected = []
    for number, user in enumerate(users):
        seen = user[:-2]
        while len(seen) > 1:
            *seen, target = seen
            expected.append((number, seen[-longest:], target))
    assert sorted(training) == sorted(expected)
    assert list(validation) == [
        (number, user[:-2][-longest:], user[-2]) for number, user in enumerate(users) if len(user) > 2
    ]


@given(st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=8).map(sorted), min_size=1, max_size=5))
@settings(deadline=None)
def test_nothing_from_the_first_moment_of_validation_on_is_trained_on(times: list[list[int]]) -> None:
    # Items are the moments themselves: what a row holds says when it was.
    splits = [by_time(user, 10, 15) for user in times]
    training, validation = sasrec.training_rows(times, splits, 50)
    assert all(moment < 10 for row in training for moment in (*row.history, row.target))
    for row in validation:
        assert max(row.history) <= row.target
        assert 10 <= row.target < 15


def test_the_files_are_recboles_with_whole_histories_and_all_items(tmp_path: Path) -> None:
    users = [[0, 1, 2, 3, 4], [4, 0], [5, 1, 6]]
    splits = [leave_one_out(len(user)) for user in users]
    tests = [Row(0, [0, 1, 2, 3], 4), Row(3, [6, 5], 1)]
    assert sasrec.write_data(tmp_path / sasrec.DATASET, users, splits, tests, 3, "x.inter.json") == 3

    def read(part: str) -> list[str]:
        return (tmp_path / sasrec.DATASET / f"{sasrec.DATASET}.{part}").read_text().splitlines()

    header = "user_id:token\titem_id_list:token_seq\titem_id:token"
    assert read("train.inter") == [header, "0\t0\t1", "0\t0 1\t2"]
    assert read("valid.inter") == [header, "0\t0 1 2\t3", "2\t5\t1"]
    assert read("test.inter") == [header, "0\t1 2 3\t4", "3\t6 5\t1"]
    assert read("item") == ["item_id:token", "0", "1", "2", "3", "4", "5", "6"]


@pytest.mark.parametrize(
    ("split", "missing"), [(UserSplit(1, 1, 2), "train"), (UserSplit(2, None, 2), "valid"), (UserSplit(2, 2, 3), "")]
)
def test_a_split_without_rows_is_refused(tmp_path: Path, split: UserSplit, missing: str) -> None:
    arguments: Any = (tmp_path / sasrec.DATASET, [[0, 1, 2, 3]], [split], [Row(0, [0, 1], 2)], 5, "x.inter.json")
    if not missing:
        assert sasrec.write_data(*arguments) == 2
        return
    with pytest.raises(InputError, match=rf"x.inter.json: its split leaves no row for {missing}"):
        sasrec.write_data(*arguments)


def test_the_environment_is_named_or_in_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = python_that(tmp_path, "exit 0")
    assert sasrec.recbole_python(python) == python
    monkeypatch.setenv(sasrec.PYTHON_VARIABLE, str(python))
    assert sasrec.recbole_python() == python
    monkeypatch.setenv(sasrec.PYTHON_VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match=r"nowhere: no such file; .* `make recbole`"):
        sasrec.recbole_python()


@pytest.mark.parametrize(
    ("history", "target", "message"),
    [((), "1", "user 'u' has no history"), (("9",), "1", "item '9' is not in"), (("1",), "9", "item '9' is not in")],
)
def test_prompts_that_do_not_fit_are_refused(
    tmp_path: Path, history: tuple[str, ...], target: str, message: str
) -> None:
    inter = tmp_path / "t.inter.json"
    inter.write_text(json.dumps({"u": ["0", "1", "2", "3"]}))
    with pytest.raises(InputError, match=message):
        sasrec.evaluate_recbole(
            inter, [Prompt("u", target, history, [], "")], [], PROTOCOL, python=python_that(tmp_path, "exit 0")
        )


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("""echo '{"error": "ValueError: no such model"}'; echo why >&2; exit 1""", "ValueError: no such model"),
        ("echo why >&2; exit 3", "exit status 3"),
        ("echo why >&2", "exit status 0"),
    ],
)
def test_a_failed_training_says_why_and_where_the_log_is(tmp_path: Path, script: str, reason: str) -> None:
    inter, log = tmp_path / "t.inter.json", tmp_path / "logs" / "model.log"
    log.parent.mkdir()
    log.write_text("of a training that ended well")
    inter.write_text(json.dumps({"u": ["0", "1", "2", "3"]}))
    with pytest.raises(InputError, match=rf"could not train GRU4Rec \({reason}\); its log: .*model.failed.log"):
        sasrec.evaluate_recbole(
            inter, [Prompt("u", "3", ("0", "1", "2"), [], "")], ["3"], PROTOCOL, model="GRU4Rec",
            python=python_that(tmp_path, script), log_file=log,
        )  # fmt: skip
    assert log.with_suffix(".failed.log").read_text() == "why\n"
    assert log.read_text() == "of a training that ended well"


@pytest.mark.parametrize("longest", [0, "20", 2.5, None])
def test_a_longest_history_that_is_no_number_is_refused(tmp_path: Path, longest: Any) -> None:
    inter = tmp_path / "t.inter.json"
    inter.write_text(json.dumps({"u": ["0", "1", "2", "3"]}))
    prompts, parameters = [Prompt("u", "3", ("0",), [], "")], {"MAX_ITEM_LIST_LENGTH": longest}
    with pytest.raises(InputError, match=r"MAX_ITEM_LIST_LENGTH=.*: expected a number of items"):
        sasrec.evaluate_recbole(
            inter, prompts, [], PROTOCOL, parameters=parameters, python=python_that(tmp_path, "exit 0")
        )


def test_parameters_are_yaml_values() -> None:
    assert sasrec.read_parameters(["a=1", "b=0.5", "c=CE", "d=[1, 2]", "e=~"]) == {
        "a": 1, "b": 0.5, "c": "CE", "d": [1, 2], "e": None,
    }  # fmt: skip


@pytest.mark.parametrize("text", ["a", "=1", "a=[1"])
def test_a_parameter_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="expected NAME=VALUE"):
        sasrec.read_parameters([text])


WORKER = """
import json, sys
import numpy as np
job = json.load(open(sys.argv[-1]))
rows = open(job["data"] + "/gream/gream.test.inter").read().splitlines()[1:]
dropped = np.load(job["dropped"])
parts = np.split(dropped["items"], np.cumsum(dropped["lengths"])[:-1])
k = max(job["cutoffs"])
items = np.array([[item for item in range(100) if item not in part][:k] for part in parts])
users = np.array([int(row.split("\\t")[0]) for row in rows])
np.savez(job["lists"], users=users, items=items, scores=-items.astype(np.float32))
training = {"epochs": 3, "best_epoch": 2, "valid_score": 0.5, "stopped_by": "epochs", "seconds": 1.0}
about = {"parameters": job["parameters"], "trained_parameters": 1, "device": "cpu", "threads": 1}
print(json.dumps({"training": training, "metrics": {}, "versions": {}, **about}))
"""


def test_the_script_writes_a_result_that_the_tables_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_data(tmp_path)
    (tmp_path / "worker.py").write_text(WORKER)
    python = python_that(tmp_path, f'exec {sys.executable} {tmp_path / "worker.py"} "$@"')
    arguments = [str(tmp_path), "--limit", "5", "--set", "hidden_size=8", "--python", str(python)]
    sasrec.main(arguments)
    evaluation = read_folder(tmp_path / "evaluation")["sasrec"]
    sequences = data.read_inter()
    known = sorted({item for sequence in sequences.values() for item in sequence})
    for row in evaluation.rows:
        past = sequences[row["user"]][:-1]
        assert row["target"] == sequences[row["user"]][-1]
        assert row["recommended"] == [item for item in known if item not in past][:30]
    assert (len(evaluation.rows), evaluation.settings["parameters"]["hidden_size"]) == (5, 8)
    assert evaluation.is_baseline
    assert evaluation.intervals
    assert "3 epochs, the best 2; stopped by epochs." in capsys.readouterr().out
    with pytest.raises(InputError, match="holds another result"):
        sasrec.main([*arguments, "--limit", "4"])
