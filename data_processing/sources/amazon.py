"""Reader for the raw Amazon dumps of 2014, 2018 and 2023: reviews or ratings, and metadata.

The dumps are dirty as they come: titles that are pieces of HTML, several metadata lines for one item, reviews twice,
items without a title or without metadata; the metadata of 2014 are Python literals, the times of 2023 milliseconds
(https://jmcauley.ucsd.edu/data/amazon/, https://nijianmo.github.io/amazon/, https://amazon-reviews-2023.github.io/).
"""

from __future__ import annotations

import html
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from data_processing.layout import Item
from data_processing.sources.json_lines import read_json_lines
from data_processing.sources.tables import (
    INTERACTIONS,
    LATEST_TIMESTAMP,
    RowChecks,
    SourceTables,
    checked_interactions,
    interactions_frame,
    items_frame,
    read_text_table,
)

CHUNK = 100_000
TITLE_WORDS = 8
LONGEST_CATEGORY = 60

_TAG = re.compile(r"</?[A-Za-z!][^>]*(?:>|$)")
_TAG_TAIL = re.compile(r'^[^<>]*"\s*/?>')
_SCRIPT = re.compile(r"getTime\(\)|function\s*\(|\bvar\s+\w+\s*=")


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
        ratings: Columns of a file of ratings; none for one with a header, which has the names above.
    """

    user: str
    item: str
    time: str
    rating: str
    categories: str
    brand: str
    ratings: tuple[str, ...] = ()


RELEASES = {
    2014: AmazonRelease(
        *("reviewerID", "asin", "unixReviewTime", "overall", "categories", "brand"),
        ratings=("user", "item", "rating", "timestamp"),
    ),
    2018: AmazonRelease(
        *("reviewerID", "asin", "unixReviewTime", "overall", "category", "brand"),
        ratings=("item", "user", "rating", "timestamp"),
    ),
    2023: AmazonRelease("user_id", "parent_asin", "timestamp", "rating", "categories", "store"),
}


def read_amazon(year: int, reviews: str | os.PathLike[str], metadata: str | os.PathLike[str]) -> SourceTables:
    """Read a file of reviews or of ratings, and the metadata that go with it.

    JSON lines are streamed; of the metadata only reviewed items are kept. Where an item has several metadata lines, a
    later line fills the fields that earlier ones left empty. An item whose title is empty or only HTML is called by the
    first words of its description; without a description either, it is left out.

    Args:
        year: Release of the dump: 2014, 2018 or 2023.
        reviews: Reviews as JSON lines, or ratings as ``.csv`` or ``.csv.gz``.
        metadata: Items as JSON lines; in 2014 as Python literals.

    Returns:
        The two tables, with counts of everything that was skipped or mended.

    Raises:
        InputError: When a file is missing or cut short, or more than 5% of its lines cannot be used.
    """
    release, path = RELEASES[year], Path(reviews)
    item_checks = RowChecks(str(metadata))
    if path.name.lower().endswith((".csv", ".csv.gz")):
        interactions, review_checks = _ratings(path, release)
    else:
        review_checks = RowChecks(str(reviews))
        interactions = pl.concat([pl.DataFrame(schema=INTERACTIONS), *_reviews(path, release, review_checks)])
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


def clean_text(text: str) -> str:
    """Return ``text`` without HTML: entities decoded, tags and pieces of tags removed, blanks collapsed.

    >>> clean_text("Home &amp; <b>Garden</b>"), clean_text('<span class="a-size-medium"'), clean_text('" Books" />')
    ('Home & Garden', '', '')
    """
    text = html.unescape(html.unescape(text))
    return " ".join(_TAG.sub(" ", _TAG_TAIL.sub(" ", text)).split())


def clean_title(title: str) -> str:
    """Return a title without HTML, "" when it holds no word or is a piece of a script."""
    text = "" if _SCRIPT.search(title) else clean_text(title)
    return text if any(letter.isalnum() for letter in text) else ""


def _reviews(path: Path, release: AmazonRelease, checks: RowChecks) -> Iterator[pl.DataFrame]:
    """Yield the interactions in chunks, so that Python objects of only one chunk exist at a time."""
    chunk: list[tuple[str, str, int, float | None]] = []
    expected = f"{release.user}, {release.item} and {release.time} in every line"
    for number, review in read_json_lines(path, checks, expected):
        user, item = review.get(release.user), review.get(release.item)
        timestamp, rating = _number(review.get(release.time)), _number(review.get(release.rating))
        if not (isinstance(user, str) and user and isinstance(item, str) and item and timestamp is not None):
            checks.skip(number, "no user, item or time", str(review))
            continue
        chunk.append((user, item, int(timestamp), rating))
        if len(chunk) == CHUNK:
            yield interactions_frame(chunk)
            chunk.clear()
    yield interactions_frame(chunk)


def _ratings(path: Path, release: AmazonRelease) -> tuple[pl.DataFrame, RowChecks]:
    named = {"user": release.user, "item": release.item, "timestamp": release.time, "rating": release.rating}
    columns = {name: name for name in release.ratings} or named
    first_row = 1 if release.ratings else 2
    rows, checks = checked_interactions(read_text_table(path, ",", release.ratings), path, columns, first_row)
    return rows, checks


def _metadata(
    path: Path, release: AmazonRelease, checks: RowChecks, wanted: set[str], repeats: Counter[str]
) -> dict[str, Item]:
    items: dict[str, Item] = {}
    for number, line in read_json_lines(path, checks, f"{release.item} and title in every line"):
        key = line.get(release.item)
        if not isinstance(key, str) or not key:
            checks.skip(number, f"no {release.item}", str(line))
        elif key in wanted:
            item = _item(line, release)
            if key in items:
                repeats[key] += 1
                item = _fill(items[key], item)
            items[key] = item
    return items


def _item(line: Mapping[str, Any], release: AmazonRelease) -> Item:
    names = (clean_text(name) for name in _texts(line.get(release.categories)))
    return Item(
        clean_title(" ".join(_texts(line.get("title")))),
        clean_text(" ".join(_texts(line.get("description")))),
        clean_text(" ".join(_texts(line.get(release.brand)))).removeprefix("by ").strip(),
        tuple(dict.fromkeys(name for name in names if 0 < len(name) <= LONGEST_CATEGORY)),
    )


def _fill(first: Item, later: Item) -> Item:
    return Item(
        first.title or later.title,
        first.description or later.description,
        first.brand or later.brand,
        first.categories or later.categories,
    )


def _name_items(items: dict[str, Item]) -> tuple[dict[str, Item], dict[str, int]]:
    """Give items without a title one from their description; leave out those that have neither."""
    named: dict[str, Item] = {}
    borrowed = 0
    for key, item in items.items():
        title = item.title or " ".join(item.description.split()[:TITLE_WORDS])
        if title:
            named[key] = Item(title, item.description, item.brand, item.categories)
            borrowed += not item.title
    counts = {"titles taken from the description": borrowed, "items without a title": len(items) - len(named)}
    return named, counts


def _texts(value: Any) -> list[str]:
    """Return the texts in ``value``; lists may hold lists, as the categories of 2014 do."""
    if isinstance(value, list):
        return [text for part in value for text in _texts(part)]
    return [value] if isinstance(value, str) else []


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) < LATEST_TIMESTAMP else None  # which no NaN is
