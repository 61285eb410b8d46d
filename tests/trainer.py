"""verl's own trainer as a child process, on a recipe and a tiny model: for tests that run the real thing."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil


class Training:
    """A run of ``python -m verl.trainer.main_ppo``.

    Args:
        run: Folder that has ``sft`` (the model) and ``data`` in it, see ``assets``.
        overrides: What differs from two short steps of the recipe.
        recipe: Value of ``+recipe``; None for a command of which ``overrides`` is the whole.
        rollout: ``hf`` for the rollouts of ``hf_rollout``; else no environment variable is set.
        python: Interpreter of the environment to run in.
    """

    def __init__(
        self,
        run: Path,
        *overrides: str,
        recipe: str | None = "gream_srpo_cpu",
        rollout: str = "vllm",
        python: str = sys.executable,
    ) -> None:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VLLM_", "VERL_"))}
        kept.pop("OMP_NUM_THREADS", None)
        if rollout == "hf":
            kept |= {"VERL_USE_EXTERNAL_MODULES": "hf_rollout_registration", "PYTHONPATH": str(Path(__file__).parent)}
        self.output = tempfile.TemporaryFile("w+", dir=run)  # noqa: SIM115 - closed with the test
        base = [
            *(f"+recipe={recipe}", f"gream.run={run}", "gream.dataset=tiny", "trainer.total_training_steps=2"),
            *("trainer.save_freq=2", "trainer.test_freq=2", "data.max_response_length=32"),
            *("data.train_batch_size=4", "actor_rollout_ref.actor.ppo_mini_batch_size=4"),
            *("actor_rollout_ref.rollout.n=4", f"actor_rollout_ref.rollout.name={rollout}"),
        ]
        self.process = subprocess.Popen(
            [python, "-m", "verl.trainer.main_ppo", *(base if recipe else []), *overrides],
            cwd=run, env=kept, stdout=self.output, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        # Ray's daemons leave the process group of their driver: every descendant is remembered.
        self.known = {psutil.Process(self.process.pid)}

    def printed(self) -> str:
        """Return what the run has printed so far, as plain text."""
        self.output.seek(0)
        return re.sub(r"\x1b\[[0-9;]*m", "", self.output.read())

    def wait_until(self, happened: Callable[[], Any], seconds: float = 300) -> None:
        """Wait until ``happened`` is true; fail when the run ends or time runs out before that."""
        deadline = time.monotonic() + seconds
        try:
            while not happened():
                code = self.process.poll()
                assert code is None, f"waited in vain, the run ended with {code}:\n{self._tail()}"
                assert time.monotonic() < deadline, f"waited in vain for {seconds} s:\n{self._tail()}"
                self._look()
        except BaseException:
            self.stop()
            raise

    def kill(self) -> None:
        """Kill the driver as the kernel does when memory runs out, and wait until nothing of the run is left."""
        self._look()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(timeout=30)
        self.stop()

    def children(self, name: str) -> list[psutil.Process]:
        """Return the processes below the driver whose command line holds ``name``."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if name in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def finish(self, seconds: float = 540, expect: int | None = 0) -> str:
        """Wait for the end and return what was printed.

        Args:
            seconds: When to give up and end it.
            expect: The exit status it must have; None for any other than 0.
        """
        deadline = time.monotonic() + seconds
        try:
            while self.process.poll() is None and time.monotonic() < deadline:
                self._look()
            hangs = self.process.poll() is None
        finally:
            self.stop()
        assert not hangs, f"main_ppo hangs:\n{self._tail()}"
        code = self.process.returncode
        assert code == expect if expect is not None else code != 0, f"ended with {code}:\n{self._tail()}"
        return self.printed()

    def stop(self) -> None:
        """End whatever is left of the run, Ray's daemons too: politely first."""
        left = list(self.known)
        for deadline, send in ((5.0, signal.SIGTERM), (5.0, signal.SIGKILL)):
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(send)
            _, left = psutil.wait_procs(left, timeout=deadline)

    def _look(self) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            self.known.update(psutil.Process(self.process.pid).children(recursive=True))
        time.sleep(0.3)

    def _tail(self) -> str:
        return self.printed()[-6000:]


def logged(run: Path) -> dict[int, dict[str, float]]:
    """Return the metrics of every step, of the last start that reached it."""
    logs = sorted(run.glob("srpo/logs/*/gream/srpo.jsonl"))
    records = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    return {record["step"]: record["data"] for record in records}


def rollouts(run: Path, step: int, folder: str = "rollouts") -> list[dict[str, Any]]:
    """Return the responses of a step as verl wrote them."""
    return [json.loads(line) for line in (run / f"srpo/{folder}/{step}.jsonl").read_text().splitlines()]
