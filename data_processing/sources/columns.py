"""Reader of plain tables of interactions and items, Parquet, CSV or TSV, with columns that the user names."""

from __future__ import annotations

import gzip
from collections.abc import Callable, Mapping
from pathlib import Path

import polars as pl

from data_processing.sources.clean import clean_item
from data_processing.sources.common import (
    BAD_ROWS,
    INTERACTIONS,
    ITEMS,
    REST,
    TOO_MANY,
    RawTable,
    RowChecks,
    SourceTables,
    add_item,
    read_interactions,
    readable,
    scan_text,
    source_tables,
)
from data_processing.sources.layout_files import read_items
from gream_verl.core.data_folder import Item, item_of
from gream_verl.core.errors import InputError
from gream_verl.core.files import require_file

NAMES = (*INTERACTIONS, "rating", *(name for name in ITEMS if name != "item"))
OWN = ("interactions.item", "items.item")
"""The item ids of one of the tables, where they have other names."""


def read_table(
    interactions: Path,
    items: Path,
    columns: Mapping[str, str] | None = None,
    *,
    bad_rows: float = BAD_ROWS,
    least_rating: float | None = None,
) -> SourceTables:
    """Read a table of interactions and one of items.

    Args:
        interactions: One row per interaction: ``user``, ``item``, ``timestamp`` (a number, or a date in ISO 8601).
        items: ``D.item.json``, or one row per item: ``item``, ``title`` and optionally ``description``, ``brand`` and
            ``categories`` (a list, or text separated by ``|``).
        columns: Name of the column of each of these, where it is another; ``interactions.item`` and ``items.item``
            where the two tables differ.
        bad_rows: Largest share of bad rows, 0 to 1, that does not stop the run.
        least_rating: The least ``rating`` of an interaction; None for any.
    """
    columns = columns or {}
    if unknown := sorted(set(columns) - {*NAMES, *OWN}):
        raise InputError(f"column {unknown[0]!r}: unknown; known are {', '.join((*NAMES, *OWN))}")
    named = {name: name for name in NAMES} | dict(columns)
    if items.suffix == ".json":  # the authors' layout
        table, found = _scan(interactions, bad_rows), read_items(items)
        rows = read_interactions(table, {**named, "item": named.get(OWN[0], named["item"])}, least_rating)
        return source_tables(rows, found, table.checks, RowChecks(items, rows=len(found)))
    described = _scan(items, bad_rows)
    for meaning in columns.keys() & (ITEMS.keys() - {"item"}):
        described.require(columns[meaning], meaning)
    return read_tables(_scan(interactions, bad_rows), described, named, least_rating=least_rating)


def read_tables(
    interactions: RawTable,
    items: RawTable,
    columns: Mapping[str, str],
    *,
    separator: str = "|",
    rewrite_title: Callable[[str], str] = str.strip,
    least_rating: float | None = None,
) -> SourceTables:
    """Read two tables; texts lose HTML, and a later row of an item fills the fields that are still empty.

    Args:
        interactions: One interaction per row.
        items: One item per row.
        columns: Name of the column of each of :data:`NAMES` and :data:`OWN`, which ``item`` stands for; description,
            brand and categories may be missing.
        separator: Separator of categories in one text.
        rewrite_title: Makes a title readable, after its HTML is removed.
        least_rating: The least rating of an interaction; None for any.
    """
    items.require(columns["title"], "title")
    schema = items.rows.collect_schema()
    texts = {name: _texts(items, columns[name], name) for name in ITEMS if name != "item" and columns[name] in schema}
    if "categories" in texts and schema[columns["categories"]] == pl.String:
        texts["categories"] = texts["categories"].str.split(separator)
    own, other = (columns.get(name, columns["item"]) for name in OWN)
    rows = read_interactions(interactions, {**columns, "item": own}, least_rating)
    found: dict[str, Item] = {}
    for cells in items.collect(item=items.ids(other, "item"), **texts).iter_rows(named=True):
        if cells["item"] and cells[REST] is None:
            add_item(found, cells["item"], clean_item(item_of(cells), rewrite_title), items.checks)
        else:
            items.skip(cells, TOO_MANY if cells["item"] else "no item id")
    items.checks.guard("an item id in every row, and no more fields than in the header")
    return source_tables(rows, found, interactions.checks, items.checks)


def _texts(table: RawTable, column: str, meaning: str) -> pl.Expr:
    """Return the texts in a column; lists stay lists."""
    kind, values = table.require(column, meaning), pl.col(column)
    if any(odd in str(kind) for odd in ("Struct", "Binary", "Object")):  # also of the elements of lists
        raise InputError(f"{table.checks.source}: column {column!r}: expected text for the {meaning}, got {kind}")
    if kind.is_nested():
        return values if "String" in str(kind) else values.cast(pl.List(pl.String))
    return (values.fill_nan(None) if kind.is_float() else values).cast(pl.String)


def _scan(path: Path, bad_rows: float) -> RawTable:
    if path.is_dir():
        parts = sorted(path.glob("*.parquet"))
        if not parts:
            raise InputError(f"{path}: a folder without .parquet files; name a file, or a folder of its parts")
    elif path.suffix != ".parquet":
        is_tabbed = path.name.removesuffix(".gz").endswith((".tsv", ".txt"))
        return scan_text(path, "\t" if is_tabbed else _separator(path), bad_rows)
    else:
        parts = [require_file(path, "check the path")]
    rows = pl.scan_parquet(parts).with_columns(pl.lit(None, pl.String).alias(REST))
    with readable(path):
        rows.collect_schema()
    return RawTable(rows, RowChecks(path, bad_rows), 1)


def _separator(path: Path) -> str:
    """Return the separator of a CSV file: a semicolon where its first row has more of them than of commas."""
    opened = gzip.open if path.suffix == ".gz" else open
    with readable(path), opened(require_file(path, "check the path"), "rb") as file:
        header = file.readline(1 << 16)
    return ";" if header.count(b";") > header.count(b",") else ","
