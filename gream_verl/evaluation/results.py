"""What an evaluation found, as files: a JSON with metrics and settings, and a JSON line for each user."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gream_verl.evaluation.metrics import rank_of
from gream_verl.files import InputError, read_json, require_file, write_json, write_text


@dataclass(frozen=True)
class Evaluation:
    """One model on one set of users.

    Attributes:
        metrics: Name to value, averages over users.
        settings: Everything that decides the result, and what it ran on.
        rows: One mapping a user, with at least ``user``, ``target`` (an item) and ``recommended`` (items, best first).
    """

    metrics: Mapping[str, float]
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]]

    @cached_property
    def ranks(self) -> NDArray[np.int64]:
        """The place of each user's target, from 1; 0 when it was not recommended. int64 [users]."""
        return np.array([rank_of(row["target"], row["recommended"]) for row in self.rows], dtype=np.int64)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``path`` (metrics and settings) and, beside it, ``<stem>.rows.jsonl``."""
        write_text(_rows_path(path), "".join(json.dumps(row) + "\n" for row in self.rows))
        write_json(path, {"metrics": dict(self.metrics), "settings": dict(self.settings)}, indent=2)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """Read what ``save`` wrote.

        Raises:
            InputError: When one of the two files is missing or damaged.
        """
        remedy = "evaluate anew with `gream evaluate`"
        content = read_json(path, remedy)
        lines = require_file(_rows_path(path), remedy).read_text(encoding="utf-8").rstrip("\n").split("\n")
        try:
            return cls(content["metrics"], content["settings"], [json.loads(line) for line in lines])
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise InputError(f"{path}: not the result of an evaluation ({error!r}); {remedy}") from error


def _rows_path(path: str | os.PathLike[str]) -> Path:
    return Path(path).with_suffix(".rows.jsonl")


class ProgressFile:
    """Finished users of a long evaluation, one JSON line each, so that a killed run goes on where it stopped.

    The first line holds the settings. A file with other settings is begun anew; a line cut short by a kill is dropped.

    Attributes:
        rows: User to row, of all that are finished.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: Mapping[str, Any]) -> None:
        """Read ``path``, or begin it; None keeps everything in memory.

        Raises:
            InputError: When the file cannot be written.
        """
        self.path = None if path is None else Path(path)
        self.rows: dict[str, dict[str, Any]] = {}
        if self.path is None:
            return
        header = json.dumps({"settings": settings}, sort_keys=True)
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.is_file() else []
        complete = [line for line in lines if line.endswith("\n")]
        if not complete or complete[0].rstrip("\n") != header:
            complete = [header + "\n"]
        write_text(self.path, "".join(complete))
        for line in complete[1:]:
            row = json.loads(line)
            self.rows[row["user"]] = row

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Keep finished rows, on the disk when this returns."""
        self.rows |= {row["user"]: row for row in rows}
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())
