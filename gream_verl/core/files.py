"""Reading and writing of files: whole files only, and errors that a user can act on."""

from __future__ import annotations

import difflib
import fcntl
import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from gream_verl.core.errors import InputError

SIMILAR = 0.9
"""Least likeness of a name that is suggested: D.item.json and D.inter.json are less alike."""


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path next to ``path`` that takes its place only when the block ends without an error.

    A reader sees the whole old file or the whole new one, also after a kill or on a full disk.

    Args:
        path: The final file; missing parent folders are made.

    Raises:
        InputError: When the folder cannot be written or the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename is not None and Path(error.filename) not in (temporary, *path.parents):
            raise  # about a file that the block reads
        reason = error.strerror or str(error)
        raise InputError(f"{path}: cannot be written ({reason}); free some space or choose another folder") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def hold(file: IO[Any] | int, refusal: str) -> None:
    """Lock an open file until it is closed; raise InputError(refusal) when another process holds it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(refusal) from None


@contextmanager
def changing(path: Path) -> Iterator[None]:
    """Wait until no other process changes a file, and let none while the body reads and writes it."""
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` atomically, as UTF-8."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any, *, indent: int | None = None) -> None:
    """Write ``value`` to ``path`` atomically, as JSON in the order of its keys."""
    write_text(path, json.dumps(value, ensure_ascii=False, indent=indent) + "\n")


def require_file(path: str | os.PathLike[str], remedy: str) -> Path:
    """Return ``path``; raise InputError with a similar name and the ``remedy`` when there is no such file."""
    path = Path(path)
    if not path.is_file():
        names = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
        like = difflib.get_close_matches(path.name, names, n=1, cutoff=SIMILAR)
        suggestion = f"did you mean {like[0]}? Else " if like else ""
        raise InputError(f"{path}: no such file; {suggestion}{remedy}")
    return path


def read_json(path: str | os.PathLike[str], remedy: str = "check the path") -> Any:
    """Return the JSON value in ``path``; an InputError for a missing file ends in ``remedy``."""
    path = require_file(path, remedy)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); mend it, or {remedy}") from error


def fingerprint(path: str | os.PathLike[str], size: int | None = None) -> str:
    """Return the SHA-256 of a file, or of its first ``size`` bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        if size is not None:
            return hashlib.sha256(file.read(size)).hexdigest()
        return hashlib.file_digest(file, "sha256").hexdigest()
