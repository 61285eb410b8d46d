"""Reader of RecBole atomic files.

An atomic file is a table with tabs; its header names each field and its type, ``user_id:token``, ``rating:float``,
``class:token_seq``, ``embedding:float_seq`` (https://recbole.io/docs/user_guide/data/atomic_files.html).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import polars as pl

from data_processing.sources.columns import read_tables
from data_processing.sources.common import BAD_ROWS, REST, RawTable, SourceTables, scan_text
from gream_verl.core.errors import InputError

TYPES = ("token", "token_seq", "float", "float_seq")
FIELDS = {
    "user": ("user_id",),
    "item": ("item_id",),
    "timestamp": ("timestamp",),
    "rating": ("rating",),
    "title": ("title", "movie_title", "name"),
    "description": ("description",),
    "brand": ("brand",),
    "categories": ("categories", "genre", "class"),
}
"""Names of fields in published files; the first one in a file is taken."""


def read_recbole(
    interactions: Path,
    items: Path,
    *,
    rewrite_title: Callable[[str], str] = str.strip,
    bad_rows: float = BAD_ROWS,
    least_rating: float | None = None,
) -> SourceTables:
    """Read a ``.inter`` and a ``.item`` file.

    Args:
        interactions: The ``.inter`` file, with ``user_id``, ``item_id`` and ``timestamp``.
        items: The ``.item`` file, with ``item_id``, a title and optionally categories, ``brand``, ``description`` and
            ``release_year``, which describes an item without a description.
        rewrite_title: Makes a title readable, after its HTML is removed.
        bad_rows: Largest share of bad rows, 0 to 1, that does not stop the run.
        least_rating: The least ``rating`` of an interaction; None for any.
    """
    table, _ = _scan_atomic(interactions, bad_rows)
    described, types = _scan_atomic(items, bad_rows)
    columns = {name: next((field for field in fields if field in types), fields[0]) for name, fields in FIELDS.items()}
    if "release_year" in types:
        year = pl.col("release_year").str.strip_chars()
        released = pl.when(year.str.contains(r"^\d+$")).then(pl.format("Released in {}.", year))
        text = pl.coalesce("description", released) if "description" in types else released
        described = replace(described, rows=described.rows.with_columns(text.alias("description")))
    separator = " " if types.get(columns["categories"]) == "token_seq" else "\t"
    return read_tables(
        table, described, columns, separator=separator, rewrite_title=rewrite_title, least_rating=least_rating
    )


def _scan_atomic(path: Path, bad_rows: float) -> tuple[RawTable, dict[str, str]]:
    """Return the table, its columns named as the fields, and the type of every field."""
    table = scan_text(path, "\t", bad_rows)
    columns = [column for column in table.rows.collect_schema().names() if column != REST]
    if not columns:
        raise InputError(f"{path}: is empty; expected a header such as user_id:token")
    types = {}
    for column in columns:
        name, colon, kind = column.rpartition(":")
        if not colon or kind not in TYPES:
            raise InputError(f"{path}: header field {column!r}: expected name:type with a type of {', '.join(TYPES)}")
        if name in types:
            raise InputError(f"{path}: header field {name!r} is there twice; remove one of them")
        types[name] = kind
    return replace(table, rows=table.rows.rename(dict(zip(columns, types, strict=True)))), types
