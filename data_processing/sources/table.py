"""Reader for plain tables of interactions and items, Parquet, CSV or TSV, with columns that the user names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from data_processing.layout import Item
from data_processing.sources.tables import (
    BAD_ROWS,
    RowChecks,
    SourceTables,
    checked_interactions,
    id_text,
    readable,
    require_column,
    scan_text_table,
    tables_of,
)
from gream_verl.files import InputError, require_file

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
        The two tables; bad rows are counted and listed, items without a title too.

    Raises:
        InputError: When a file or a column is missing, or too many rows are bad.
    """
    columns = columns or {}
    unknown = sorted(set(columns) - {*NEEDED, *OPTIONAL})
    if unknown:
        raise InputError(f"column {unknown[0]!r}: unknown; known are {', '.join((*NEEDED, *OPTIONAL))}")
    rows, checks = _interactions(Path(interactions), columns, bad_rows)
    described, item_checks, untitled = _items(Path(items), columns, bad_rows)
    return tables_of(rows, checks, described, item_checks, untitled)


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
    moments = None
    if isinstance(kind, pl.Date | pl.Datetime):
        moments = when.cast(pl.Datetime("us")).dt.epoch("us")
    elif kind == pl.String:
        moments = _moments(when.str.strip_chars())
    return checked_interactions(table, path, named, first, bad_rows, moments)


def _moments(text: pl.Expr) -> pl.Expr:
    """Return numbers as they are, and ISO 8601 dates as microseconds; null for anything else."""
    zoned = text.str.replace(r" ?(Z|UTC)$", "+0000")
    dates = [text.str.to_datetime(form, strict=False, time_unit="us") for form in ISO]
    dates += [zoned.str.to_datetime(form, strict=False, time_unit="us") for form in ISO_ZONE]
    moments = [date.dt.epoch("us").cast(pl.Float64) for date in dates]
    return pl.coalesce(text.cast(pl.Float64, strict=False), *moments)


def _items(path: Path, columns: Mapping[str, str], bad_rows: float) -> tuple[dict[str, Item], RowChecks, int]:
    scanned, first = _scan(path)
    schema = scanned.collect_schema()
    named = {name: columns.get(name, name) for name in ("item", "title", "description", "brand", "categories")}
    for meaning, column in named.items():
        if meaning in ("item", "title") or meaning in columns:
            require_column(schema, column, meaning, path)
    needed = [column for column in dict.fromkeys(named.values()) if column in schema and column != named["item"]]
    with readable(path):
        table = scanned.select(id_text(schema, named["item"], path), *needed).collect(engine="streaming")
    checks = RowChecks(str(path), bad_rows, rows=len(table))
    items: dict[str, Item] = {}
    untitled = 0
    for number, values in enumerate(table.iter_rows(named=True), start=first):
        cells = {meaning: values.get(column) for meaning, column in named.items()}
        key, title = cells["item"] or "", _text(cells["title"])
        if not key or key in items:
            checks.skip(number, "item listed before" if key else "no item id", str(values))
        elif not title:
            untitled += 1
        else:
            names = tuple(dict.fromkeys(_names(cells["categories"])))
            items[key] = Item(title, _text(cells["description"]), _text(cells["brand"]), names)
    checks.finish("an item id in every row, each item once")
    return items, checks, untitled


def _names(cell: object) -> list[str]:
    """Flatten categories: a list, a list of paths, or text with ``|`` between."""
    if isinstance(cell, list):
        return [name for part in cell for name in _names(part)]
    return [name for name in map(_text, _text(cell).split(SEPARATOR)) if name]


def _text(cell: object) -> str:
    return "" if cell is None else " ".join(str(cell).split())
