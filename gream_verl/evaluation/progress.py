"""Finished users of a long evaluation, on the disk as they finish, so that a killed run loses nothing it has done."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from gream_verl.core.errors import InputError
from gream_verl.core.files import hold

BEGINNING = b'{"settings": '
"""How every progress file begins."""


class ProgressFile:
    """A JSON line with the settings, then one for each finished user; a line cut short by a kill is dropped.

    A file of other settings is not touched but moved aside, to a name that has the hash of its settings; who goes back
    to those settings goes on from it. The file is held from before it is first read until it is closed, so no other
    evaluation writes or moves it between.

    Attributes:
        path: Where the rows are; None keeps them in memory.
        rows: User to row, of all that are finished.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        """Read ``path``, or begin it; None keeps everything in memory.

        Args:
            path: A ``.jsonl`` file.
            settings: Everything that decides a row.

        Raises:
            InputError: When the file is held by another evaluation, is no progress file, or cannot be written.
        """
        self.path = None if path is None else Path(path)
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path is None:
            return
        header = json.dumps({"settings": settings}, sort_keys=True).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:  # which closes the file when it cannot be used
                self._file = stack.enter_context(self._open_for(header))
                self._read_rows()
                stack.pop_all()
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}); free some space or choose another folder"
            ) from error
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
            raise InputError(
                f"{self.path}: line {len(self.rows) + 2} is no finished user ({error!r}); delete that line to go on"
            ) from error

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keep finished rows, on the disk when this returns."""
        new = {row["user"]: row for row in rows if row["user"] not in self.rows}
        self.rows |= new
        if self.path is not None:
            self._write(self._file, b"".join(json.dumps(row).encode() + b"\n" for row in new.values()))

    def close(self) -> None:
        """Let others have the file."""
        if self.path is not None:
            self._file.close()

    def __enter__(self) -> ProgressFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _open_for(self, header: bytes) -> IO[bytes]:
        """Return the file, held, with ``header`` as its first line and behind it the place of the next reading.

        Who holds the file at ``path`` is alone in moving it, or another to its place.
        """
        assert self.path is not None
        while True:
            with ExitStack() as stack:
                file = stack.enter_context(self._open(self.path))
                if not _is_at(file, self.path):
                    continue  # it was moved before it was held
                first = file.readline()
                if first.endswith(b"\n") and first != header:
                    aside = self._aside(first)
                    if aside.exists():
                        raise InputError(f"{self.path} and {aside} are of the same settings; delete one of them")
                    self.path.rename(aside)
                    continue
                if first != header:  # nothing yet, or a header that was cut short
                    if not (first.startswith(BEGINNING) or BEGINNING.startswith(first)):
                        raise InputError(f"{self.path}: no progress file; move it away, or choose another --name")
                    aside = self._aside(header)
                    if aside.exists():
                        with self._open(aside):
                            aside.replace(self.path)
                        continue
                    file.truncate(0)
                    self._write(file, header)
                stack.pop_all()
                return file

    def _read_rows(self) -> None:
        """Read the finished users behind the header, and cut off a line that is not whole."""
        end = self._file.tell()
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            row = json.loads(line)
            self.rows[row["user"]] = row
            end += len(line)
        self._file.truncate(end)

    @staticmethod
    def _open(path: Path) -> IO[bytes]:
        file = path.open("a+b")
        try:
            hold(file, f"{path}: another evaluation is writing it; wait for it, or choose another --name")
        except InputError:
            file.close()
            raise
        file.seek(0)
        return file

    def _aside(self, header: bytes) -> Path:
        assert self.path is not None
        return self.path.with_suffix(f".{hashlib.sha256(header).hexdigest()[:8]}.jsonl")

    def _write(self, file: IO[bytes], lines: bytes) -> None:
        try:
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}); free some space, and call again to go on"
            ) from error


def _is_at(file: IO[bytes], path: Path) -> bool:
    """Return whether an open file is the one at ``path`` now."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
