"""The two tables that every source is read into."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from gream_verl.core.data_folder import Item
from gream_verl.core.errors import InputError
from gream_verl.core.files import require_file

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
TOO_MANY = "too many fields"
REST = " rest"
"""Column of a text table for what a row has behind the last field of the header."""
FRACTION = " fraction"
"""Column that tells which times have a fraction."""


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


def fill_item(first: Item, later: Item) -> Item:
    """Return ``first`` with the fields of ``later`` where its own are empty."""
    return Item(
        first.title or later.title,
        first.description or later.description,
        first.brand or later.brand,
        first.categories or later.categories,
    )


def gather_items(
    table: pl.LazyFrame,
    path: Path,
    first_row: int,
    bad_rows: float,
    key: str,
    described: Callable[[dict[str, Any]], Item],
) -> tuple[dict[str, Item], RowChecks, dict[str, int]]:
    """Return the items of a table that have a title.

    Args:
        table: One row an item; where an item comes again, the later row fills the fields that are still empty.
        path: Where it came from, for messages.
        first_row: Number of the first row in the file.
        bad_rows: Largest share of bad rows, 0 to 1, that does not stop the run.
        key: The column of ids.
        described: Makes an item of a row.

    Returns:
        The items, what was found in the file, and counts of what else is no fault of a row.

    Raises:
        InputError: When the file cannot be read, or too many of its rows are bad.
    """
    with readable(path):
        rows = table.collect(engine="streaming")
    checks = RowChecks(str(path), bad_rows, rows=len(rows))
    rows = rows.with_columns(whole_ids(rows[key]))
    items: dict[str, Item] = {}
    repeated = set()
    for number, values in enumerate(rows.iter_rows(named=True), start=first_row):
        item = values[key]
        if not item or values.get(REST) is not None:
            text = "\t".join(str(value) for value in values.values() if value is not None)
            checks.skip(number, TOO_MANY if item else "no item id", text)
        elif item in items:
            repeated.add(item)
            items[item] = fill_item(items[item], described(values))
        else:
            items[item] = described(values)
    checks.finish("an item id in every row, and no more fields than in the header")
    titled = {item: fields for item, fields in items.items() if fields.title}
    counts = {"items without a title": len(items) - len(titled)}
    return titled, checks, counts | ({"items with several rows": len(repeated)} if repeated else {})


def interactions_frame(rows: Iterable[tuple[str, str, int, float | None]]) -> pl.DataFrame:
    """Return the interactions table of ``(user, item, timestamp, rating)`` rows."""
    return pl.DataFrame(list(rows), schema=INTERACTIONS, orient="row")


def tables_of(
    interactions: pl.DataFrame,
    interaction_checks: RowChecks,
    items: Mapping[str, Item],
    item_checks: RowChecks,
    counts: Mapping[str, int],
) -> SourceTables:
    """Return the tables of a source that has a file of each, with a report of what was skipped.

    Args:
        interactions: The interactions table.
        interaction_checks: What was found in its file.
        items: Items with a title.
        item_checks: What was found in their file.
        counts: What else was counted in their file.
    """
    report = {"interaction rows": interaction_checks.rows, "item rows": item_checks.rows, **counts}
    for kind, checks in (("interactions", interaction_checks), ("items", item_checks)):
        report |= {f"{kind}: {reason}": count for reason, count in sorted(checks.skipped.items())}
    return SourceTables(interactions, items_frame(items), report, interaction_checks.rejects + item_checks.rejects)


def scan_text_table(path: Path, separator: str, columns: Sequence[str] = ()) -> pl.LazyFrame:
    """Return a table with every field as text; rows are read when it is collected, and only the columns needed.

    A last column, :data:`REST`, is null but in rows with more fields than there are columns.

    Args:
        path: The file, gzip or plain.
        separator: What stands between fields.
        columns: Names of the columns of a file without a header; empty when it has one.

    Raises:
        InputError: When there is no such file or it is no table.
    """
    require_file(path, "check the path")
    name = {"\t": "tabs", ",": "commas"}.get(separator, separator)
    scan = partial(
        pl.scan_csv,
        path,
        separator=separator,
        has_header=not columns,
        infer_schema=False,
        quote_char=None if separator == "\t" else '"',
        truncate_ragged_lines=True,
        raise_if_empty=False,
    )
    with readable(path):
        found = scan().collect_schema().names()
    if any("\ufffd" in field for field in found):
        raise InputError(f"{path}: its first row is not UTF-8; save the table as UTF-8")
    if columns and len(found) != len(columns):
        raise InputError(f"{path}: has {len(found)} columns; expected {', '.join(columns)} with {name} between")
    if not found:
        return scan()
    return scan(schema=dict.fromkeys([*(columns or found), REST], pl.String), missing_columns="insert")


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the complaints of polars about a file, when it is opened or read, into an InputError that names it."""
    try:
        yield
    except (pl.exceptions.PolarsError, UnicodeDecodeError, OSError) as error:
        reason = str(error).splitlines()[0]
        if path.suffix == ".parquet":
            problem = f"not a Parquet file ({reason}); check it, or download it again"
        elif "utf-8" in reason:
            problem = f"not UTF-8 ({reason}); save the table as UTF-8"
        elif reason.startswith(("could not parse", "CSV malformed")):
            problem = (
                f"a double quote is not closed, or stands inside a field ({reason}); put such a field in double "
                "quotes and write each quote in it twice, or save the table with tabs (.tsv), where quotes are letters"
            )
        else:
            problem = f"not a table ({reason}); check it, or download it again"
        raise InputError(f"{path}: {problem}") from error


def checked_interactions(
    table: pl.LazyFrame,
    path: Path,
    columns: Mapping[str, str],
    first_row: int,
    bad_rows: float,
    dates: pl.Expr | None = None,
) -> tuple[pl.DataFrame, RowChecks]:
    """Return the interactions of a table, without the rows that lack something.

    Args:
        table: One row an interaction.
        path: Where it came from, for messages.
        columns: Name of the column of ``user``, ``item``, ``timestamp`` (a number) and, where there is one, ``rating``.
        first_row: Number of the first row in the file.
        bad_rows: Largest share of bad rows, 0 to 1, that does not stop the run.
        dates: Makes a whole number of a timestamp that is no number, or null.

    Returns:
        The interactions, and what was found in the file. Where a timestamp has a fraction, all are replaced by their
        ranks, as only their order counts.

    Raises:
        InputError: When a column is missing or of no use, or too many rows are bad.
    """
    schema = table.collect_schema()
    for meaning, name in columns.items():
        require_column(schema, name, meaning, path)
    dates = pl.lit(None, pl.Int64) if dates is None else dates
    whole, number = _times(schema, columns["timestamp"], path)
    fraction = number != number.floor()
    moment = pl.coalesce(whole, pl.when(~fraction).then(number).cast(pl.Int64), dates)
    rating = _number(schema, columns["rating"], "rating", path) if "rating" in columns else pl.lit(None, pl.Float64)
    wanted = {"timestamp": moment, "rating": _in_range(rating)}
    wanted |= {name: id_text(schema, columns[name], path).replace("", None) for name in ("user", "item")}
    rest = pl.col(REST) if REST in schema else pl.lit(None, pl.String)
    incomplete = pl.any_horizontal(pl.col("user", "item", "timestamp").is_null())
    checks = RowChecks(str(path), bad_rows)
    with readable(path):
        rows = table.select(
            *(wanted[name].cast(kind).alias(name) for name, kind in INTERACTIONS.items()),
            rest.is_not_null().alias(REST),
            fraction.fill_null(False).alias(FRACTION),
        )
        read = rows.collect(engine="streaming")
        if read[FRACTION].any():
            times = table.select(timestamp=pl.coalesce(number, dates.cast(pl.Float64))).collect(engine="streaming")
            read = read.with_columns(in_order(times["timestamp"]))
        checks.rows = len(read)
        bad = read.select((incomplete | pl.col(REST)).arg_true()).to_series()
        if len(bad):
            numbered = (
                table.select(rest.alias(REST), *dict.fromkeys(columns.values()))
                .with_row_index(" row")
                .filter(pl.col(" row").is_in(bad.head(REJECTS_KEPT).implode()))
            )
            for row, more, *values in numbered.collect(engine="streaming").iter_rows():
                values += [more] * (more is not None)
                reason = NO_INTERACTION if more is None else TOO_MANY
                checks.skip(first_row + row, reason, "\t".join(map(str, values)))
    if len(bad) > REJECTS_KEPT:
        too_many = int(read[REST].sum())
        for reason, count in ((TOO_MANY, too_many), (NO_INTERACTION, len(bad) - too_many)):
            if more := count - checks.skipped.get(reason, 0):
                checks.skip(first_row + bad[REJECTS_KEPT], reason, "", rows=more)
    checks.finish("a user, an item and a timestamp in every row, and no more fields than in the header")
    good = read.filter(~(incomplete | pl.col(REST))).drop(REST, FRACTION)
    return good.with_columns(whole_ids(good["user"]), whole_ids(good["item"])), checks


def in_order(times: pl.Series) -> pl.Series:
    """Return times as whole numbers in the same order: as they are or, where one has a fraction, their ranks."""
    whole = bool((times == times.floor()).all())
    return (times if whole else times.rank("dense")).cast(pl.Int64)


def whole_ids(ids: pl.Series) -> pl.Series:
    """Return ids as whole numbers if all are such as 12.0, as pandas writes whole numbers with gaps, to text too."""
    names = ids.unique().drop_nulls().cast(pl.String)
    if names.is_empty() or not names.str.contains(r"^-?\d+\.0$").all():
        return ids
    return ids.cast(pl.String).str.strip_suffix(".0").cast(ids.dtype)


def require_column(columns: Iterable[str], name: str, meaning: str, path: Path) -> None:
    """Raise InputError when a table with ``columns`` has none called ``name``, which is to hold the ``meaning``."""
    columns = [column for column in columns if column != REST]
    if name not in columns:
        raise InputError(f"{path}: no column {name!r} for the {meaning} (there are {', '.join(columns)})")


def _number(schema: pl.Schema, column: str, meaning: str, path: Path) -> pl.Expr:
    kind = schema[column]
    if not (kind.is_numeric() or kind in (pl.String, pl.Null)):
        raise InputError(f"{path}: column {column!r} for the {meaning}: expected numbers, got {kind}")
    values = pl.col(column)
    return (values.str.strip_chars() if kind == pl.String else values).cast(pl.Float64, strict=False)


def _times(schema: pl.Schema, column: str, path: Path) -> tuple[pl.Expr, pl.Expr]:
    """Return times that are written as whole numbers, which may be too long for Float64, and any times as Float64."""
    number = _in_range(_number(schema, column, "timestamp", path))
    values = pl.col(column).str.strip_chars() if schema[column] == pl.String else pl.col(column)
    exact = schema[column].is_integer() or schema[column] == pl.String
    return _in_range(values.cast(pl.Int64, strict=False)) if exact else pl.lit(None, pl.Int64), number


def _in_range(numbers: pl.Expr) -> pl.Expr:
    """Return null for what is no number that can be put in order."""
    return pl.when(numbers.is_between(-LATEST_TIMESTAMP, LATEST_TIMESTAMP, closed="none")).then(numbers)


def id_text(schema: pl.Schema, column: str, path: Path) -> pl.Expr:
    """Return an expression for the ids in a column as text: the same in every table, whatever their type.

    Raises:
        InputError: When the column holds something else than text or numbers.
    """
    kind = schema[column]
    if kind.is_float():  # whole numbers with gaps, as pandas writes them; any other is no id
        numbers = pl.col(column)
        return pl.when(numbers == numbers.floor()).then(numbers).cast(pl.Int64, strict=False).cast(pl.String)
    if kind.is_integer() or kind in (pl.String, pl.Categorical, pl.Enum):
        return pl.col(column).cast(pl.String).str.strip_chars()
    if kind == pl.Null:
        return pl.col(column).cast(pl.String)
    raise InputError(f"{path}: column {column!r}: expected ids as text or whole numbers, got {kind}")
