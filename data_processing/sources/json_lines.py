"""Reader of files with one object per line, JSON or a Python literal, gzip or plain; memory holds one line."""

from __future__ import annotations

import ast
import gzip
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

import msgspec
from isal import igzip_lib, igzip_threaded

from data_processing.sources.common import RowChecks
from gream_verl.core.errors import InputError
from gream_verl.core.files import require_file

CHECK_EVERY = 10_000
LONGEST_LINE = 1 << 26


def read_json_lines(path: Path, checks: RowChecks, expected: str, record: type[msgspec.Struct]) -> Iterator[Any]:
    """Yield the records of the good lines; bad lines are counted in ``checks``.

    msgspec decodes the fields of ``record`` and skips the other fields. A line that is no JSON is read as a Python
    literal, as in the metadata of 2014, and is never evaluated.

    Args:
        path: The file; gzip is recognised by its content. Empty lines are passed over.
        checks: Counts lines and bad lines.
        expected: Names of the needed fields, for messages.
        record: The fields that are needed, with the constraints of a good line.
    """
    decoder = msgspec.json.Decoder(record, strict=False)  # numbers may be written as text
    for row, line in enumerate(_lines(path), start=1):
        if line.isspace():
            continue
        checks.rows += 1
        try:
            yield _decoded(line, decoder)
        except msgspec.ValidationError:
            checks.skip(row, f"no usable {expected}", line.decode("utf-8", "replace"))
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            checks.skip(row, "not an object", line.decode("utf-8", "replace"))
        if checks.rows % CHECK_EVERY == 0:
            checks.guard(f"{expected} in every line")
    checks.guard(f"{expected} in every line")


def _decoded(line: bytes, decoder: msgspec.json.Decoder[Any]) -> Any:
    """Return the record of a line of JSON, or else of a Python literal."""
    try:
        return decoder.decode(line)
    except msgspec.ValidationError:
        raise
    except (ValueError, RecursionError):
        return decoder.decode(msgspec.json.encode(ast.literal_eval(line.decode().strip())))


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file; gzip is unpacked in a second thread."""
    require_file(path, "give the path of a file of JSON lines, such as reviews.json.gz")
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"  # the magic number of gzip
    with cast(IO[bytes], igzip_threaded.open(path, "rb", threads=1) if packed else path.open("rb")) as file:
        try:
            while line := file.readline(LONGEST_LINE):
                if len(line) == LONGEST_LINE:
                    raise InputError(f"{path}: a line exceeds {LONGEST_LINE >> 20} MB; expected one object per line")
                yield line
        except (EOFError, igzip_lib.IsalError, gzip.BadGzipFile) as error:  # type: ignore[misc]  # isal is untyped
            raise InputError(f"{path}: the gzip file is cut short or damaged ({error}); download it again") from error
