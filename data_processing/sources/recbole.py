"""Reader for RecBole atomic files.

An atomic file is a table with tabs; its header names each field and its type, ``user_id:token``, ``rating:float``,
``class:token_seq``, ``embedding:float_seq`` (https://recbole.io/docs/user_guide/data/atomic_files.html).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    scan_text_table,
    tables_of,
)
from gream_verl.core.data_folder import Item
from gream_verl.core.errors import InputError
from gream_verl.core.files import require_file

TYPES = ("token", "token_seq", "float", "float_seq")
FIRST_ROW = 2
"""The header is row 1."""


@dataclass(frozen=True)
class RecboleFields:
    """Which field of the atomic files means what; of several names the first that is there is taken.

    Attributes:
        user: User id in ``.inter``.
        item: Item id in ``.inter`` and ``.item``.
        timestamp: Seconds in ``.inter``.
        rating: Rating in ``.inter``; may be missing.
        title: Title in ``.item``.
        categories: Categories in ``.item``; may be missing.
        brand: Brand in ``.item``; may be missing.
        description: Description in ``.item``; may be missing.
        year: Year of release in ``.item``; may be missing.
        separator: What stands between the values of a sequence.
    """

    user: tuple[str, ...] = ("user_id",)
    item: tuple[str, ...] = ("item_id",)
    timestamp: tuple[str, ...] = ("timestamp",)
    rating: tuple[str, ...] = ("rating",)
    title: tuple[str, ...] = ("title", "movie_title", "name")
    categories: tuple[str, ...] = ("categories", "genre", "class")
    brand: tuple[str, ...] = ("brand",)
    description: tuple[str, ...] = ("description",)
    year: tuple[str, ...] = ("release_year",)
    separator: str = " "


def read_recbole(
    interactions: str | os.PathLike[str],
    items: str | os.PathLike[str],
    *,
    fields: RecboleFields | None = None,
    rewrite_title: Callable[[str], str] = str.strip,
    bad_rows: float = BAD_ROWS,
) -> SourceTables:
    """Read a ``.inter`` and a ``.item`` file.

    Args:
        interactions: The ``.inter`` file.
        items: The ``.item`` file.
        fields: Names of the fields, when they are not the usual ones.
        rewrite_title: Makes a title readable that has no HTML any more.
        bad_rows: Largest share of bad rows, 0 to 1, that does not stop the run.

    Returns:
        The two tables; bad rows are counted and listed, items without a title too. Texts lose HTML; where an item has
        several rows, a later one fills the fields that earlier ones left empty.

    Raises:
        InputError: When a file is missing, lacks a field, or holds too many bad rows.
    """
    fields = fields or RecboleFields()
    interaction_rows, interaction_checks = _read_interactions(Path(interactions), fields, bad_rows)
    described = _read_items(Path(items), fields, rewrite_title, bad_rows)
    return tables_of(interaction_rows, interaction_checks, *described)


def _scan_atomic(path: Path) -> tuple[pl.LazyFrame, dict[str, str]]:
    """Return the table with every field as text, and the type of every field."""
    require_file(path, "give the path of a RecBole atomic file")
    table = scan_text_table(path, "\t")
    columns = [column for column in table.collect_schema().names() if column != REST]
    types = {}
    for column in columns:
        name, colon, kind = column.rpartition(":")
        if not colon or kind not in TYPES:
            raise InputError(f"{path}: header field {column!r}: expected name:type with a type of {', '.join(TYPES)}")
        if name in types:
            raise InputError(f"{path}: header field {name!r} is there twice; rename or remove one of the two")
        types[name] = kind
    if not types:
        raise InputError(f"{path}: is empty; expected a header such as user_id:token")
    return table.rename(dict(zip(columns, types, strict=True))), types


def _optional(types: Mapping[str, str], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in types), None)


def _required(path: Path, types: Mapping[str, str], names: tuple[str, ...]) -> str:
    found = _optional(types, names)
    if found is None:
        raise InputError(f"{path}: no field {' or '.join(names)} in the header ({', '.join(types)}); name the field")
    return found


def _read_interactions(path: Path, fields: RecboleFields, bad_rows: float) -> tuple[pl.DataFrame, RowChecks]:
    table, types = _scan_atomic(path)
    columns = {name: _required(path, types, getattr(fields, name)) for name in ("user", "item", "timestamp")}
    if (rating := _optional(types, fields.rating)) is not None:
        columns["rating"] = rating
    return checked_interactions(table, path, columns, FIRST_ROW, bad_rows)


def _read_items(
    path: Path, fields: RecboleFields, rewrite_title: Callable[[str], str], bad_rows: float
) -> tuple[dict[str, Item], RowChecks, dict[str, int]]:
    table, types = _scan_atomic(path)
    key, title = _required(path, types, fields.item), _required(path, types, fields.title)
    optional = {
        name: _optional(types, getattr(fields, name)) for name in ("categories", "brand", "description", "year")
    }
    kind = types.get(optional["categories"] or "", "")

    def described(row: dict[str, Any]) -> Item:
        cells = {name: clean_text(row[column] or "") if column else "" for name, column in optional.items()}
        released = f"Released in {cells['year']}." if cells["year"].isdigit() else ""
        return Item(
            rewrite_title(clean_title(row[title] or "")),
            cells["description"] or released,
            cells["brand"],
            _categories(cells["categories"], kind, fields.separator),
        )

    others = [column for column in dict.fromkeys([title, *optional.values(), REST]) if column and column != key]
    ids = id_text(table.collect_schema(), key, path)
    return gather_items(table.select(ids, *others), path, FIRST_ROW, bad_rows, key, described)


def _categories(cell: str, kind: str, separator: str) -> tuple[str, ...]:
    names = cell.split(separator) if kind == "token_seq" else [cell]
    return tuple(dict.fromkeys(name for name in map(str.strip, names) if name and name.casefold() != "unknown"))
