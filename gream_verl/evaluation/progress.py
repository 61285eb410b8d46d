"""Finished users of a long evaluation on disk, so that a killed run keeps them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gream_verl.core.errors import InputError
from gream_verl.core.files import hold


class ProgressFile:
    """A JSON line with all that decides a row, then one per finished user; a line cut short by a kill is dropped.

    The file is locked until it is closed. ``rows`` maps each finished user to their row. A file with another header is
    refused without ``overwrite``.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.rows: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        hold(self._file, f"{path}: another evaluation is writing it; wait for it, or choose another --name")
        self._file.seek(0)
        line = json.dumps(header, sort_keys=True).encode() + b"\n"
        first, end = self._file.readline(), len(line)
        if first.endswith(b"\n") and first != line and not overwrite:
            raise InputError(f"{path}: has users of another evaluation; replace them with --overwrite")
        if first != line:  # empty, cut short, or to be replaced
            self._file.truncate(0)
            self._append(line)
        for row in self._file:
            if row.endswith(b"\n"):
                done = json.loads(row)
                self.rows[done["user"]] = done
                end += len(row)
        self._file.truncate(end)

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keep finished rows, on disk when this returns."""
        new = {row["user"]: row for row in rows if row["user"] not in self.rows}
        self.rows |= new
        self._append(b"".join(json.dumps(row).encode() + b"\n" for row in new.values()))

    def close(self) -> None:
        """Unlock the file."""
        self._file.close()

    def _append(self, lines: bytes) -> None:
        try:
            self._file.write(lines)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise InputError(f"{self._file.name}: cannot be written ({error.strerror}); free some space") from error
