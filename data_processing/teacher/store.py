"""The answers of a teacher, each kept once under its request, in one SQLite file; a killed run loses none."""

from __future__ import annotations

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasPath, BaseModel, BeforeValidator, ConfigDict, Field

from gream_verl.core.errors import InputError

COLUMNS = "key TEXT PRIMARY KEY, subject TEXT, model TEXT, text TEXT, finish TEXT, prompt INTEGER, completion INTEGER"
TOKENS = "ifnull(sum(prompt), 0), ifnull(sum(completion), 0)"
Text = Annotated[str, BeforeValidator(lambda text: text or "")]  # null when the model only thought, or refused


class Answer(BaseModel):
    """One answer, read from a chat completion or from the store.

    ``finish`` is ``length`` when it was cut; ``prompt`` and ``completion`` are the tokens of request and answer.
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True, frozen=True)

    text: Text = Field(validation_alias=AliasPath("choices", 0, "message", "content"))
    finish: str | None = Field(None, validation_alias=AliasPath("choices", 0, "finish_reason"))
    prompt: int = Field(ge=0, validation_alias=AliasPath("usage", "prompt_tokens"))
    completion: int = Field(ge=0, validation_alias=AliasPath("usage", "completion_tokens"))


class AnswerStore:
    """The answers in one file, for one process at a time; the path ``:memory:`` stands for none."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._file = sqlite3.connect(path, timeout=0, isolation_level=None)  # every statement commits
        self.close = self._file.close
        with self._errors():
            # The lock of the first statement holds until the file is closed. A write-ahead log under that lock needs
            # no shared memory, so that it also works on network file systems.
            self._file.execute("PRAGMA locking_mode = EXCLUSIVE")
            self._file.execute("PRAGMA journal_mode = WAL")
            self._file.execute("PRAGMA synchronous = NORMAL")
            self._file.execute(f"CREATE TABLE IF NOT EXISTS answers ({COLUMNS})")

    def tokens(self) -> tuple[int, int]:
        """Return the tokens of all prompts and of all answers."""
        sums: tuple[int, int] = self._file.execute(f"SELECT {TOKENS} FROM answers").fetchone()
        return sums

    def get(self, request: dict[str, Any]) -> Answer | None:
        """Return the answer to a request, None when it has none."""
        query = "SELECT text, finish, prompt, completion FROM answers WHERE key = ?"
        row = self._file.execute(query, (_key(request),)).fetchone()
        return Answer(**dict(zip(Answer.model_fields, row, strict=True))) if row else None

    def put(self, request: dict[str, Any], answer: Answer, subject: str = "") -> None:
        """Keep an answer, unless the request has one; the subject is for people who read the file."""
        row = _key(request), subject, request["model"], *answer.model_dump().values()
        with self._errors():
            self._file.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?, ?, ?)", row)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn a refusal of SQLite into a sentence."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            locked = "locked" in str(error)
            remedy = "wait until the other run has ended" if locked else "free some space, or move the file away"
            raise InputError(f"{self.path}: {error}; {remedy}") from error


def _key(request: dict[str, Any]) -> str:
    """Return the hash of a request, equal for any order of its fields."""
    text = json.dumps(request, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
