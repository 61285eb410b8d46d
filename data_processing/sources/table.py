"""Reader for plain tables of interactions and items, Parquet, CSV or TSV, with columns that the user names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from data_processing.sources.clean import clean_text, clean_title
from data_processing.sources.tables import (
    BAD_ROWS,
    REST,
    RowChecks,
    SourceTables,
    checked_interactions,
    gather_items,
    id_text,
    readable,
    require_column,
    scan_text_table,
    tables_of,
)
from gream_verl.core.data_folder import Item
from gream_verl.core.errors import InputError
from gream_verl.core.files import require_file

NEEDED = ("user", "item", "timestamp", "title")
OPTIONAL = ("rating", "description", "brand", "categories")
SEPARATOR = "|"
ISO = ("%Y-%m-%d", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M")
ISO_ZONE = ("%Y-%m-%d %H:%M:%S%.f%z", "%Y-%m-%dT%H:%M:%S%.f%z")


def read_table(
    interactions: str | os.PathLike[str],
    items: str | os.PathLike[str],
    columns: Mapping[str, str] | None = None,
    *,
    bad_rows: float = BAD_ROWS,
) -> SourceTables:
    """Read a table of interactions and one of items.

    Args:
        interactions: One row an interaction, with ``user``, ``item``, ``timestamp`` (a number, or a date in ISO 8601)
            and, where there is one, ``rating``.
        items: One row an item, with ``item``, ``title`` and, where they are there, ``description``, ``brand`` and
            ``categories`` (a list, or text with ``|`` between).
        columns: Name of the column of each of these, where it is another.
        bad_rows: Largest share of bad rows, 0 to 1, that does not stop the run.

    Returns:
        The two tables; bad rows are counted and listed, items without a title too. Texts lose HTML; where an item has
        several rows, a later one fills the fields that earlier ones left empty.

    Raises:
        InputError: When a file or a column is missing, or too many rows are bad.
    """
    columns = columns or {}
    unknown = sorted(set(columns) - {*NEEDED, *OPTIONAL})
    if unknown:
        raise InputError(f"column {unknown[0]!r}: unknown; known are {', '.join((*NEEDED, *OPTIONAL))}")
    rows, checks = _interactions(Path(interactions), columns, bad_rows)
    return tables_of(rows, checks, *_items(Path(items), columns, bad_rows))


def _scan(path: Path) -> tuple[pl.LazyFrame, int]:
    """Return a table and the number of its first row in the file."""
    if path.suffix != ".parquet":
        names = path.name.removesuffix(".gz")
        return scan_text_table(path, "\t" if names.endswith((".tsv", ".txt")) else ","), 2
    require_file(path, "check the path")
    with readable(path):
        table = pl.scan_parquet(path)
        table.collect_schema()
    return table, 1


def _interactions(path: Path, columns: Mapping[str, str], bad_rows: float) -> tuple[pl.DataFrame, RowChecks]:
    table, first = _scan(path)
    schema = table.collect_schema()
    named = {name: columns.get(name, name) for name in ("user", "item", "timestamp", "rating")}
    if "rating" not in columns and "rating" not in schema:
        del named["rating"]
    when, kind = pl.col(named["timestamp"]), schema.get(named["timestamp"])
    if isinstance(kind, pl.Date | pl.Datetime):
        table = table.with_columns(when.dt.epoch(getattr(kind, "time_unit", "us")))
    dates = _dates(when.str.strip_chars()) if kind == pl.String else None
    return checked_interactions(table, path, named, first, bad_rows, dates)


def _dates(text: pl.Expr) -> pl.Expr:
    """Return ISO 8601 dates as microseconds; null for anything else."""
    zoned = text.str.replace(r" ?(Z|UTC)$", "+0000")
    dates = [text.str.to_datetime(form, strict=False, time_unit="us") for form in ISO]
    dates += [zoned.str.to_datetime(form, strict=False, time_unit="us") for form in ISO_ZONE]
    return pl.coalesce(date.dt.epoch("us") for date in dates)


def _items(
    path: Path, columns: Mapping[str, str], bad_rows: float
) -> tuple[dict[str, Item], RowChecks, dict[str, int]]:
    table, first = _scan(path)
    schema = table.collect_schema()
    named = {name: columns.get(name, name) for name in ("item", "title", "description", "brand", "categories")}
    for meaning, column in named.items():
        if meaning in ("item", "title") or meaning in columns:
            require_column(schema, column, meaning, path)
        if column in schema:
            _require_text(schema[column], column, meaning, path)
    key = named["item"]
    others = [column for column in dict.fromkeys([*named.values(), REST]) if column in schema and column != key]

    def described(row: dict[str, Any]) -> Item:
        title, description, brand = (_text(row.get(named[name])) for name in ("title", "description", "brand"))
        names = filter(None, map(clean_text, _names(row.get(named["categories"]))))
        return Item(clean_title(title), clean_text(description), clean_text(brand), tuple(dict.fromkeys(names)))

    return gather_items(table.select(id_text(schema, key, path), *others), path, first, bad_rows, key, described)


def _require_text(kind: pl.DataType, column: str, meaning: str, path: Path) -> None:
    """Raise InputError when a column is of a type that cannot be read as text, or as lists of text."""
    inner = kind
    while isinstance(inner, pl.List | pl.Array):
        inner = inner.inner  # type: ignore[assignment]
    if isinstance(inner, pl.Struct | pl.Binary | pl.Object):
        raise InputError(f"{path}: column {column!r} for the {meaning}: expected text, got {kind}; name another column")


def _names(cell: object) -> list[str]:
    """Flatten categories: a list, a list of paths, or text with ``|`` between."""
    if isinstance(cell, list):
        return [name for part in cell for name in _names(part)]
    return _text(cell).split(SEPARATOR)


def _text(cell: object) -> str:
    """Return a cell as text: "" where there is nothing, the parts of a list one after the other."""
    if isinstance(cell, list):
        return " ".join(map(_text, cell))
    return "" if cell is None or cell != cell else str(cell)  # NaN is not even itself
