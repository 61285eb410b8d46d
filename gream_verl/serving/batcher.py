"""Requests that arrive together, computed together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, Full, Queue
from typing import Generic, TypeVar

Question = TypeVar("Question")
Reply = TypeVar("Reply")


class Batcher(Generic[Question, Reply]):
    """A thread that computes questions, in batches of those that wait.

    While a batch is computed, the next questions gather. After a batch of several, the first question of the next one
    waits ``window`` seconds for others. After a single question it does not wait.

    Args:
        compute: Returns the reply to each question of a batch.
        most: Most questions of a batch.
        window: Seconds that the first question waits for others.
        queue: Most questions that wait; one more raises ``queue.Full``.
        observe: Receives the size of each batch.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[Question]], Sequence[Reply]],
        *,
        most: int = 32,
        window: float = 0.002,
        queue: int = 256,
        observe: Callable[[int], object] = lambda size: None,
    ) -> None:
        self._compute, self._most, self._window, self._observe = compute, most, window, observe
        self.waiting: Queue[tuple[Question, Future[Reply]] | None] = Queue(queue)
        self._closed, self._lock = False, threading.Lock()
        self._thread = threading.Thread(target=self._work, daemon=True, name="gream-batcher")
        self._thread.start()

    def submit(self, question: Question) -> Future[Reply]:
        """Return the future reply. Cancelling it drops a question that is not yet computed."""
        future: Future[Reply] = Future()
        with self._lock:
            if self._closed:
                raise Full
            self.waiting.put_nowait((question, future))
        return future

    def close(self) -> None:
        """Compute what waits, then end the thread."""
        with self._lock:
            self._closed = True
        self.waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        window, wait = 0.0, self.waiting.get
        one = wait()
        while one is not None:
            batch, deadline = [one], time.monotonic() + window
            with suppress(Empty):
                while len(batch) < self._most and (one := wait(timeout=max(0.0, deadline - time.monotonic()))):
                    batch.append(one)
            live = [(question, future) for question, future in batch if future.set_running_or_notify_cancel()]
            window = self._window * (len(batch) > 1)
            if live:
                self._answer(live)
            if one is not None:  # None ends the thread
                one = wait()

    def _answer(self, live: Sequence[tuple[Question, Future[Reply]]]) -> None:
        self._observe(len(live))
        try:
            replies = self._compute([question for question, _ in live])
        except Exception as error:  # of any kind: it belongs to those who asked
            for _, future in live:
                future.set_exception(error)
        else:
            for (_, future), reply in zip(live, replies, strict=True):
                future.set_result(reply)
