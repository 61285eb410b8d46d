"""The two tables that every source is read into."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import polars as pl

from data_processing.layout import Item
from gream_verl.files import InputError

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


def _fields(item: Item) -> tuple[str, str, str, list[str]]:
    return item.title, item.description, item.brand, list(item.categories)
