"""Reader of the raw Amazon dumps of 2014, 2018 and 2023: reviews or ratings, and metadata.

The dumps are dirty as they come: titles that are pieces of HTML, several metadata lines for one item, reviews twice,
items without a title or without metadata. The metadata of 2014 are Python literals, the times of 2023 milliseconds
(https://jmcauley.ucsd.edu/data/amazon/, https://nijianmo.github.io/amazon/, https://amazon-reviews-2023.github.io/).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

import msgspec
import polars as pl

from data_processing.sources.clean import clean_item
from data_processing.sources.common import (
    BAD_ROWS,
    INTERACTIONS,
    LATEST_TIMESTAMP,
    RowChecks,
    SourceTables,
    add_item,
    read_interactions,
    scan_text,
    source_tables,
    whole_times,
)
from data_processing.sources.json_lines import read_json_lines
from gream_verl.core.data_folder import Item, item_of, item_text
from gream_verl.core.errors import InputError

CHUNK = 50_000
LONGEST_CATEGORY = 60
LONGEST_DESCRIPTION = 2000
"""Characters of a description of 2023, whose text is spread over three fields."""

_BEFORE_2023 = {"user": "reviewerID", "item": "asin", "timestamp": "unixReviewTime", "text": "reviewText",
                "rating": "overall"}  # fmt: skip
NAMES = {
    2014: _BEFORE_2023 | {"votes": "helpful"},
    2018: _BEFORE_2023 | {"votes": "vote", "categories": "category"},
    2023: {"user": "user_id", "item": "parent_asin", "summary": "title", "votes": "helpful_vote", "brand": "store"},
}
"""Names of fields in each release; other fields have the same name everywhere."""
RATING_COLUMNS = {
    2014: ("user", "item", "rating", "timestamp"),
    2018: ("item", "user", "rating", "timestamp"),
    2023: (),  # has a header
}

Id = Annotated[str, msgspec.Meta(min_length=1)]
Time = Annotated[float, msgspec.Meta(gt=-LATEST_TIMESTAMP, lt=LATEST_TIMESTAMP)]


def read_amazon(
    year: int, reviews: Path, metadata: Path, *, bad_rows: float = BAD_ROWS, least_rating: float | None = None
) -> SourceTables:
    """Read a file of reviews or of ratings, and the metadata of the same release.

    JSON lines are streamed; of the metadata only reviewed items are kept. A later metadata line of an item fills the
    fields that earlier ones left empty.

    Args:
        year: Release of the dump: 2014, 2018 or 2023.
        reviews: Reviews as JSON lines, or ratings as ``.csv`` or ``.csv.gz``.
        metadata: Items as JSON lines; in 2014 as Python literals.
        bad_rows: Largest share of bad lines, 0 to 1, that does not stop the run.
        least_rating: The least rating of an interaction; None for any.
    """
    review_checks, item_checks = RowChecks(reviews, bad_rows), RowChecks(metadata, bad_rows)
    if holds_ratings(reviews):
        columns = RATING_COLUMNS[year]
        table = scan_text(reviews, ",", bad_rows, columns)
        names = {name: name if columns else NAMES[year].get(name, name) for name in (*INTERACTIONS, "rating")}
        interactions, review_checks = read_interactions(table, names, least_rating), table.checks
        if columns:
            _check_order(interactions, reviews, year)
    else:
        interactions = _read_reviews(reviews, year, review_checks, least_rating)
    wanted = set(interactions["item"].unique())
    items = _read_metadata(metadata, year, item_checks, wanted)
    tables = source_tables(interactions, items, review_checks, item_checks)
    tables.report["reviewed items without metadata"] = len(wanted) - len(items)
    return tables


def _check_order(interactions: pl.DataFrame, path: Path, year: int) -> None:
    """Refuse ratings without a header whose first two columns are those of the other release."""
    ids = (interactions[name].unique().cast(pl.String) for name in ("user", "item"))
    are_items = (column.str.contains(r"^(B0[0-9A-Z]{8}|\d{9}[\dX])$") for column in ids)
    users, items = (len(column.filter(column)) / max(len(column), 1) for column in are_items)
    if users > 0.5 > items:
        release = {2014: 2018, 2018: 2014}[year]
        raise InputError(f"{path}: item and user are in the order of Amazon {release}; give --source amazon{release}")


def holds_ratings(path: Path) -> bool:
    """Return whether a file holds ratings rather than reviews, by its name."""
    return path.name.lower().endswith((".csv", ".csv.gz"))


def read_chunks(path: Path, year: int, checks: RowChecks, fields: Sequence[tuple[Any, ...]]) -> Iterator[list[Any]]:
    """Yield the records of a file of one release, :data:`CHUNK` at a time.

    ``fields`` are name and type of each field, and its default where it may be missing.
    """
    names = NAMES[year]
    record = msgspec.defstruct("Record", fields, rename=names, gc=False)
    needed = ", ".join(names.get(name, name) for name, _, *default in fields if not default)
    records = read_json_lines(path, checks, needed, record)
    try:
        while chunk := list(islice(records, CHUNK)):
            yield chunk
    except InputError as error:
        text = str(checks.rejects[0]["text"]) if checks.rejects else ""
        found = "2023" if "parent_asin" in text else "2014 or 2018" if "asin" in text else str(year)
        raise InputError(f"{error}" + (f". It is of Amazon {found}" if str(year) not in found else "")) from error


def _read_reviews(path: Path, year: int, checks: RowChecks, least_rating: float | None) -> pl.DataFrame:
    schema = {**INTERACTIONS, "timestamp": pl.Float64()}
    frames = [pl.DataFrame(schema=schema)]
    rating = ("rating", float | None, None)
    for chunk in read_chunks(path, year, checks, [("user", Id), ("item", Id), ("timestamp", Time), rating]):
        if least_rating is not None:
            liked = [line for line in chunk if line.rating is not None and line.rating >= least_rating]
            checks.low = (checks.low or 0) + len(chunk) - len(liked)
            chunk[:] = liked
        frames.append(pl.DataFrame({name: list(map(attrgetter(name), chunk)) for name in schema}, schema=schema))
    interactions = pl.concat(frames)
    return interactions.with_columns(timestamp=whole_times(interactions["timestamp"], path))


def _read_metadata(path: Path, year: int, checks: RowChecks, wanted: set[str]) -> dict[str, Item]:
    texts = ("description", "features", "details") if year == 2023 else ("description",)
    optional = [(name, Any, None) for name in ("title", "brand", "categories", *texts)]
    items: dict[str, Item] = {}
    for chunk in read_chunks(path, year, checks, [("item", Id), *optional]):
        for line in chunk:
            if line.item in wanted:
                fields = msgspec.structs.asdict(line)
                if year == 2023:
                    fields["description"] = _description(fields)
                item = clean_item(item_of(fields))
                names = tuple(name for name in item.categories if len(name) <= LONGEST_CATEGORY)  # longer: no names
                item = replace(item, brand=item.brand.removeprefix("by ").strip(), categories=names)
                add_item(items, line.item, item, checks)
    return items


def _description(fields: Mapping[str, Any]) -> str:
    """Return description, features and details of an item of 2023 as one text, in this order.

    >>> _description({"description": [], "features": ["Soft."], "details": {"Color": "Red"}})
    'Soft. Color: Red.'
    """
    details = fields["details"] if isinstance(fields["details"], dict) else {}
    named = [f"{name}: {value}." for name, value in details.items() if isinstance(value, str)]
    return item_text([fields["description"], fields["features"], named])[:LONGEST_DESCRIPTION]
