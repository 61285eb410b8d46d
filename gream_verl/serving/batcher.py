"""Requests that arrive together, computed together."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import Empty, Full, Queue
from typing import Generic, TypeVar

Question = TypeVar("Question")
Reply = TypeVar("Reply")


class Batcher(Generic[Question, Reply]):
    """A thread that computes questions, in batches of those that wait.

    While a batch is computed, the next ones gather. After a batch of several the thread waits for company, for
    ``window`` seconds; after a lonely question it does not.

    Args:
        compute: Returns the reply to each question of a batch.
        most: Most questions of a batch.
        window: Seconds that the first question waits for others.
        queue: Most questions that wait; one more raises ``queue.Full``.
        observe: Is told the size of each batch.
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
        """Return the future reply; cancel it, and a question that still waits is not computed."""
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
        window = 0.0
        while (first := self.waiting.get()) is not None:
            batch, deadline = [first], time.monotonic() + window
            ending = False
            while len(batch) < self._most and not ending:
                try:
                    following = self.waiting.get(timeout=max(0.0, deadline - time.monotonic()))
                except Empty:
                    break
                ending = following is None
                if following is not None:
                    batch.append(following)
            live = [(question, future) for question, future in batch if future.set_running_or_notify_cancel()]
            window = self._window * (len(batch) > 1)
            if live:
                self._answer(live)
            if ending:
                return

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
