"""Reader for plain tables of interactions and items, Parquet, CSV or TSV, with columns that the user names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import polars as pl

from data_processing.layout import Item
from data_processing.sources.tables import (
    RowChecks,
    SourceTables,
    checked_interactions,
    id_text,
    read_text_table,
    require_column,
    tables_of,
)
from gream_verl.files import InputError, require_file

NEEDED = ("user", "item", "timestamp", "title")
OPTIONAL = ("rating", "description", "brand", "categories")
SEPARATOR = "|"
ISO = ("%Y-%m-%d", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M")
ISO_ZONE = ("%Y-%m-%d %H:%M:%S%.f%z", "%Y-%m-%dT%H:%M:%S%.f%z")


def read_table(
    interactions: str | os.PathLike[str], items: str | os.PathLike[str], columns: Mapping[str, str] | None = None
) -> SourceTables:
    """Read a table of interactions and one of items.

    Args:
        interactions: One row an interaction, with ``user``, ``item``, ``timestamp`` (a number, or a date in ISO 8601)
            and, where there is one, ``rating``.
        items: One row an item, with ``item``, ``title`` and, where they are there, ``description``, ``brand`` and
            ``categories`` (a list, or text with ``|`` between).
        columns: Name of the column of each of these, where it is another.

    Returns:
        The two tables; bad rows are counted and sampled, items without a title too.

    Raises:
        InputError: When a file or a column is missing, or too many rows are bad.
    """
    columns = columns or {}
    unknown = sorted(set(columns) - {*NEEDED, *OPTIONAL})
    if unknown:
        raise InputError(f"column {unknown[0]!r}: unknown; known are {', '.join((*NEEDED, *OPTIONAL))}")
    rows, checks = _interactions(Path(interactions), columns)
    described, item_checks, untitled = _items(Path(items), columns)
    return tables_of(rows, checks, described, item_checks, untitled)


def _read(path: Path) -> tuple[pl.DataFrame, int]:
    """Return a table and the number of its first row in the file."""
    if path.suffix != ".parquet":
        names = path.name.removesuffix(".gz")
        return read_text_table(path, "\t" if names.endswith((".tsv", ".txt")) else ","), 2
    require_file(path, "check the path")
    try:
        return pl.read_parquet(path), 1
    except (pl.exceptions.PolarsError, OSError) as error:
        raise InputError(f"{path}: not a Parquet file ({str(error).splitlines()[0]}); check it") from error


def _interactions(path: Path, columns: Mapping[str, str]) -> tuple[pl.DataFrame, RowChecks]:
    table, first = _read(path)
    named = {name: columns.get(name, name) for name in ("user", "item", "timestamp", "rating")}
    if "rating" not in columns and "rating" not in table.columns:
        del named["rating"]
    when = named["timestamp"]
    kind = table[when].dtype if when in table.columns else None
    if isinstance(kind, pl.Date | pl.Datetime):
        table = table.with_columns(pl.col(when).cast(pl.Datetime("us")).dt.epoch("us"))
    elif kind == pl.String:
        table = table.with_columns(_moments(pl.col(when).str.strip_chars()))
    return checked_interactions(table, path, named, first)


def _moments(text: pl.Expr) -> pl.Expr:
    """Return numbers as they are, and ISO 8601 dates as microseconds; null for anything else."""
    zoned = text.str.replace(r" ?(Z|UTC)$", "+0000")
    dates = [text.str.to_datetime(form, strict=False, time_unit="us") for form in ISO]
    dates += [zoned.str.to_datetime(form, strict=False, time_unit="us") for form in ISO_ZONE]
    moments = [date.dt.epoch("us").cast(pl.Float64) for date in dates]
    return pl.coalesce(text.cast(pl.Float64, strict=False), *moments)


def _items(path: Path, columns: Mapping[str, str]) -> tuple[dict[str, Item], RowChecks, int]:
    table, first = _read(path)
    named = {name: columns.get(name, name) for name in ("item", "title", "description", "brand", "categories")}
    for meaning, column in named.items():
        if meaning in ("item", "title") or meaning in columns:
            require_column(table, column, meaning, path)
    table = table.with_columns(id_text(table, named["item"], path))
    checks = RowChecks(str(path), rows=len(table))
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
