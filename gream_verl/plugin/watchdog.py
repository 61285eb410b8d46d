"""A watchdog that ends a hanging process, so that a job scheduler or a person can start it again."""

from __future__ import annotations

import os
import sys
import threading
import time


class Watchdog:
    """Ends this process with status 1 and a message when it was not fed for some seconds.

    verl waits without a limit where a peer has died, such as a rollout engine between sampling and the next weight
    update (verl/workers/rollout/vllm_rollout/bucketed_weight_transfer.py:136).
    """

    def __init__(self, seconds: float, message: str) -> None:
        self._seconds, self._message, self._fed = seconds, message, 0.0
        self._thread: threading.Thread | None = None

    def feed(self) -> None:
        """Start the time again; the first call starts the watch."""
        self._fed = time.monotonic()
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="gream-watchdog", daemon=True)
            self._thread.start()

    def _watch(self) -> None:
        while (left := self._fed + self._seconds - time.monotonic()) > 0:
            time.sleep(left)
        print(self._message, file=sys.stderr, flush=True)
        time.sleep(2)  # Ray takes what a process prints to the driver, and needs a moment for it
        os._exit(1)  # the main thread hangs: it cannot be asked
