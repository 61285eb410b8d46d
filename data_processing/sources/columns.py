"""Reader of plain tables of interactions and items, Parquet, CSV or TSV, with columns that the user names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from data_processing.sources.clean import clean_item
from data_processing.sources.common import (
    BAD_ROWS,
    INTERACTIONS,
    ITEMS,
    RawTable,
    RowChecks,
    SourceTables,
    read_interactions,
    read_items,
    readable,
    scan_text,
    source_tables,
)
from gream_verl.core.data_folder import Item
from gream_verl.core.errors import InputError
from gream_verl.core.files import require_file

NAMES = (*INTERACTIONS, *(name for name in ITEMS if name != "item"))


def read_table(
    interactions: Path, items: Path, columns: Mapping[str, str] | None = None, *, bad_rows: float = BAD_ROWS
) -> SourceTables:
    """Read a table of interactions and one of items.

    Args:
        interactions: One interaction per row, with ``user``, ``item`` and ``timestamp`` (a number, or a date in
            ISO 8601).
        items: One item per row, with ``item``, ``title`` and optionally ``description``, ``brand`` and ``categories``
            (a list, or text separated by ``|``).
        columns: Name of the column of each of these, where it is another.
        bad_rows: Largest share of bad rows, 0 to 1, that does not stop the run.

    Raises:
        InputError: When a file or a column is missing, or too many rows are bad.
    """
    columns = columns or {}
    if unknown := sorted(set(columns) - set(NAMES)):
        raise InputError(f"column {unknown[0]!r}: unknown; known are {', '.join(NAMES)}")
    described = _scan(items, bad_rows)
    for meaning in columns.keys() & ITEMS.keys():
        described.require(columns[meaning], meaning)
    return read_tables(_scan(interactions, bad_rows), described, {name: columns.get(name, name) for name in NAMES})


def read_tables(
    interactions: RawTable,
    items: RawTable,
    columns: Mapping[str, str],
    *,
    separator: str = "|",
    rewrite_title: Callable[[str], str] = str.strip,
) -> SourceTables:
    """Read two tables; texts lose HTML.

    Args:
        interactions: One interaction per row.
        items: One item per row.
        columns: Name of the column of each of :data:`NAMES`; description, brand and categories may be missing.
        separator: Separator of categories in one text.
        rewrite_title: Makes a title readable, after its HTML is removed.
    """
    items.require(columns["title"], "title")
    schema = items.rows.collect_schema()
    present = {name: columns[name] for name in ITEMS if columns[name] in schema}
    for meaning, column in present.items():
        kind = str(schema[column])  # also of the elements of lists
        if any(odd in kind for odd in ("Struct", "Binary", "Object")):
            raise InputError(f"{items.checks.source}: column {column!r}: expected text for the {meaning}, got {kind}")

    def item_of(cells: dict[str, Any]) -> Item:
        title, description, brand = (_text(cells.get(columns[name])) for name in ("title", "description", "brand"))
        categories = tuple(_category_names(cells.get(columns["categories"]), separator))
        return clean_item(Item(title, description, brand, categories), rewrite_title)

    rows = read_interactions(interactions, columns)
    found = read_items(items, columns["item"], present.values(), item_of)
    return source_tables(rows, found, interactions.checks, items.checks)


def _scan(path: Path, bad_rows: float) -> RawTable:
    if path.suffix != ".parquet":
        is_tabbed = path.name.removesuffix(".gz").endswith((".tsv", ".txt"))
        return scan_text(path, "\t" if is_tabbed else ",", bad_rows)
    require_file(path, "check the path")
    rows = pl.scan_parquet(path)
    with readable(path):
        rows.collect_schema()
    return RawTable(rows, RowChecks(path, bad_rows), 1)


def _category_names(cell: object, separator: str) -> list[str]:
    """Flatten categories: a list, a list of paths, or one text."""
    if isinstance(cell, list):
        return [name for part in cell for name in _category_names(part, separator)]
    return _text(cell).split(separator)


def _text(cell: object) -> str:
    """Return a cell as text: "" for an empty cell, the joined parts of a list."""
    if isinstance(cell, list):
        return " ".join(map(_text, cell))
    return "" if cell is None or cell != cell else str(cell)  # NaN differs from itself
