"""Running of a list of commands: a finished step is kept, a changed one runs again, a stopped training goes on.

A stamp in ``RUN/.steps`` holds the fingerprint of a step: of its command and of every file it reads.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from gream_verl import __version__
from gream_verl.core.checkpoints import drop_torn_checkpoints
from gream_verl.core.errors import InputError
from gream_verl.core.files import fingerprint, hold, read_json, require_file, write_json

LOG_TAIL = 25


@dataclass(frozen=True)
class Step:
    """One command of a pipeline.

    Attributes:
        name: Its name, also of its stamp and its log.
        command: What a shell would run; ``python``, ``gream`` and ``llamafactory-cli`` are those of this environment.
        reads: Files and folders (the files directly in them) whose change makes the step run again.
        makes: Files that are there once it is done.
        checkpoints: Folder of a training, from which the framework goes on after a stop. Checkpoints of other inputs
            are moved aside, to ``<folder>.previous``, and the output goes to ``RUN/logs`` instead of the terminal.
        timeout: Seconds after which it is stopped.
    """

    name: str
    command: str
    reads: Sequence[Path] = ()
    makes: Sequence[Path] = ()
    checkpoints: Path | None = None
    timeout: float = 7200.0


def stamp_file(folder: Path, name: str) -> Path:
    """Return the stamp of a step. It changes with every run of the step: read it where results are never the same."""
    return folder / ".steps" / f"{name}.json"


def run_steps(folder: Path, steps: Sequence[Step], console: Console) -> list[str]:
    """Run ``steps`` in order in the folder of a run and return the names of those that were not kept."""
    done = []
    lock = folder / ".steps" / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        hold(file, f"{folder}: in use by another run; wait for it or choose another folder")
        for number, step in enumerate(steps, start=1):
            console.rule(f"[bold]{number}/{len(steps)} {step.name}", align="left")
            shown = " ".join(step.command.split())
            console.print(f"$ {shown}", style="cyan", highlight=False, markup=False, soft_wrap=True)
            stamp, digest = stamp_file(folder, step.name), _digest(step)
            last = read_json(stamp) if stamp.is_file() else {}
            same = last.get("fingerprint") == digest
            if same and last.get("finished") and all(path.exists() for path in step.makes):
                console.print("kept from an earlier run", style="green")
                continue
            if step.checkpoints and same:
                drop_torn_checkpoints(step.checkpoints)
            elif step.checkpoints and step.checkpoints.exists():
                previous = step.checkpoints.with_name(f"{step.checkpoints.name}.previous")
                shutil.rmtree(previous, ignore_errors=True)
                step.checkpoints.rename(previous)
                console.print(f"{step.checkpoints} is of other inputs: moved to {previous}", style="yellow")
            start = time.time()
            write_json(stamp, {"fingerprint": digest})
            _execute(step, folder / "logs" / f"{step.name}.log", console)
            seconds = time.time() - start
            write_json(stamp, {"fingerprint": digest, "seconds": seconds, "finished": time.time()})
            console.print(f"done in {seconds:.0f} s", style="green")
            done.append(step.name)
    return done


def _digest(step: Step) -> str:
    """Return a hash of the command of a step and of all that it reads."""
    digest = hashlib.sha256(f"{__version__} {step.command}".encode())
    for path in step.reads:
        files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
        for file in files:
            require_file(file, "run the whole pipeline again")
            digest.update(f"{file} {fingerprint(file)}".encode())
    return digest.hexdigest()


def _execute(step: Step, log: Path, console: Console) -> None:
    """Run the command of a step to its end; nothing that it started outlives this call or this process."""
    log.parent.mkdir(parents=True, exist_ok=True)
    logged, deadline = step.checkpoints is not None, time.monotonic() + step.timeout
    # the commands of this interpreter come first, and output is not held back
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    with log.open("wb") as output, console.status("") if logged else contextlib.nullcontext() as status:
        process = subprocess.Popen(
            shlex.split(step.command),
            stdin=subprocess.DEVNULL,
            stdout=output if logged else None,
            stderr=output if logged else None,
            env={**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"},
            start_new_session=True,
            preexec_fn=lambda: ctypes.CDLL(None).prctl(1, signal.SIGTERM),  # PR_SET_PDEATHSIG: end with the parent
        )
        try:
            while process.poll() is None and time.monotonic() < deadline:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.2)
                if status is not None:
                    status.update(f"{log}: {''.join(log_lines(log)[-1:])}"[: max(20, console.width - 8)])
            code = process.poll()
        finally:
            _stop(process)
    missing = ", ".join(str(path) for path in step.makes if not path.exists())
    if code == 0 and not missing:
        return
    reason = f"failed with exit status {code}" if code else f"did not make {missing}"
    reason = f"took more than {step.timeout:.0f} s and was stopped" if code is None else reason
    tail = [*log_lines(log)[-LOG_TAIL:], f"the whole log is {log}"] if logged else []
    raise InputError("\n".join([*tail, f"step {step.name!r} {reason}; earlier steps are kept"]))


def log_lines(log: Path) -> list[str]:
    """Return the last lines of a log; each state of a progress bar is a line."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16384))
        lines = file.read().decode("utf-8", errors="replace").replace("\r", "\n").split("\n")
    return [line for line in lines if line.strip()]


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and everything below it: politely first, so that a training can clean up."""
    import psutil

    if process.poll() is not None:
        return
    left = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for seconds, end in ((10, psutil.Process.terminate), (5, psutil.Process.kill)):
        for one in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                end(one)
        _, left = psutil.wait_procs(left, timeout=seconds)
