from __future__ import annotations

import threading
from collections.abc import Sequence
from queue import Full

import pytest

from gream_verl.serving.batcher import Batcher


def test_questions_that_wait_are_computed_together_and_in_order() -> None:
    gate, sizes = threading.Event(), []

    def compute(questions: Sequence[int]) -> list[int]:
        gate.wait(20)
        return [2 * question for question in questions]

    batcher = Batcher(compute, most=4, window=0.05, observe=sizes.append)
    futures = [batcher.submit(number) for number in range(11)]
    gate.set()
    assert [future.result(20) for future in futures] == [2 * number for number in range(11)]
    assert sizes == [4, 4, 3]
    batcher.close()


def test_a_full_queue_refuses_and_a_cancelled_question_costs_nothing() -> None:
    gate, seen = threading.Event(), []

    def compute(questions: Sequence[int]) -> Sequence[int]:
        gate.wait(20)
        seen.extend(questions)
        return questions

    batcher = Batcher(compute, most=1, window=0, queue=2)
    first = batcher.submit(0)
    while not batcher.waiting.empty():
        pass
    waiting = [batcher.submit(1), batcher.submit(2)]
    with pytest.raises(Full):
        batcher.submit(3)
    assert waiting[0].cancel()
    gate.set()
    assert (first.result(20), waiting[1].result(20)) == (0, 2)
    assert seen == [0, 2]
    batcher.close()


def test_an_error_belongs_to_those_who_asked_and_the_next_are_answered() -> None:
    batcher = Batcher(lambda questions: [1 // question for question in questions], window=0)
    with pytest.raises(ZeroDivisionError):
        batcher.submit(0).result(20)
    assert batcher.submit(1).result(20) == 1
    batcher.close()
    with pytest.raises(Full):
        batcher.submit(1)


def test_closing_answers_what_waits() -> None:
    batcher = Batcher(lambda questions: questions, most=2, window=0)
    futures = [batcher.submit(number) for number in range(20)]
    batcher.close()
    assert [future.result(0) for future in futures] == list(range(20))
