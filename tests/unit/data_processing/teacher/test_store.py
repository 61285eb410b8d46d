from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_processing.teacher.store import Answer, AnswerStore, request_key
from gream_verl.core.errors import InputError

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


def key(number: int) -> str:
    return request_key({"number": number})


def test_the_key_depends_on_what_is_asked_and_not_on_the_order_of_fields() -> None:
    assert request_key({"a": 1, "b": [1, 2]}) == request_key({"b": [1, 2], "a": 1})
    assert request_key({"a": 1, "b": [1, 2]}) != request_key({"a": 1, "b": [2, 1]})


@given(texts=st.lists(TEXTS, max_size=8))
def test_answers_come_back_as_they_were_given_also_from_the_file(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str]
) -> None:
    path = tmp_path_factory.mktemp("store") / "x.jsonl"
    answers = [Answer(text, "stop", number, 2 * number) for number, text in enumerate(texts)]
    with AnswerStore(path) as store:
        for number, answer in enumerate(answers):
            assert store.get(key(number)) is None
            store.put(key(number), "m", answer)
            assert store.get(key(number)) == answer
    with AnswerStore(path) as store:
        assert [store.get(key(number)) for number in range(len(answers))] == answers
        assert len(store) == len(answers)
        assert store.prompt_tokens == sum(answer.prompt_tokens for answer in answers)
        assert store.completion_tokens == 2 * store.prompt_tokens
    assert path.read_bytes().count(b"\n") == len(answers)


def test_a_request_has_one_answer(tmp_path: Path) -> None:
    with AnswerStore(tmp_path / "x.jsonl") as store:
        store.put(key(0), "m", Answer("a", "stop", 1, 1))
        with pytest.raises(ValueError, match="answered already"):
            store.put(key(0), "m", Answer("b", "stop", 1, 1))
        assert len(store) == 1


@pytest.mark.parametrize("torn", [b"{", b'{"key": "0123', b'{"key": "00", "text": "half of \xc3'])
def test_a_torn_last_line_is_removed_and_the_rest_kept(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "x.jsonl"
    with AnswerStore(path) as store:
        store.put(key(0), "m", Answer("whole", "stop", 1, 1))
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    with AnswerStore(path) as store:
        assert store.get(key(0)) == Answer("whole", "stop", 1, 1)
        store.put(key(1), "m", Answer("next", "stop", 1, 1))
    assert path.read_bytes().startswith(whole)
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == ["whole", "next"]


def test_a_damaged_line_elsewhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    with AnswerStore(path) as store:
        store.put(key(0), "m", Answer("a", "stop", 1, 1), cost=0.5)
    whole = path.read_text()
    for damaged in ('{"key": \n', whole.replace('"text": "a", ', "")):
        path.write_text(whole + damaged)
        with pytest.raises(InputError, match=r"x\.jsonl: line 2 is damaged; remove that line"):
            AnswerStore(path)
    path.write_text(whole)
    with AnswerStore(path) as store:
        assert store.cost == 0.5


def test_two_runs_cannot_write_at_once(tmp_path: Path) -> None:
    with (
        AnswerStore(tmp_path / "x.jsonl"),
        pytest.raises(InputError, match="another run is writing"),
    ):
        AnswerStore(tmp_path / "x.jsonl")


def _write_for_ever(path: Path) -> None:
    with AnswerStore(path) as store:
        for number in range(len(store), 10**9):
            store.put(key(number), "m", Answer(f"answer {number} " + "x" * 5000, "stop", 1, 1))


def test_kill_9_while_writing_loses_and_halves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    context = multiprocessing.get_context("spawn")
    before = 0
    for _ in range(3):
        process = context.Process(target=_write_for_ever, args=(path,))
        process.start()
        deadline = time.monotonic() + 60
        while (path.stat().st_size if path.exists() else 0) < before + 200_000 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        with AnswerStore(path) as store:
            assert len(store) > before // 5100
            assert all(store.get(key(number)).text.startswith(f"answer {number} ") for number in range(len(store)))
        before = path.stat().st_size
    assert len({json.loads(line)["key"] for line in path.open()}) == sum(1 for _ in path.open())


def _fill_the_disk(path: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    with AnswerStore(path) as store:
        with pytest.raises(InputError, match="free some space"):
            for number in range(100):
                store.put(key(number), "m", Answer("x" * 300, "stop", 1, 1))
        os._exit(7)


def test_a_full_disk_is_a_sentence_and_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    process = multiprocessing.get_context("spawn").Process(target=_fill_the_disk, args=(path,))
    process.start()
    process.join(60)
    assert process.exitcode == 7
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) > 10
    assert all(line.endswith("}\n") for line in lines)
