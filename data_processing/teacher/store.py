"""Keeps every answer of a teacher once, in a file that only grows.

One line of JSON an answer, found again by the hash of its request. A run that is killed leaves at most one torn line,
at the end, which the next run removes; what was answered is never asked, or paid for, twice.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from gream_verl.core.errors import InputError
from gream_verl.core.files import hold

BLOCK = 1 << 20
SYNC_EVERY = 100
"""Answers after which the disk is told to keep what it has: more than a process that dies, a power cut."""


def request_key(request: dict[str, Any]) -> str:
    """Return the name of a request: equal for equal models, messages and settings, whatever the order of its fields."""
    text = json.dumps(request, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Answer:
    """What a teacher answered.

    Attributes:
        text: The message.
        finish: Why it ended: ``stop``, or ``length`` when it was cut.
        prompt_tokens: Tokens of the request, as the server counted them.
        completion_tokens: Tokens of the message.
    """

    text: str
    finish: str
    prompt_tokens: int
    completion_tokens: int


class AnswerStore:
    """The answers in one file, for one process at a time.

    Args:
        path: The file; made when it is not there.

    Attributes:
        prompt_tokens: Tokens of all requests.
        completion_tokens: Tokens of all answers.
        cost: What all of them have cost.

    Raises:
        InputError: When another process has the file open, or a line of it is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cost = 0.0
        self._offsets: dict[bytes, int] = {}
        self._unsynced = 0
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            self._lock()
            self._end = self._read_index()
            os.ftruncate(self._file, self._end)
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> AnswerStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.fsync(self._file)
        os.close(self._file)

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and bytes.fromhex(key) in self._offsets

    def get(self, key: str) -> Answer | None:
        """Return the answer to the request of that key, None when there is none."""
        offset = self._offsets.get(bytes.fromhex(key))
        if offset is None:
            return None
        line = b""
        while b"\n" not in line:
            line += os.pread(self._file, 4096, offset + len(line))
        return _answer(json.loads(line[: line.index(b"\n")]))

    def put(self, key: str, model: str, answer: Answer, cost: float = 0.0, about: str = "") -> None:
        """Keep an answer.

        Args:
            key: That of the request.
            model: Who answered.
            answer: What was answered.
            cost: What it has cost.
            about: What was asked about, for people who read the file.

        Raises:
            ValueError: When that request has one.
            InputError: When the file cannot be written.
        """
        if key in self:
            raise ValueError(f"{self.path}: request {key} is answered already")
        line = (
            json.dumps(
                {"key": key, "about": about, "model": model, **asdict(answer), "cost": cost}, ensure_ascii=False
            ).encode()
            + b"\n"
        )
        try:
            written = os.write(self._file, line)
            if written < len(line):
                raise OSError(f"only {written} of {len(line)} bytes")
            self._unsynced += 1
            if self._unsynced >= SYNC_EVERY:
                os.fdatasync(self._file)
                self._unsynced = 0
        except OSError as error:
            os.ftruncate(self._file, self._end)
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror or error}); free some space and call again: what was "
                "answered before is kept"
            ) from error
        self._add(key, self._end, answer, cost)
        self._end += len(line)

    def _lock(self) -> None:
        hold(self._file, f"{self.path}: another run is writing to it; wait for that one, or stop it")

    def _read_index(self) -> int:
        """Note where every answer begins; return the end of the last whole line."""
        end = 0
        for number, line in enumerate(self._lines(), start=1):
            try:
                fields = json.loads(line)
                self._add(fields["key"], end, _answer(fields), fields["cost"])
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(
                    f"{self.path}: line {number} is damaged; remove that line, and its request is asked again"
                ) from error
            end += len(line)
        return end

    def _lines(self) -> Iterator[bytes]:
        """Yield whole lines, ends included; what follows the last of them was being written when a run died."""
        rest, offset = b"", 0
        while block := os.pread(self._file, BLOCK, offset):
            offset += len(block)
            *lines, rest = (rest + block).split(b"\n")
            yield from (line + b"\n" for line in lines)

    def _add(self, key: str, offset: int, answer: Answer, cost: float) -> None:
        self._offsets[bytes.fromhex(key)] = offset
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        self.cost += cost


def _answer(fields: dict[str, Any]) -> Answer:
    return Answer(**{name: fields[name] for name in Answer.__dataclass_fields__})
