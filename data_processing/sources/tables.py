"""The two tables that every source is read into."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import polars as pl

from data_processing.layout import Item
from gream_verl.files import InputError, require_file

INTERACTIONS = pl.Schema(
    {"user": pl.Categorical(), "item": pl.Categorical(), "timestamp": pl.Int64(), "rating": pl.Float64()}
)
ITEMS = pl.Schema(
    {
        "item": pl.String(),
        "title": pl.String(),
        "description": pl.String(),
        "brand": pl.String(),
        "categories": pl.List(pl.String()),
    }
)

BAD_ROWS = 0.05
"""A larger share of bad rows stops the run: the file is then not what it is taken for."""
CHECK_EVERY = 10_000
REJECTS_KEPT = 1000
LATEST_TIMESTAMP = 2**62
NO_INTERACTION = "no user, item or timestamp"


@dataclass(frozen=True)
class SourceTables:
    """What a source holds, before any filter.

    Attributes:
        interactions: Columns user and item (categorical), timestamp (in the unit of the source: only the order counts)
            and rating (null when unknown), in the order of the source.
        items: Columns item (unique), title (never empty), description, brand, categories.
        report: Counts: rows read, rows skipped, by reason.
        rejects: The first rows of each file that were skipped, each with its file, row, reason and text.
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
        bad_rows: Largest share of bad rows, 0 to 1, that does not stop the run.
        rows: Rows read.
        skipped: How many rows were skipped, by reason.
        rejects: The first skipped rows.
    """

    source: str
    bad_rows: float = BAD_ROWS
    rows: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    rejects: list[dict[str, str | int]] = field(default_factory=list)

    def skip(self, row: int, reason: str, text: str, rows: int = 1) -> None:
        """Count a bad row, or the first of several; ``row`` counts from 1."""
        self.skipped[reason] = self.skipped.get(reason, 0) + rows
        if len(self.rejects) < REJECTS_KEPT:
            self.rejects.append({"file": self.source, "row": row, "reason": reason, "text": text[:200]})

    def count_good(self, rows: int, expected: str) -> None:
        """Count good rows, looking at the share of bad ones where reading row by row would, after every 10,000.

        Raises:
            InputError: When too many of the rows read before are bad.
        """
        to_check = CHECK_EVERY - self.rows % CHECK_EVERY
        if rows >= to_check:  # at later checks the share is only smaller
            self.rows += to_check
            self.guard(expected)
            rows -= to_check
        self.rows += rows

    def guard(self, expected: str) -> None:
        """Stop when too many of the rows read so far are bad.

        Raises:
            InputError: The message says what was ``expected`` of a row.
        """
        bad = sum(self.skipped.values())
        if bad > self.bad_rows * self.rows:
            first = self.rejects[0]
            raise InputError(
                f"{self.source}: {bad} of {self.rows} rows cannot be used, the first is row {first['row']} "
                f"({first['reason']}: {str(first['text'])[:80]!r}); expected {expected}; check that this is the right "
                f"file, or allow a larger share of bad rows than {self.bad_rows:g}"
            )

    def finish(self, expected: str) -> None:
        """Stop when the file held no rows or too many bad ones.

        Raises:
            InputError: The message says what was ``expected`` of a row.
        """
        if self.rows == 0:
            raise InputError(f"{self.source}: holds no rows; expected {expected}; check that this is the right file")
        self.guard(expected)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the search for cycles of objects: millions of rows hold none, and it takes a tenth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def items_frame(items: Mapping[str, Item]) -> pl.DataFrame:
    """Return the items table of ``items``."""
    columns = {name: [getattr(item, name) for item in items.values()] for name in ("title", "description", "brand")}
    table = pl.DataFrame({"item": list(items), **columns}, schema_overrides=ITEMS)
    named = [(key, name) for key, item in items.items() for name in item.categories]
    # Gathering the names is many times faster than a column made of Python lists.
    names = pl.DataFrame(named, schema={"item": pl.String, "categories": pl.String}, orient="row")
    lists = names.group_by("item", maintain_order=True).agg("categories")
    return table.join(lists, on="item", how="left", maintain_order="left").with_columns(
        pl.col("categories").fill_null([])
    )


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


def scan_text_table(path: Path, separator: str, columns: Sequence[str] = ()) -> pl.LazyFrame:
    """Return a table with every field as text; rows are read when it is collected, and only the columns needed.

    Args:
        path: The file, gzip or plain.
        separator: What stands between fields.
        columns: Names of the columns of a file without a header; empty when it has one.

    Raises:
        InputError: When there is no such file or it is no table.
    """
    require_file(path, "check the path")
    name = {"\t": "tabs", ",": "commas"}.get(separator, separator)
    with readable(path):
        table = pl.scan_csv(
            path,
            separator=separator,
            has_header=not columns,
            infer_schema=False,
            quote_char=None if separator == "\t" else '"',
            truncate_ragged_lines=True,
            raise_if_empty=False,
        )
        found = table.collect_schema().names()
    if not columns:
        return table
    if len(found) != len(columns):
        raise InputError(f"{path}: has {len(found)} columns; expected {', '.join(columns)} with {name} between")
    return table.rename(dict(zip(found, columns, strict=True)))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the complaints of polars about a file, when it is opened or read, into an InputError that names it."""
    try:
        yield
    except (pl.exceptions.PolarsError, UnicodeDecodeError, OSError) as error:
        kind = "a Parquet file" if path.suffix == ".parquet" else "a table in UTF-8"
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not {kind} ({reason}); check it, or download it again") from error


def checked_interactions(
    table: pl.LazyFrame,
    path: Path,
    columns: Mapping[str, str],
    first_row: int,
    bad_rows: float,
    timestamp: pl.Expr | None = None,
) -> tuple[pl.DataFrame, RowChecks]:
    """Return the interactions of a table, without the rows that lack something.

    Args:
        table: One row an interaction.
        path: Where it came from, for messages.
        columns: Name of the column of ``user``, ``item``, ``timestamp`` (a number) and, where there is one, ``rating``.
        first_row: Number of the first row in the file.
        bad_rows: Largest share of bad rows, 0 to 1, that does not stop the run.
        timestamp: Makes a number of a timestamp that is none as it stands.

    Raises:
        InputError: When a column is missing or of no use, or too many rows are bad.
    """
    schema = table.collect_schema()
    for meaning, name in columns.items():
        require_column(schema, name, meaning, path)
    if timestamp is None:
        timestamp = _numbers(schema, columns["timestamp"], "timestamp", path)
    rating = _numbers(schema, columns["rating"], "rating", path) if "rating" in columns else pl.lit(None, pl.Float64)
    wanted = {"timestamp": _in_range(timestamp), "rating": _in_range(rating)}
    wanted |= {name: id_text(schema, columns[name], path).replace("", None) for name in ("user", "item")}
    complete = pl.all_horizontal(pl.col("user", "item", "timestamp").is_not_null())
    checks = RowChecks(str(path), bad_rows)
    with readable(path):
        rows = table.select(wanted[name].cast(kind).alias(name) for name, kind in INTERACTIONS.items())
        read = rows.collect(engine="streaming")
        checks.rows = len(read)
        bad = read.select((~complete).arg_true()).to_series()
        if len(bad):
            numbered = (
                table.select(list(dict.fromkeys(columns.values())))
                .with_row_index(" row")
                .filter(pl.col(" row").is_in(bad.head(REJECTS_KEPT).implode()))
            )
            for row, *values in numbered.collect(engine="streaming").iter_rows():
                checks.skip(first_row + row, NO_INTERACTION, "\t".join(map(str, values)))
    if len(bad) > REJECTS_KEPT:
        checks.skip(first_row + bad[REJECTS_KEPT], NO_INTERACTION, "", rows=len(bad) - REJECTS_KEPT)
    checks.finish("a user, an item and a timestamp in every row")
    return read.filter(complete), checks


def require_column(columns: Iterable[str], name: str, meaning: str, path: Path) -> None:
    """Raise InputError when a table with ``columns`` has none called ``name``, which is to hold the ``meaning``."""
    columns = list(columns)
    if name not in columns:
        raise InputError(f"{path}: no column {name!r} for the {meaning} (there are {', '.join(columns)})")


def _numbers(schema: pl.Schema, column: str, meaning: str, path: Path) -> pl.Expr:
    kind = schema[column]
    if not (kind.is_numeric() or kind == pl.String):
        raise InputError(f"{path}: column {column!r} for the {meaning}: expected numbers, got {kind}")
    values = pl.col(column)
    return (values.str.strip_chars() if kind == pl.String else values).cast(pl.Float64, strict=False)


def _in_range(numbers: pl.Expr) -> pl.Expr:
    """Return null for what is no number that can be put in order."""
    return pl.when(numbers.abs() < LATEST_TIMESTAMP).then(numbers)


def id_text(schema: pl.Schema, column: str, path: Path) -> pl.Expr:
    """Return an expression for the ids in a column as text: the same in every table, whatever their type.

    Raises:
        InputError: When the column holds something else than text or numbers.
    """
    kind = schema[column]
    if kind.is_float():  # whole numbers with gaps, as pandas writes them
        return pl.col(column).cast(pl.Int64, strict=False).cast(pl.String)
    if kind.is_integer() or kind in (pl.String, pl.Categorical, pl.Enum):
        return pl.col(column).cast(pl.String).str.strip_chars()
    if kind == pl.Null:
        return pl.col(column).cast(pl.String)
    raise InputError(f"{path}: column {column!r}: expected ids as text or whole numbers, got {kind}")
