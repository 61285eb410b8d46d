"""Reader for the raw Amazon dumps of 2014, 2018 and 2023: reviews or ratings, and metadata.

The dumps are dirty as they come: titles that are pieces of HTML, several metadata lines for one item, reviews twice,
items without a title or without metadata; the metadata of 2014 are Python literals, the times of 2023 milliseconds
(https://jmcauley.ucsd.edu/data/amazon/, https://nijianmo.github.io/amazon/, https://amazon-reviews-2023.github.io/).
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import msgspec
import polars as pl

from data_processing.sources.clean import clean_text, clean_title
from data_processing.sources.json_lines import read_json_lines
from data_processing.sources.tables import (
    BAD_ROWS,
    INTERACTIONS,
    LATEST_TIMESTAMP,
    RowChecks,
    SourceTables,
    checked_interactions,
    collector_paused,
    fill_item,
    in_order,
    items_frame,
    scan_text_table,
)
from gream_verl.core.data_folder import Item

CHUNK = 50_000
TITLE_WORDS = 8
LONGEST_CATEGORY = 60


@dataclass(frozen=True)
class AmazonRelease:
    """What one release calls things.

    Attributes:
        user: User in a review.
        item: Item in a review and in the metadata.
        time: Time in a review.
        rating: Rating in a review.
        categories: Categories in the metadata.
        brand: Brand in the metadata.
        summary: Headline of a review.
        text: Text of a review.
        votes: How many found a review helpful.
        ratings: Columns of a file of ratings; none for one with a header, which has the names above.
    """

    user: str
    item: str
    time: str
    rating: str
    categories: str
    brand: str
    summary: str
    text: str
    votes: str
    ratings: tuple[str, ...] = ()


RELEASES = {
    2014: AmazonRelease(
        *("reviewerID", "asin", "unixReviewTime", "overall", "categories", "brand"),
        *("summary", "reviewText", "helpful"),
        ratings=("user", "item", "rating", "timestamp"),
    ),
    2018: AmazonRelease(
        *("reviewerID", "asin", "unixReviewTime", "overall", "category", "brand"),
        *("summary", "reviewText", "vote"),
        ratings=("item", "user", "rating", "timestamp"),
    ),
    2023: AmazonRelease(
        *("user_id", "parent_asin", "timestamp", "rating", "categories", "store"),
        *("title", "text", "helpful_vote"),
    ),
}

Id = Annotated[str, msgspec.Meta(min_length=1)]
Number = Annotated[float, msgspec.Meta(gt=-LATEST_TIMESTAMP, lt=LATEST_TIMESTAMP)]
R = TypeVar("R", bound=msgspec.Struct)


class Review(msgspec.Struct, gc=False):
    """What is needed of a review; lines with anything else in these fields are read with care."""

    user: Id
    item: Id
    timestamp: Number
    rating: Number | None = None


class ItemLine(msgspec.Struct, gc=False):
    """What is needed of a line of metadata, as it stands there."""

    item: Id
    title: Any = None
    description: Any = None
    brand: Any = None
    categories: Any = None


def renamed(record: type[R], names: Mapping[str, str]) -> type[R]:
    """Return ``record`` with other names of its fields in JSON."""
    fields = msgspec.structs.fields(record)
    typed = [
        (field.name, field.type) if field.required else (field.name, field.type, field.default) for field in fields
    ]
    return cast(type[R], msgspec.defstruct(record.__name__, typed, bases=(record,), rename=names, gc=False))


@collector_paused()
def read_amazon(
    year: int, reviews: str | os.PathLike[str], metadata: str | os.PathLike[str], *, bad_rows: float = BAD_ROWS
) -> SourceTables:
    """Read a file of reviews or of ratings, and the metadata that go with it.

    JSON lines are streamed; of the metadata only reviewed items are kept. Where an item has several metadata lines, a
    later line fills the fields that earlier ones left empty. An item whose title is empty or only HTML is called by the
    first words of its description; without a description either, it is left out.

    Args:
        year: Release of the dump: 2014, 2018 or 2023.
        reviews: Reviews as JSON lines, or ratings as ``.csv`` or ``.csv.gz``.
        metadata: Items as JSON lines; in 2014 as Python literals.
        bad_rows: Largest share of bad lines, 0 to 1, that does not stop the run.

    Returns:
        The two tables, with counts of everything that was skipped or mended.

    Raises:
        InputError: When a file is missing or cut short, or too many of its lines cannot be used.
    """
    release, path = RELEASES[year], Path(reviews)
    item_checks = RowChecks(str(metadata), bad_rows)
    if holds_ratings(path):
        interactions, review_checks = _ratings(path, release, bad_rows)
    else:
        review_checks = RowChecks(str(reviews), bad_rows)
        interactions = pl.concat(_reviews(path, release, review_checks))
        interactions.replace_column(2, in_order(interactions["timestamp"]))
    wanted = set(interactions["item"].unique())
    items, counts = _name_items(_metadata(Path(metadata), release, item_checks, wanted, repeats := Counter[str]()))
    report = {
        "review lines": review_checks.rows,
        "metadata lines": item_checks.rows,
        **{f"reviews: {reason}": count for reason, count in sorted(review_checks.skipped.items())},
        **{f"metadata: {reason}": count for reason, count in sorted(item_checks.skipped.items())},
        "items with several metadata lines": len(repeats),
        "reviewed items without metadata": len(wanted) - len(items) - counts["items without a title"],
        **counts,
    }
    return SourceTables(interactions, items_frame(items), report, review_checks.rejects + item_checks.rejects)


def holds_ratings(path: Path) -> bool:
    """Return whether a file holds ratings rather than reviews, by its name."""
    return path.name.lower().endswith((".csv", ".csv.gz"))


def _reviews(path: Path, release: AmazonRelease, checks: RowChecks) -> Iterator[pl.DataFrame]:
    """Yield the interactions in chunks, so that Python objects of only one chunk exist at a time."""

    def mend(number: int, line: dict[str, Any]) -> Review | None:
        user, item = line.get(release.user), line.get(release.item)
        timestamp, rating = _number(line.get(release.time)), _number(line.get(release.rating))
        if isinstance(user, str) and user and isinstance(item, str) and item and timestamp is not None:
            return Review(user, item, timestamp, rating)
        checks.skip(number, "no user, item or time", str(line))
        return None

    names = {"user": release.user, "item": release.item, "timestamp": release.time, "rating": release.rating}
    expected = f"{release.user}, {release.item} and {release.time} in every line"
    chunk: list[Review] = []
    for reviews in read_json_lines(path, checks, expected, renamed(Review, names), mend):
        chunk += reviews
        if len(chunk) >= CHUNK:
            yield _frame(chunk)
            chunk.clear()
    yield _frame(chunk)


def _frame(reviews: list[Review]) -> pl.DataFrame:
    columns = {
        "user": pl.Series([review.user for review in reviews], dtype=pl.String),
        "item": pl.Series([review.item for review in reviews], dtype=pl.String),
        "timestamp": pl.Series([review.timestamp for review in reviews], dtype=pl.Float64),
        "rating": pl.Series([review.rating for review in reviews], dtype=pl.Float64),
    }
    return pl.DataFrame(columns).cast({name: INTERACTIONS[name] for name in ("user", "item")})


def _ratings(path: Path, release: AmazonRelease, bad_rows: float) -> tuple[pl.DataFrame, RowChecks]:
    named = {"user": release.user, "item": release.item, "timestamp": release.time, "rating": release.rating}
    columns = {name: name for name in release.ratings} or named
    first_row = 1 if release.ratings else 2
    return checked_interactions(scan_text_table(path, ",", release.ratings), path, columns, first_row, bad_rows)


def _metadata(
    path: Path, release: AmazonRelease, checks: RowChecks, wanted: set[str], repeats: Counter[str]
) -> dict[str, Item]:
    names = {"item": release.item, "brand": release.brand, "categories": release.categories}

    def mend(number: int, line: dict[str, Any]) -> ItemLine | None:
        key = line.get(release.item)
        if isinstance(key, str) and key:
            return ItemLine(
                key, line.get("title"), line.get("description"), line.get(release.brand), line.get(release.categories)
            )
        checks.skip(number, f"no {release.item}", str(line))
        return None

    items: dict[str, Item] = {}
    expected = f"{release.item} and title in every line"
    for lines in read_json_lines(path, checks, expected, renamed(ItemLine, names), mend):
        for line in lines:
            if line.item in wanted:
                item = _item(line)
                if line.item in items:
                    repeats[line.item] += 1
                    item = fill_item(items[line.item], item)
                items[line.item] = item
    return items


_clean_name = lru_cache(1 << 16)(clean_text)
"""For what many items share."""


def _item(line: ItemLine) -> Item:
    names = map(_clean_name, _texts(line.categories))
    return Item(
        clean_title(" ".join(_texts(line.title))),
        clean_text(" ".join(_texts(line.description))),
        _clean_name(" ".join(_texts(line.brand))).removeprefix("by ").strip(),
        tuple(dict.fromkeys(name for name in names if 0 < len(name) <= LONGEST_CATEGORY)),
    )


def _name_items(items: dict[str, Item]) -> tuple[dict[str, Item], dict[str, int]]:
    """Give items without a title one from their description; leave out those that have neither."""
    named: dict[str, Item] = {}
    borrowed = 0
    for key, item in items.items():
        if item.title:
            named[key] = item
        elif item.description:
            named[key] = replace(item, title=" ".join(item.description.split()[:TITLE_WORDS]))
            borrowed += 1
    counts = {"titles taken from the description": borrowed, "items without a title": len(items) - len(named)}
    return named, counts


def _texts(value: Any) -> list[str]:
    """Return the texts in ``value``; lists may hold lists, as the categories of 2014 do."""
    if isinstance(value, str):
        return [value]
    return [text for part in value for text in _texts(part)] if isinstance(value, list) else []


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < LATEST_TIMESTAMP else None  # which no NaN is
