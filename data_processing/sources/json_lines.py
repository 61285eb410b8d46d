"""Reads files of one object a line, JSON or a Python literal, gzip or plain, without ever holding a file in memory."""

from __future__ import annotations

import ast
import gzip
import json
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
from isal import igzip, igzip_lib

from data_processing.sources.tables import CHECK_EVERY, RowChecks
from gream_verl.core.errors import InputError
from gream_verl.core.files import require_file

GZIP_MAGIC = b"\x1f\x8b"
BLOCK = 1 << 18
"""Bytes read at a time; few enough for the processor's cache."""
BLOCKS_AHEAD = 64
LONGEST_LINE = 1 << 26

R = TypeVar("R", bound=msgspec.Struct)
T = TypeVar("T")


def read_json_lines(
    path: Path, checks: RowChecks, expected: str, record: type[R], mend: Callable[[int, dict[str, Any]], R | None]
) -> Iterator[list[R]]:
    """Yield the records of the good lines, some thousand at a time; bad lines are counted in ``checks``.

    Lines that fit ``record`` as they are become one without a Python object for anything else in them; a block of such
    lines is decoded at once. Any other line is read with care, JSON or a Python literal, and given to ``mend``. What a
    line becomes does not depend on its block, nor on which of the ways it takes.

    Args:
        path: The file; gzip is recognised by its content. Empty lines are passed over.
        checks: Counts lines and bad lines.
        expected: What a line holds, for messages.
        record: The fields that are needed. It has to refuse what ``mend`` would refuse or change.
        mend: Makes a record of line number (from 1) and object, or returns None after it has counted the line as bad.

    Raises:
        InputError: When the file is missing or cut short, or too many lines are bad.
    """
    require_file(path, "give the path of a file of JSON lines, such as reviews.json.gz")
    decoder = msgspec.json.Decoder(record)
    number = 1
    for block, lines in _ahead((block, _uniform_lines(block)) for block in _blocks(path)):
        records = None if lines is None else _at_once(block, lines, decoder)
        if records is not None:
            checks.count_good(len(records), expected)
        else:
            records = list(_one_by_one(block, number, checks, expected, decoder, mend))
        number += block.count(b"\n") if lines is None else lines
        yield records
    checks.finish(expected)


def _uniform_lines(block: bytes) -> int | None:
    """Return the number of lines if all of them begin with "{", end with "}" and are UTF-8, else None."""
    letters = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(letters == ord("\n"))
    if letters[0] != ord("{") or (letters[ends - 1] != ord("}")).any() or (letters[ends[:-1] + 1] != ord("{")).any():
        return None
    try:
        if not block.isascii():
            block.decode()  # the decoder does not look into texts that are not needed
    except UnicodeDecodeError:
        return None
    return len(ends)


def _at_once(block: bytes, lines: int, decoder: msgspec.json.Decoder[R]) -> list[R] | None:
    """Return the records of uniform lines if every line is one object that is good as it is, else None.

    "}", line end, "{" is JSON only between two objects: where there are as many objects as lines, every line is one.
    """
    try:
        records = decoder.decode_lines(block)
    except (ValueError, RecursionError):
        return None
    return records if len(records) == lines else None


def _one_by_one(
    block: bytes,
    number: int,
    checks: RowChecks,
    expected: str,
    decoder: msgspec.json.Decoder[R],
    mend: Callable[[int, dict[str, Any]], R | None],
) -> Iterator[R]:
    for row, line in enumerate(block.split(b"\n"), start=number):
        if not line.strip():
            continue
        checks.rows += 1
        record: R | None = None
        try:
            line.decode()
            record = decoder.decode(line)
        except (ValueError, RecursionError):
            value = _careful(line)
            if value is not None:
                record = mend(row, value)
            else:
                checks.skip(row, "not an object", line.decode("utf-8", "replace"))
        if record is not None:
            yield record
        if checks.rows % CHECK_EVERY == 0:
            checks.guard(expected)


def _careful(line: bytes) -> dict[str, Any] | None:
    """Return the object in a line: JSON, or a Python literal as in the metadata of 2014, which is never evaluated."""
    try:
        text = line.decode("utf-8-sig")
        try:
            value = json.loads(text)
        except ValueError:
            value = ast.literal_eval(text.strip())
        # Half of a surrogate pair can be read, but is no text that can be written.
        if "\\ud" in text.lower() or "\\u0000d" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    return value if isinstance(value, dict) else None


def _blocks(path: Path) -> Iterator[bytes]:
    """Yield the content of a file in pieces that end with a line."""
    with path.open("rb") as raw:
        compressed = raw.read(len(GZIP_MAGIC)) == GZIP_MAGIC
        raw.seek(0)
        file = igzip.GzipFile(fileobj=raw) if compressed else raw
        rest = b""
        try:
            while data := file.read(BLOCK):
                cut = data.rfind(b"\n") + 1
                if cut:
                    yield b"".join([rest, memoryview(data)[:cut]])
                    rest = data[cut:]
                else:
                    rest += data
                if len(rest) > LONGEST_LINE:
                    raise InputError(
                        f"{path}: a line is longer than {LONGEST_LINE >> 20} MB; expected one object a line"
                    )
        except (EOFError, igzip_lib.IsalError, gzip.BadGzipFile) as error:  # type: ignore[misc]  # isal's own types err
            raise InputError(f"{path}: the gzip file is cut short or damaged ({error}); download it again") from error
        if rest:
            yield rest + b"\n"


def _ahead(values: Iterator[T]) -> Iterator[T]:
    """Yield the same values; the next ones are made in a thread while the caller works on this one."""
    with ThreadPoolExecutor(1) as thread:
        coming = deque(thread.submit(next, values, None) for _ in range(BLOCKS_AHEAD))
        while (value := coming.popleft().result()) is not None:
            coming.append(thread.submit(next, values, None))
            yield value
