"""Runs a pipeline of commands: each finished step is kept, a changed one is run again, a killed one goes on.

A step is a command a user could type, the files it reads and the files it makes. It counts as finished when a stamp
holds the fingerprint of its command and of everything it reads, and what it makes is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from gream_verl import __version__
from gream_verl.core.errors import InputError
from gream_verl.core.files import hold, read_json, write_json

SAMPLE_SECONDS = 5.0
QUIET_SECONDS = 15.0
LOG_TAIL = 25
LOG_END = 1 << 18
"""Bytes at the end of a log that are searched: each of eight ranks writes its own traceback."""
FULL = 1 << 20
"""A disk with fewer bytes left is full."""
TRACEBACK = "Traceback (most recent call last)"
FULL_DISK = re.compile(
    r".*(?:No space left on device|Disk quota exceeded|iostream error|PytorchStreamWriter failed|unexpected pos \d+).*"
)
"""What safetensors and Python say of a full disk; then torch.save, which does not know the reason."""
LOADING, TRAINING = "Loading dataset ", "Running training"
UNREADABLE = re.compile(
    r"Parquet magic bytes not found|Parquet file size is 0 bytes|Couldn't deserialize thrift"
    r"|KeyError: '(?:conversations|system|from|value)'|corresponds to no data|ValueError: File \S+ not found"
)
"""What LLaMA-Factory's libraries say of a SFT file, between these two lines of its log."""
OURS, SYSTEM = re.compile(r"InputError: (\S.*)"), re.compile(r"\[Errno \d+\].*")
NOISE = re.compile(r"\x1b\[[0-9;]*m|\(\w+ pid=\d+\) ?")
PR_SET_PDEATHSIG = 1
"""Of linux/prctl.h."""


@dataclass(frozen=True)
class Step:
    """One command of a pipeline.

    Attributes:
        name: Short name, used for the stamp and the log.
        title: What it does, for people.
        command: The words of the command; ``python``, ``gream`` and ``llamafactory-cli`` are those of this environment.
        reads: Files and folders it depends on.
        makes: Files and folders that are there once it is done.
        resumes: Folders of a training, from which the command goes on after a stop, such as checkpoints. When what the
            step reads has changed since, they are moved aside (to ``<folder>.previous``): they belong to another run.
        before: What to do right before the command is run.
        timeout: Seconds after which it is stopped.
        logged: Whether its output goes to a log file, with one line of progress on the terminal, instead of straight to
            the terminal.
    """

    name: str
    title: str
    command: Sequence[str]
    reads: Sequence[Path] = ()
    makes: Sequence[Path] = ()
    resumes: Sequence[Path] = ()
    before: Callable[[], None] | None = None
    timeout: float = 1800.0
    logged: bool = False


@dataclass
class StepResult:
    """What a step took.

    Attributes:
        seconds: Wall time of the run that finished it.
        memory: Peak memory of its process tree in bytes (proportional set size).
        reused: Whether an earlier run's result stood.
    """

    seconds: float
    memory: int
    reused: bool = False


@dataclass
class Pipeline:
    """Runs steps in order inside one run folder."""

    folder: Path
    console: Console = field(default_factory=Console)

    def run(self, steps: Sequence[Step]) -> dict[str, StepResult]:
        """Run ``steps`` in order and return what each took.

        Raises:
            InputError: When a step fails or runs out of time, earlier results stay; when the folder is in use.
        """
        results = {}
        with self._locked():
            for number, step in enumerate(steps, start=1):
                self.console.rule(f"[bold]{number}/{len(steps)} {step.title}", align="left")
                self.console.print(f"$ {shlex.join(step.command)}", style="cyan", highlight=False, soft_wrap=True)
                trainings = [self._stamp(made) for made in steps[: number - 1] if made.resumes and feeds(made, step)]
                results[step.name] = self._run_or_reuse(step, trainings)
        return results

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the folder: two pipelines in it would write the same checkpoints."""
        lock = self.folder / ".steps" / "lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as file:
            hold(file, f"{self.folder}: in use by another run; wait for it or choose another name")
            yield

    def _stamp(self, step: Step) -> Path:
        return self.folder / ".steps" / f"{step.name}.json"

    def _run_or_reuse(self, step: Step, trainings: Sequence[Path]) -> StepResult:
        stamp = self._stamp(step)
        fingerprint = fingerprint_step(step, trainings)
        if stamp.is_file() and all(path.exists() for path in step.makes):
            kept = read_json(stamp, "delete it and run again")
            if kept.get("fingerprint") == fingerprint:
                self.console.print(f"kept from an earlier run ({kept['seconds']:.0f} s then)", style="green")
                return StepResult(kept["seconds"], kept["memory"], reused=True)
        stamp.unlink(missing_ok=True)
        self._set_aside(step, fingerprint)
        result = self._execute(step)
        missing = [str(path) for path in step.makes if not path.exists()]
        if missing:
            raise InputError(f"step {step.name!r} ended without making {', '.join(missing)}; run its command by hand")
        finished = {"seconds": result.seconds, "memory": result.memory, "finished": time.time()}
        write_json(stamp, {"fingerprint": fingerprint, **finished})
        self.console.print(f"done in {result.seconds:.0f} s, {result.memory / 2**30:.1f} GiB at most", style="green")
        return result

    def _set_aside(self, step: Step, fingerprint: str) -> None:
        """Keep what a stopped run of the same step left; move aside what another run left."""
        started = self.folder / ".steps" / f"{step.name}.started"
        if started.is_file() and read_json(started).get("fingerprint") == fingerprint:
            return
        for folder in filter(Path.exists, step.resumes):
            previous = folder.with_name(f"{folder.name}.previous")
            shutil.rmtree(previous, ignore_errors=True)
            folder.rename(previous)
            self.console.print(f"{folder} is from other inputs: moved to {previous}", style="yellow", soft_wrap=True)
        write_json(started, {"fingerprint": fingerprint})

    def _execute(self, step: Step) -> StepResult:
        log = self.folder / "logs" / f"{step.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        if step.before is not None:
            step.before()
        start = time.monotonic()
        with log.open("wb") as output:
            process = subprocess.Popen(
                list(step.command),
                stdout=output if step.logged else None,
                stderr=subprocess.STDOUT if step.logged else None,
                stdin=subprocess.DEVNULL,
                env=environment(),
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
        tree = ProcessTree(process.pid)
        try:
            self._watch(step, process, tree, log, start)
        finally:
            tree.stop()
        if process.returncode != 0:
            raise InputError(_failure(step, process.returncode, log))
        return StepResult(time.monotonic() - start, tree.peak)

    def _watch(self, step: Step, process: subprocess.Popen[bytes], tree: ProcessTree, log: Path, start: float) -> None:
        """Wait for the end, sampling memory and showing the last line of the log."""
        shown = start
        with self.console.status("starting") if step.logged else _Nothing() as status:
            while True:
                try:
                    process.wait(SAMPLE_SECONDS if time.monotonic() - start > SAMPLE_SECONDS else 0.5)
                    return
                except subprocess.TimeoutExpired:
                    pass
                tree.sample()
                elapsed = time.monotonic() - start
                if elapsed > step.timeout:
                    raise InputError(
                        f"step {step.name!r} took more than {step.timeout:.0f} s and was stopped; see {log}"
                    )
                if not step.logged:
                    continue
                line = last_line(log)
                if self.console.is_terminal:
                    status.update(f"{elapsed:.0f} s  {line[: max(20, self.console.width - 14)]}")
                elif time.monotonic() - shown >= QUIET_SECONDS:
                    shown = time.monotonic()
                    self.console.print(
                        f"  {elapsed:4.0f} s  {line[:110]}", highlight=False, markup=False, soft_wrap=True
                    )


def _end_with_parent() -> None:
    """Ask Linux to end this child when its parent dies, also by kill -9: no training goes on unwatched."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class _Nothing:
    """Stands where a status line would, for steps that write to the terminal themselves."""

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def update(self, text: str) -> None:
        """Show nothing."""


class ProcessTree:
    """The processes below one process: their peak memory, and their end.

    Ray's daemons leave the process group of their driver, so every descendant is remembered by id and start time.
    """

    def __init__(self, pid: int) -> None:
        import psutil

        self.peak = 0
        self._root = psutil.Process(pid)
        self._known: set[psutil.Process] = {self._root}

    def sample(self) -> None:
        """Remember new descendants and the peak of the memory all of them hold together, in bytes."""
        import psutil

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
        import psutil

        with contextlib.suppress(psutil.NoSuchProcess):
            self._known.update(self._root.children(recursive=True))
        left = list(self._known)
        for deadline, send in ((10.0, signal.SIGTERM), (5.0, signal.SIGKILL)):
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(send)
            _, left = psutil.wait_procs(left, timeout=deadline)


def environment() -> dict[str, str]:
    """The environment of a step: this interpreter's commands come first, and its text is not held back."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1"}


def feeds(made: Step, step: Step) -> bool:
    """Return whether ``step`` reads something that ``made`` makes."""
    return any(read == path or read in path.parents for read in step.reads for path in made.makes)


def fingerprint_step(step: Step, trainings: Sequence[Path] = ()) -> str:
    """Return a hash of the command, of the contents of everything the step reads, and of this package's version.

    Args:
        step: The step.
        trainings: Stamps of the trainings whose results it reads: no two runs of a training give the same weights, so
            what was made from an earlier one is out of date.
    """
    digest = hashlib.sha256(json.dumps([__version__, *step.command]).encode())
    for path in (*step.reads, *trainings):
        for file in files_below(path):
            digest.update(str(file).encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def files_below(path: Path) -> Iterator[Path]:
    """Yield ``path`` when it is a file, else the files directly in it, in order.

    Raises:
        InputError: When there is no such file or folder.
    """
    if path.is_file():
        yield path
    elif path.is_dir():
        yield from sorted(file for file in path.iterdir() if file.is_file())
    else:
        raise InputError(f"{path}: no such file or folder; check the path")


def last_line(log: Path) -> str:
    """Return the last progress bar in the end of a log, else its last line, without colours and Ray's prefix."""
    lines = [line.strip() for line in _end(log, 16384).split("\n") if line.strip()]
    return next((line for line in reversed(lines) if "%|" in line), lines[-1] if lines else "starting")


def _end(log: Path, size: int) -> str:
    """Return the last ``size`` bytes of a log as lines, without colours and Ray's prefix."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - size))
        return NOISE.sub("", file.read().decode("utf-8", errors="replace")).replace("\r", "\n")


def _failure(step: Step, code: int, log: Path) -> str:
    reason = f"killed by signal {-code}, perhaps for memory" if code < 0 else f"exit status {code}"
    message = f"step {step.name!r} failed ({reason}); what was finished before it is kept"
    if not step.logged:
        return message
    text = _end(log, LOG_END)
    known = explain(text, step, log.parents[1])
    return "\n".join([*([known] if known else text.splitlines()[-LOG_TAIL:]), f"{message}; the whole log is {log}"])


def explain(text: str, step: Step, folder: Path) -> str | None:
    """Return one sentence that says why a step failed and what to do, or None when its log does not tell.

    Args:
        text: The end of the log.
        step: The step.
        folder: Folder of the run, which holds the log.
    """
    if ours := OURS.findall(text):
        return str(ours[-1])
    again = "free some space there and give the same command again: a training goes on from its last whole checkpoint"
    cache = Path(os.environ.get("HF_HOME", Path.home()))
    for disk in (folder, *(made.parent for made in step.makes), cache, Path(tempfile.gettempdir()), Path("/dev/shm")):
        if disk.is_dir() and (left := shutil.disk_usage(disk).free) < FULL:
            return f"{disk}: the disk is full ({left / 2**30:.1f} GiB left); {again}"
    # From the first on: torchrun puts a traceback of its own behind those of the ranks.
    if said := FULL_DISK.search(text, max(text.find(TRACEBACK), 0)):
        return f"{said[0].strip()}: the disk of the run ({folder}), a cache ({cache}) or /dev/shm was full; {again}"
    _, loading, reading = text.rpartition(LOADING)
    if loading and TRAINING not in reading and (said := UNREADABLE.search(reading)):
        name = reading.partition("...")[0]
        file = next((path for path in step.reads if path.name == name), name)
        return f"{file}: not a whole SFT file ({said[0]}); make it anew with `gream data mix`"
    return said[0] if (said := SYSTEM.search(text.rpartition(TRACEBACK)[2])) else None
