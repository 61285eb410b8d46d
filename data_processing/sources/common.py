"""The two tables that every source is read into, and the checks of their rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa

from gream_verl.core.data_folder import Item, short_title
from gream_verl.core.errors import InputError
from gream_verl.core.files import require_file

INTERACTIONS = pl.Schema({"user": pl.Categorical(), "item": pl.Categorical(), "timestamp": pl.Int64()})
TEXTS = ("title", "description", "brand")
ITEMS = pl.Schema(dict.fromkeys(("item", *TEXTS), pl.String()) | {"categories": pl.List(pl.String())})

BAD_ROWS = 0.05
REJECTS_KEPT = 1000
LATEST_TIMESTAMP = 2**62
TOO_MANY = "too many fields"
REST = " rest"
"""Column for the content of a row after the last field of the header, null in most rows."""
TEXT_OPTIONS: dict[str, Any] = {"infer_schema": False, "truncate_ragged_lines": True, "raise_if_empty": False}
EPOCHS = (1e8, 1e11, 1e14, 1e17)
"""Times of 1973 in seconds, milliseconds, microseconds and nanoseconds; 42 times as much is a time of 2103."""
ISO = ("%Y-%m-%d", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%dT%H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%dT%H:%M")
DAY_FIRST = ("%d.%m.%Y", "%d.%m.%Y %H:%M:%S%.f", "%d.%m.%Y %H:%M")
ISO_ZONE = ("%Y-%m-%d %H:%M:%S%.f%z", "%Y-%m-%dT%H:%M:%S%.f%z")


@dataclass(frozen=True)
class SourceTables:
    """The content of a source, before any filter.

    Attributes:
        interactions: Columns of :data:`INTERACTIONS`, in the order of the source. Times are in the unit of the source:
            only their order counts.
        items: Columns of :data:`ITEMS`. Ids are unique, titles never empty.
        report: Counts of rows read and of rows skipped, by reason.
        rejects: The first rows of each file that were skipped, each with its file, row, reason and text.
    """

    interactions: pl.DataFrame
    items: pl.DataFrame
    report: dict[str, int]
    rejects: list[dict[str, str | int]]


@dataclass
class RowChecks:
    """Counts of the rows of one file and of those that had to be skipped, by reason.

    Attributes:
        bad_rows: Largest share of bad rows, 0 to 1, that does not stop the run.
        low: Interactions with too low a rating, or with none; None where any rating will do.
        repeated: Rows of an item that an earlier row has.
        rejects: The first skipped rows.
    """

    source: Path
    bad_rows: float = BAD_ROWS
    rows: int = 0
    low: int | None = None
    repeated: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    rejects: list[dict[str, str | int]] = field(default_factory=list)

    def skip(self, row: int, reason: str, text: str) -> None:
        """Count a bad row; ``row`` counts from 1."""
        self.skipped[reason] += 1
        if len(self.rejects) < REJECTS_KEPT:
            self.rejects.append({"file": str(self.source), "row": row, "reason": reason, "text": text.strip()[:200]})

    def guard(self, expected: str) -> None:
        """Raise InputError when there are no rows, or too many of the rows read so far are bad."""
        if not self.rows:
            raise InputError(f"{self.source}: holds no rows; expected {expected}")
        if (bad := self.skipped.total()) > self.bad_rows * self.rows:
            first = self.rejects[0]
            raise InputError(
                f"{self.source}: {bad} of {self.rows} rows cannot be used, the first is row {first['row']} "
                f"({first['reason']}: {str(first['text'])[:80]!r}); expected {expected}; check the file, or allow a "
                f"larger share of bad rows than {self.bad_rows:g}"
            )


@dataclass(frozen=True)
class RawTable:
    """A table on disk, with a column :data:`REST`; ``first_row`` is the number of its first row in the file."""

    rows: pl.LazyFrame
    checks: RowChecks
    first_row: int

    def require(self, column: str, meaning: str) -> pl.DataType:
        """Return the type of the column for the ``meaning``; raise InputError when there is none."""
        schema = self.rows.collect_schema()
        if column not in schema:
            names = ", ".join(name for name in schema if name != REST)
            raise InputError(f"{self.checks.source}: no column {column!r} for the {meaning} (there are {names})")
        return schema[column]

    def ids(self, column: str, meaning: str) -> pl.Expr:
        """Return the ids in a column as text: the same in every table, whether written as text or as numbers."""
        kind, values = self.require(column, meaning), pl.col(column)
        if kind.is_float() or kind.is_decimal():  # whole numbers with gaps, as pandas writes them; any other is no id
            return pl.when(values == values.floor()).then(values).cast(pl.Int64, strict=False).cast(pl.String)
        if not (kind.is_integer() or kind in (pl.String, pl.Categorical, pl.Enum, pl.Null)):
            raise InputError(f"{self.checks.source}: column {column!r}: expected text or whole numbers, got {kind}")
        return values.cast(pl.String).str.strip_chars().replace("", None)

    def collect(self, **columns: pl.Expr) -> pl.DataFrame:
        """Read columns, ids as whole numbers where all of them are; ``row`` and :data:`REST` come with them."""
        named = (values.alias(name) for name, values in columns.items())
        with readable(self.checks.source):
            read = self.rows.select(*named, REST).collect(engine="streaming")
        self.checks.rows = len(read)
        read = read.with_columns(_whole_ids(read[name]) for name in ("user", "item") if name in columns)
        return read.with_row_index("row", self.first_row)

    def skip(self, cells: dict[str, Any], reason: str) -> None:
        """Count a bad row of the result of :meth:`collect`."""
        row, rest = cells.pop("row"), cells.pop(REST)
        self.checks.skip(row, reason, "\t".join(map(str, [*cells.values(), *([] if rest is None else [rest])])))


def scan_text(path: Path, separator: str, bad_rows: float, columns: Sequence[str] = ()) -> RawTable:
    """Open a table with every field as text.

    Args:
        path: The file, gzip or plain.
        separator: The separator of fields, a comma or a tab.
        bad_rows: See :class:`RowChecks`.
        columns: Names of the columns of a file without a header; empty for a file with one.
    """
    require_file(path, "check the path")
    quote = None if separator == "\t" else '"'
    scan = partial(pl.scan_csv, path, separator=separator, has_header=not columns, quote_char=quote, **TEXT_OPTIONS)
    with readable(path):
        found = scan().collect_schema().names()
    if any("\ufffd" in name for name in found):
        raise InputError(f"{path}: its first row is not UTF-8; save it in UTF-8")
    if columns and len(found) != len(columns):
        raise InputError(f"{path}: has {len(found)} columns; expected {', '.join(columns)}")
    names = [*(columns or found), REST]
    rows = scan(schema=dict.fromkeys(names, pl.String), missing_columns="insert") if found else pl.LazyFrame()
    return RawTable(rows, RowChecks(path, bad_rows), 1 if columns else 2)


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the complaints of polars about a file into an InputError that names it."""
    try:
        yield
    except (pl.exceptions.PolarsError, UnicodeDecodeError, OSError, EOFError) as error:
        kind = "Parquet" if path.suffix == ".parquet" else "a table in UTF-8"
        raise InputError(f"{path}: not {kind} ({str(error).splitlines()[0]}); save it again as Parquet") from error


def read_interactions(table: RawTable, columns: Mapping[str, str], least_rating: float | None = None) -> pl.DataFrame:
    """Return the interactions of a table without bad rows and low ratings, which are counted in its checks.

    Args:
        table: One interaction per row.
        columns: Names of the columns of ``user``, ``item``, ``timestamp`` (a number, or a date in ISO 8601) and
            ``rating``.
        least_rating: The least rating of an interaction; None reads no ratings.
    """
    user, item = (table.ids(columns[name], name).cast(pl.Categorical) for name in ("user", "item"))
    when = columns["timestamp"]
    kind = table.require(when, "timestamp")
    if not (kind.is_numeric() or kind in (pl.String, pl.Null, pl.Date, pl.Datetime)):
        raise InputError(f"{table.checks.source}: column {when!r}: expected numbers or dates, got {kind}")
    rating = pl.lit(None)
    if least_rating is not None:
        table.require(columns["rating"], "rating")
        text = pl.col(columns["rating"]).cast(pl.String).str.replace(",", ".", literal=True)
        rating = text.cast(pl.Float64, strict=False)
    read = table.collect(user=user, item=item, when=pl.col(when), rating=rating)
    read = read.with_columns(timestamp=whole_times(read["when"], table.checks.source))
    is_incomplete = pl.any_horizontal(pl.col(*INTERACTIONS).is_null())
    reason = pl.when(pl.col(REST).is_not_null()).then(pl.lit(TOO_MANY))
    read = read.with_columns(reason=reason.when(is_incomplete).then(pl.lit("no user, item or timestamp")))
    for cells in read.drop("timestamp", "rating").filter(pl.col("reason").is_not_null()).iter_rows(named=True):
        table.skip(cells, cells.pop("reason"))
    table.checks.guard("a user, an item and a timestamp in every row, and no more fields than in the header")
    good = read.filter(pl.col("reason").is_null())
    if least_rating is not None:
        liked = good.filter(pl.col("rating") >= least_rating)
        table.checks.low, good = len(good) - len(liked), liked
    return good.select(*INTERACTIONS)


def whole_times(times: pl.Series, source: Path) -> pl.Series:
    """Return times as whole numbers in the same order: ranks where a number has a fraction.

    Dates count in the unit of their column, else in microseconds. Refuse a ``source`` that mixes dates with numbers, or
    numbers that are seconds of our days with such in other units.
    """
    if times.dtype == pl.Date:
        times = times.cast(pl.Datetime("us"))
    if times.dtype == pl.Datetime:
        return times.to_physical().cast(pl.Int64)
    is_text = times.dtype == pl.String
    times = times.str.strip_chars() if is_text else times
    numbers = times.cast(pl.Float64, strict=False)
    exact = times if is_text or times.dtype.is_integer() else numbers  # Float64 cannot hold nanoseconds
    whole = exact.cast(pl.Int64, strict=False)
    kinds = [numbers.is_between(low, 42 * low) for low in EPOCHS]
    if is_text and numbers.null_count() > times.null_count():
        dates = _dates(times)
        kinds = [numbers.is_not_null(), dates.is_not_null()]
        numbers, whole = numbers.fill_null(dates.cast(pl.Float64)), whole.fill_null(dates)
    first = [times.filter(kind)[0] for kind in kinds if kind.any()]
    if len(first) > 1:
        raise InputError(
            f"{source}: its times are of several kinds, such as {first[0]} and {first[1]}; write all as one"
        )
    if (numbers != numbers.floor()).any():
        whole = numbers.rank("dense").cast(pl.Int64)
    whole = whole.fill_null(numbers.cast(pl.Int64, strict=False))
    return pl.select(pl.when(numbers.abs() < LATEST_TIMESTAMP).then(whole)).to_series()


def _dates(text: pl.Series) -> pl.Series:
    """Return dates in ISO 8601, or as day.month.year, as microseconds; null for anything else."""
    zoned = text.str.replace(r" ?(Z|UTC)$", "+0000")
    dates = [text.str.to_datetime(form, strict=False, time_unit="us") for form in (*ISO, *DAY_FIRST)]
    dates += [zoned.str.to_datetime(form, strict=False, time_unit="us") for form in ISO_ZONE]
    return pl.select(pl.coalesce(date.to_physical() for date in dates)).to_series()


def _whole_ids(ids: pl.Series) -> pl.Series:
    """Return ids as whole numbers if all are such as 12.0, as pandas writes whole numbers with gaps to text."""
    names = ids.unique().drop_nulls().cast(pl.String)
    if names.is_empty() or not names.str.contains(r"^-?\d+\.0$").all():
        return ids
    return ids.cast(pl.String).str.strip_suffix(".0").cast(ids.dtype)


def add_item(items: dict[str, Item], key: str, item: Item, checks: RowChecks) -> None:
    """Add an item; where it is there already, fill its empty fields and count the row as repeated."""
    if key in items:
        checks.repeated += 1
        item = Item(**{name: value or getattr(item, name) for name, value in vars(items[key]).items()})
    items[key] = item


def items_frame(items: Mapping[str, Item]) -> pl.DataFrame:
    """Return items as a table with the columns of :data:`ITEMS`."""
    columns: dict[str, Any] = {name: [getattr(item, name) for item in items.values()] for name in TEXTS}
    lists = pa.array([item.categories for item in items.values()], pa.large_list(pa.large_string()))  # fast
    return pl.DataFrame({"item": list(items), **columns, "categories": pl.Series(lists)}, schema=ITEMS)


def source_tables(
    interactions: pl.DataFrame, items: Mapping[str, Item], interaction_checks: RowChecks, item_checks: RowChecks
) -> SourceTables:
    """Return the tables of a source that has a file of each.

    An item without a title is called by the first words of its description; one with neither is left out.
    """
    named = {item: fields for item, fields in items.items() if not fields.title and fields.description}
    named = {item: replace(fields, title=short_title(fields.description)) for item, fields in named.items()}
    titled = {item: fields for item, fields in {**items, **named}.items() if fields.title}
    report = {"interaction rows": interaction_checks.rows, "item rows": item_checks.rows}
    report["items without a title"] = len(items) - len(titled)
    without_text = sum(not (fields.description or fields.brand or fields.categories) for fields in titled.values())
    counts = {"titles taken from the description": len(named), "items with a title only": without_text}
    counts["repeated item rows"] = item_checks.repeated
    counts["interactions with a low rating or none"] = interaction_checks.low or 0
    report |= {name: count for name, count in counts.items() if count}
    for kind, checks in (("interactions", interaction_checks), ("items", item_checks)):
        report |= {f"{kind}: {reason}": count for reason, count in sorted(checks.skipped.items())}
    return SourceTables(interactions, items_frame(titled), report, interaction_checks.rejects + item_checks.rejects)
