"""Reads files of one object a line, JSON or a Python literal, gzip or plain, without ever holding a file in memory."""

from __future__ import annotations

import ast
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_processing.sources.tables import RowChecks
from gream_verl.files import InputError, require_file

GZIP_MAGIC = b"\x1f\x8b"
CHECK_EVERY = 10_000


def read_json_lines(path: Path, checks: RowChecks, expected: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield line number (from 1) and object of every good line; bad lines are counted in ``checks``.

    Args:
        path: The file; gzip is recognised by its content. Empty lines are passed over.
        checks: Counts lines and bad lines.
        expected: What a line holds, for messages.

    Raises:
        InputError: When the file is missing or cut short, or too many lines are bad.
    """
    require_file(path, "give the path of a file of JSON lines, such as reviews.json.gz")
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        checks.rows += 1
        try:
            text = line.decode("utf-8-sig")
            value = _parse(text)
            # Half of a surrogate pair can be read, but is no text that can be written.
            if "\\ud" in text.lower() or "\\u0000d" in text.lower():
                json.dumps(value, ensure_ascii=False).encode()
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            value = None
        if isinstance(value, dict):
            yield number, value
        else:
            checks.skip(number, "not an object", line.decode("utf-8", "replace"))
        if checks.rows % CHECK_EVERY == 0:
            checks.guard(expected)
    checks.finish(expected)


def _parse(line: str) -> Any:
    """Return the value of a line: JSON, or a Python literal as in the metadata of 2014, which is never evaluated."""
    try:
        return json.loads(line)
    except ValueError:
        return ast.literal_eval(line.strip())


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as raw:
        compressed = raw.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        raw.seek(0)
        try:
            yield from gzip.GzipFile(fileobj=raw) if compressed else raw
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{path}: the gzip file is cut short or damaged ({error}); download it again") from error
