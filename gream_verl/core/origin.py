"""Origins: the files that a file was made from, noted in it, so that its readers notice when they have changed."""

from __future__ import annotations

import json
from pathlib import Path

from gream_verl.core.errors import InputError
from gream_verl.core.files import fingerprint, read_json

KEY = "gream_origin"
"""Where an origin stands: in the metadata of a parquet file, and in the ``config.json`` of a model."""


def mark(path: Path) -> str:
    """Return what identifies the content of a file, "" for one that is not there.

    ``gream index add`` appends to an index: its mark is of the text up to the last brace, and a grown index keeps it.
    """
    if not path.is_file():
        return ""
    size = path.stat().st_size - (len("}\n") if path.name.endswith(".index.json") else 0)
    return f"{size}:{fingerprint(path, size)[:16]}"


def has_mark(path: Path, given: str) -> bool:
    """Return whether a file still has a mark."""
    size = int(given.partition(":")[0] or 0)
    if path.name.endswith(".index.json") and path.is_file() and 0 < size < path.stat().st_size:
        return given == f"{size}:{fingerprint(path, size)[:16]}"
    return given == mark(path)


def origin_of(*paths: Path) -> dict[str, str]:
    """Return the marks of files as metadata of a parquet file that is made from them."""
    return {KEY: json.dumps({path.name: mark(path) for path in paths})}


def check_origin(file: Path, remedy: str) -> None:
    """Refuse a parquet file whose sources, next to it, are no longer those that it was made from."""
    import pyarrow.parquet as pq

    noted: dict[str, str] = json.loads((pq.read_schema(file).metadata or {}).get(KEY.encode(), b"{}"))
    for name, given in noted.items():
        path = file.parent / name
        if (path.is_file() or not given) and not has_mark(path, given):
            raise InputError(f"{file}: was made from another {name} than the one next to it; {remedy}")


def check_model(folder: Path, index: Path) -> None:
    """Refuse a checkpoint whose semantic IDs were those of another index, which ``index`` did not grow from."""
    config = folder / "config.json"
    given = read_json(config).get(KEY) if config.is_file() else None
    if given and index.is_file() and not has_mark(index, given):
        raise InputError(f"{folder}: knows the semantic IDs of another index than {index}; train it again for this one")
