"""Finished users of a long evaluation, on the disk as they finish, so that a killed run loses nothing it has done."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from gream_verl.files import InputError, hold


class ProgressFile:
    """A JSON line with the settings, then one for each finished user; a line cut short by a kill is dropped.

    A file of other settings is not touched but moved aside, to a name that has the hash of its settings; who goes back
    to those settings goes on from it. The file is held while it is open, so no other evaluation writes between.

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
            if self.path.is_file():
                with self._open(self.path) as file:
                    first = file.readline()
                if first.endswith(b"\n") and first != header:
                    self.path.rename(self._aside(first))
            if not self.path.exists() and self._aside(header).exists():
                self._aside(header).rename(self.path)
            self._file = self._open(self.path)
            first = self._file.readline()
            if first != header:  # nothing yet, or a header cut short
                self._file.truncate(0)
                self._write(header)
            end = len(header)
            for line in self._file:
                if not line.endswith(b"\n"):
                    break
                row = json.loads(line)
                self.rows[row["user"]] = row
                end += len(line)
            self._file.truncate(end)
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
            self._write(b"".join(json.dumps(row).encode() + b"\n" for row in new.values()))

    def close(self) -> None:
        """Let others have the file."""
        if self.path is not None:
            self._file.close()

    def __enter__(self) -> ProgressFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @staticmethod
    def _open(path: Path) -> IO[bytes]:
        file = path.open("a+b")
        hold(file, f"{path}: another evaluation is writing it; wait for it, or choose another --name")
        file.seek(0)
        return file

    def _aside(self, header: bytes) -> Path:
        assert self.path is not None
        return self.path.with_suffix(f".{hashlib.sha256(header).hexdigest()[:8]}.jsonl")

    def _write(self, lines: bytes) -> None:
        try:
            self._file.write(lines)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(
                f"{self.path}: cannot be written ({error.strerror}); free some space, and call again to go on"
            ) from error
