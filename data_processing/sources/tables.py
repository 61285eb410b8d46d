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
NO_INTERACTION = "no user, item or timestamp"


@dataclass(frozen=True)
class SourceTables:
    """What a source holds, before any filter.

    Attributes:
        interactions: Columns user, item, timestamp (in the unit of the source: only the order counts), rating (null
            when unknown), in the order of the source.
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

    def skip(self, row: int, reason: str, text: str, rows: int = 1) -> None:
        """Count a bad row, or the first of several; ``row`` counts from 1."""
        self.skipped[reason] = self.skipped.get(reason, 0) + rows
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


def tables_of(
    interactions: pl.DataFrame,
    interaction_checks: RowChecks,
    items: Mapping[str, Item],
    item_checks: RowChecks,
    untitled: int,
) -> SourceTables:
    """Return the tables of a source that has a file of each, with a report of what was skipped.

    Args:
        interactions: The interactions table.
        interaction_checks: What was found in its file.
        items: Items with a title.
        item_checks: What was found in their file.
        untitled: Number of items without a title.
    """
    report = {
        "interaction rows": interaction_checks.rows,
        "item rows": item_checks.rows,
        "items without a title": untitled,
    }
    for kind, checks in (("interactions", interaction_checks), ("items", item_checks)):
        report |= {f"{kind}: {reason}": count for reason, count in sorted(checks.skipped.items())}
    return SourceTables(interactions, items_frame(items), report, interaction_checks.rejects + item_checks.rejects)


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
    name = {"\t": "tabs", ",": "commas"}.get(separator, separator)
    try:
        table = pl.read_csv(
            path,
            separator=separator,
            has_header=not columns,
            infer_schema=False,
            quote_char=None if separator == "\t" else '"',
            truncate_ragged_lines=True,
            raise_if_empty=False,
        )
    except (pl.exceptions.PolarsError, UnicodeDecodeError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{path}: not a table with {name} in UTF-8 ({reason}); check it, or download it again"
        ) from error
    if not columns:
        return table
    if table.width != len(columns):
        raise InputError(f"{path}: has {table.width} columns; expected {', '.join(columns)} with {name} between")
    return table.rename(dict(zip(table.columns, columns, strict=True)))


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
        InputError: When a column is missing or of no use, or too many rows are bad.
    """
    for meaning, name in columns.items():
        require_column(table, name, meaning, path)
    rating = _numbers(table, columns["rating"], "rating", path) if "rating" in columns else pl.lit(None, pl.Float64)
    rows = table.select(
        id_text(table, columns["user"], path).alias("user"),
        id_text(table, columns["item"], path).alias("item"),
        _numbers(table, columns["timestamp"], "timestamp", path).alias("timestamp"),
        rating.alias("rating"),
    )
    named = (pl.col("user").fill_null("") != "") & (pl.col("item").fill_null("") != "")
    timed = (pl.col("timestamp").is_finite() & (pl.col("timestamp").abs() < LATEST_TIMESTAMP)).fill_null(False)
    checks = RowChecks(str(path), rows=len(rows))
    bad = rows.with_row_index(offset=first_row).filter(~(named & timed))
    for row, *values in bad.head(REJECTS_KEPT).iter_rows():
        checks.skip(row, NO_INTERACTION, "\t".join(map(str, values)))
    if len(bad) > REJECTS_KEPT:
        checks.skip(int(bad["index"][REJECTS_KEPT]), NO_INTERACTION, "", rows=len(bad) - REJECTS_KEPT)
    checks.finish("a user, an item and a timestamp in every row")
    return rows.filter(named & timed).with_columns(pl.col("timestamp").cast(pl.Int64)), checks


def require_column(table: pl.DataFrame, name: str, meaning: str, path: Path) -> None:
    """Raise InputError when a table has no column ``name``, which is to hold the ``meaning``."""
    if name not in table.columns:
        raise InputError(f"{path}: no column {name!r} for the {meaning} (there are {', '.join(table.columns)})")


def _numbers(table: pl.DataFrame, column: str, meaning: str, path: Path) -> pl.Expr:
    kind = table[column].dtype
    if not (kind.is_numeric() or kind == pl.String):
        raise InputError(f"{path}: column {column!r} for the {meaning}: expected numbers, got {kind}")
    values = pl.col(column)
    return (values.str.strip_chars() if kind == pl.String else values).cast(pl.Float64, strict=False)


def id_text(table: pl.DataFrame, column: str, path: Path) -> pl.Expr:
    """Return an expression for the ids in a column as text: the same in every table, whatever their type.

    Raises:
        InputError: When the column holds something else than text or numbers.
    """
    kind = table[column].dtype
    if kind.is_float():  # whole numbers with gaps, as pandas writes them
        return pl.col(column).cast(pl.Int64, strict=False).cast(pl.String)
    if kind.is_integer() or kind in (pl.String, pl.Categorical, pl.Enum):
        return pl.col(column).cast(pl.String).str.strip_chars()
    if kind == pl.Null:
        return pl.col(column).cast(pl.String)
    raise InputError(f"{path}: column {column!r}: expected ids as text or whole numbers, got {kind}")


def _fields(item: Item) -> tuple[str, str, str, list[str]]:
    return item.title, item.description, item.brand, list(item.categories)
