"""The processes below one process, for tests that start a framework."""

from __future__ import annotations

import contextlib
import signal

import psutil


class ProcessTree:
    """The processes below one process: their peak memory, and their end.

    Ray's daemons leave the process group of their driver, so every descendant is remembered by id and start time.
    """

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._root = psutil.Process(pid)
        self._known: set[psutil.Process] = {self._root}

    def sample(self) -> None:
        """Remember new descendants and the peak of the memory all of them hold together, in bytes."""
        try:
            self._known.update(self._root.children(recursive=True))
        except psutil.NoSuchProcess:
            return
        total = 0
        for process in self._known:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:
                continue
        self.peak = max(self.peak, total)

    def stop(self) -> None:
        """End every process that is still there: politely first, so that a training run can clean up."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._known.update(self._root.children(recursive=True))
        left = list(self._known)
        for deadline, send in ((10.0, signal.SIGTERM), (5.0, signal.SIGKILL)):
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(send)
            _, left = psutil.wait_procs(left, timeout=deadline)
