from __future__ import annotations

import multiprocessing
import os
import signal
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from data_processing.teacher.store import Answer, AnswerStore
from gream_verl.core.errors import InputError

TEXTS = st.text("a\x00\n\\\"'é\u2028\U0001f600")


def request(number: int) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": str(number)}]}


def answer(text: str, prompt: int = 1, completion: int = 1) -> Answer:
    return Answer(text=text, finish="stop", prompt=prompt, completion=completion)


@pytest.mark.parametrize(
    ("choice", "text", "finish"),
    [
        ({"message": {"content": "hi"}, "finish_reason": "stop"}, "hi", "stop"),
        ({"message": {"content": None}, "finish_reason": "length"}, "", "length"),
        ({"message": {"content": "hi"}}, "hi", None),
    ],
)
def test_a_completion_is_read(choice: dict[str, Any], text: str, finish: str | None) -> None:
    usage = {"prompt_tokens": 9, "completion_tokens": 5}
    read = Answer.model_validate({"choices": [choice], "usage": usage})
    assert read == Answer(text=text, finish=finish, prompt=9, completion=5)
    for wrong in ({"choices": []}, {"usage": None}, {"usage": usage | {"prompt_tokens": -1}}, {"choices": [{}]}):
        with pytest.raises(ValidationError):
            Answer.model_validate({"choices": [choice], "usage": usage} | wrong)


@given(text=TEXTS)
@settings(max_examples=20)
def test_any_text_comes_back_as_it_was_given(text: str) -> None:
    with closing(AnswerStore(":memory:")) as store:
        store.put(request(0), answer(text))
        assert store.get(request(0)) == answer(text)


def test_a_file_holds_the_first_answer_to_each_request(tmp_path: Path) -> None:
    with closing(AnswerStore(tmp_path / "x.sqlite")) as store:
        for number in range(5):
            assert store.get(request(number)) is None
            store.put(request(number), answer(f"first {number}", number, 2 * number))
            store.put(request(number), answer("second"))
    with closing(AnswerStore(tmp_path / "x.sqlite")) as store:
        for number in range(5):
            turned = dict(reversed(request(number).items()))
            assert store.get(turned) == answer(f"first {number}", number, 2 * number)
        assert store.get(request(5)) is None
        assert store.tokens() == (10, 20)


def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with (
        closing(AnswerStore(tmp_path / "x.sqlite")),
        pytest.raises(InputError, match=r"x\.sqlite: .*locked; wait until the other run has ended"),
    ):
        AnswerStore(tmp_path / "x.sqlite")
    (tmp_path / "y.sqlite").write_text("no database, but a text that is long enough" * 100)
    with pytest.raises(InputError, match=r"y\.sqlite: file is not a database; .*move the file away"):
        AnswerStore(tmp_path / "y.sqlite")


def test_a_full_disk_is_a_sentence_and_loses_no_earlier_answer(tmp_path: Path) -> None:
    path = tmp_path / "x.sqlite"
    with closing(AnswerStore(path)) as store:
        store._file.execute("PRAGMA max_page_count = 20")  # as a disk of 80 kB
        kept = 0
        with pytest.raises(InputError, match="full; free some space"):
            for number in range(1000):
                store.put(request(number), answer("x" * 1000))
                kept += 1
    with closing(AnswerStore(path)) as store:
        assert kept > 10
        assert all(store.get(request(number)) for number in range(kept))


def _write_for_ever(path: Path, first: int) -> None:
    with closing(AnswerStore(path)) as store:
        for number in range(first, 10**9):
            store.put(request(number), answer(f"answer {number} " + "x" * 5000))
            path.with_suffix(".count").write_text(str(number))


def test_kill_9_while_writing_loses_and_halves_nothing(tmp_path: Path) -> None:
    path, count = tmp_path / "x.sqlite", tmp_path / "x.count"
    context = multiprocessing.get_context("fork")
    number = -1
    for _ in range(2):
        process = context.Process(target=_write_for_ever, args=(path, number + 1))
        process.start()
        deadline = time.monotonic() + 60
        while (int(count.read_text() or 0) if count.exists() else 0) < number + 30:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        with closing(AnswerStore(path)) as store:
            counted = int(count.read_text() or 0)  # empty: killed between two writes
            assert all(store.get(request(one)).text.startswith(f"answer {one} ") for one in range(counted + 1))
            number = counted
            while store.get(request(number + 1)):
                number += 1
