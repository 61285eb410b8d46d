"""The two tables that every source is read into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from data_processing.layout import Item
from gream_verl.files import InputError, require_file

INTERACTIONS = pl.Schema({"user": pl.String(), "item": pl.String(), "timestamp": pl.Int64(), "rating": pl.Float64()})
ITEMS = pl.Schema(
    {
        "item": pl.String(),
        "title": pl.String(),
        "description": pl.String(),
        "brand": pl.String(),
        "categories": pl.List(pl.String()),
    }
)

BAD_ROW_SHARE = 0.05
"""More bad rows than this stop the run: the file is then not what it is taken for."""
REJECTS_KEPT = 20
LATEST_TIMESTAMP = 2**62


@dataclass(frozen=True)
class SourceTables:
    """What a source holds, before any filter.

    Attributes:
        interactions: Columns user, item, timestamp (seconds), rating (null when unknown), in the order of the source.
        items: Columns item (unique), title (never empty), description, brand, categories.
        report: Counts: rows read, rows skipped, by reason.
        rejects: A sample of the rows that were skipped, each with its file, row and reason.
    """

    interactions: pl.DataFrame
    items: pl.DataFrame
    report: dict[str, int]
    rejects: list[dict[str, str | int]]


@dataclass
class RowChecks:
    """Counts the rows of one file and those that had to be skipped.

    Attributes:
        source: The file, for messages.
        rows: Rows read.
        skipped: How many rows were skipped, by reason.
        rejects: The first few skipped rows.
    """

    source: str
    rows: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    rejects: list[dict[str, str | int]] = field(default_factory=list)

    def skip(self, row: int, reason: str, text: str) -> None:
        """Count a bad row; ``row`` counts from 1."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        if len(self.rejects) < REJECTS_KEPT:
            self.rejects.append({"file": self.source, "row": row, "reason": reason, "text": text[:200]})

    def guard(self, expected: str) -> None:
        """Stop when too many of the rows read so far are bad.

        Raises:
            InputError: The message says what was ``expected`` of a row.
        """
        bad = sum(self.skipped.values())
        if bad > BAD_ROW_SHARE * self.rows:
            first = self.rejects[0]
            raise InputError(
                f"{self.source}: {bad} of {self.rows} rows cannot be used, the first is row {first['row']} "
                f"({first['reason']}); expected {expected}; check that this is the right file"
            )

    def finish(self, expected: str) -> None:
        """Stop when the file held no rows or too many bad ones.

        Raises:
            InputError: The message says what was ``expected`` of a row.
        """
        if self.rows == 0:
            raise InputError(f"{self.source}: holds no rows; expected {expected}; check that this is the right file")
        self.guard(expected)


def items_frame(items: Mapping[str, Item]) -> pl.DataFrame:
    """Return the items table of ``items``."""
    return pl.DataFrame([(key, *_fields(item)) for key, item in items.items()], schema=ITEMS, orient="row")


def interactions_frame(rows: Iterable[tuple[str, str, int, float | None]]) -> pl.DataFrame:
    """Return the interactions table of ``(user, item, timestamp, rating)`` rows."""
    return pl.DataFrame(list(rows), schema=INTERACTIONS, orient="row")


def read_text_table(path: Path, separator: str, columns: Sequence[str] = ()) -> pl.DataFrame:
    """Return a table with every field as text.

    Args:
        path: The file, gzip or plain.
        separator: What stands between fields.
        columns: Names of the columns of a file without a header; empty when it has one.

    Raises:
        InputError: When there is no such file or it is no table.
    """
    require_file(path, "check the path")
    try:
        return pl.read_csv(
            path,
            separator=separator,
            has_header=not columns,
            new_columns=list(columns) or None,
            infer_schema=False,
            quote_char=None if separator == "\t" else '"',
            truncate_ragged_lines=True,
            raise_if_empty=False,
        )
    except (pl.exceptions.PolarsError, UnicodeDecodeError, OSError) as error:
        name = {"\t": "tabs", ",": "commas"}.get(separator, separator)
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not a table with {name} in UTF-8 ({reason}); check it") from error


def checked_interactions(
    table: pl.DataFrame, path: Path, columns: Mapping[str, str], first_row: int
) -> tuple[pl.DataFrame, RowChecks]:
    """Return the interactions of a table, without the rows that lack something.

    Args:
        table: One row an interaction.
        path: Where it came from, for messages.
        columns: Name of the column of ``user``, ``item``, ``timestamp`` (a number) and, where there is one, ``rating``.
        first_row: Number of the first row in the file.

    Raises:
        InputError: When a column is missing or too many rows are bad.
    """
    for meaning, name in columns.items():
        if name not in table.columns:
            raise InputError(f"{path}: no column {name!r} for the {meaning} (there are {', '.join(table.columns)})")
    rating = pl.col(columns["rating"]) if "rating" in columns else pl.lit(None)
    rows = table.select(
        pl.col(columns["user"]).cast(pl.String).str.strip_chars().alias("user"),
        pl.col(columns["item"]).cast(pl.String).str.strip_chars().alias("item"),
        pl.col(columns["timestamp"]).cast(pl.Float64, strict=False).alias("timestamp"),
        rating.cast(pl.Float64, strict=False).alias("rating"),
    )
    named = (pl.col("user").fill_null("") != "") & (pl.col("item").fill_null("") != "")
    timed = (pl.col("timestamp").is_finite() & (pl.col("timestamp").abs() < LATEST_TIMESTAMP)).fill_null(False)
    checks = RowChecks(str(path), rows=len(rows))
    for row, *values in rows.with_row_index(offset=first_row).filter(~(named & timed)).iter_rows():
        checks.skip(row, "no user, item or timestamp", "\t".join(map(str, values)))
    checks.finish("a user, an item and a timestamp in every row")
    return rows.filter(named & timed).with_columns(pl.col("timestamp").cast(pl.Int64)), checks


def _fields(item: Item) -> tuple[str, str, str, list[str]]:
    return item.title, item.description, item.brand, list(item.categories)
