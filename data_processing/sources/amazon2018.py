"""Reader for the raw Amazon 2018 dump: reviews and metadata as gzip JSON lines.

The dump is dirty as it comes: titles that are pieces of HTML, several metadata lines for one item, reviews twice, items
without a title or without metadata (https://nijianmo.github.io/amazon/).
"""

from __future__ import annotations

import html
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl

from data_processing.layout import Item
from data_processing.sources.json_lines import read_json_lines
from data_processing.sources.tables import INTERACTIONS, RowChecks, SourceTables, interactions_frame, items_frame

CHUNK = 100_000
TITLE_WORDS = 8
LONGEST_CATEGORY = 60
LATEST_TIMESTAMP = 2**62

_TAG = re.compile(r"</?[A-Za-z!][^>]*(?:>|$)")
_TAG_TAIL = re.compile(r'^[^<>]*"\s*/?>')
_SCRIPT = re.compile(r"getTime\(\)|function\s*\(|\bvar\s+\w+\s*=")


def read_amazon2018(reviews: str | os.PathLike[str], metadata: str | os.PathLike[str]) -> SourceTables:
    """Read a review file and its metadata file.

    Both are streamed; of the metadata only reviewed items are kept. Where an item has several metadata lines, a later
    line fills the fields that earlier ones left empty. An item whose title is empty or only HTML is called by the first
    words of its description; without a description either, it is left out.

    Args:
        reviews: JSON lines with reviewerID, asin, unixReviewTime and overall.
        metadata: JSON lines with asin, title, description, brand and category.

    Returns:
        The two tables, with counts of everything that was skipped or mended.

    Raises:
        InputError: When a file is missing or cut short, or more than 5% of its lines cannot be used.
    """
    review_checks, item_checks = RowChecks(str(reviews)), RowChecks(str(metadata))
    frames = list(_reviews(Path(reviews), review_checks))
    interactions = pl.concat(frames) if frames else pl.DataFrame(schema=INTERACTIONS)
    wanted = set(interactions["item"].unique())
    items, counts = _name_items(_metadata(Path(metadata), item_checks, wanted, repeats := Counter[str]()))
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


def _reviews(path: Path, checks: RowChecks) -> Iterator[pl.DataFrame]:
    """Yield the interactions in chunks, so that Python objects of only one chunk exist at a time."""
    chunk: list[tuple[str, str, int, float | None]] = []
    for number, review in read_json_lines(path, checks, "reviewerID, asin and unixReviewTime in every line"):
        user, item = review.get("reviewerID"), review.get("asin")
        timestamp, rating = _number(review.get("unixReviewTime")), _number(review.get("overall"))
        if not (isinstance(user, str) and user and isinstance(item, str) and item and timestamp is not None):
            checks.skip(number, "no user, item or time", str(review))
            continue
        chunk.append((user, item, int(timestamp), rating))
        if len(chunk) == CHUNK:
            yield interactions_frame(chunk)
            chunk.clear()
    yield interactions_frame(chunk)


def _metadata(path: Path, checks: RowChecks, wanted: set[str], repeats: Counter[str]) -> dict[str, Item]:
    items: dict[str, Item] = {}
    for number, line in read_json_lines(path, checks, "asin and title in every line"):
        key = line.get("asin")
        if not isinstance(key, str) or not key:
            checks.skip(number, "no asin", str(line))
        elif key in wanted:
            item = _item(line)
            if key in items:
                repeats[key] += 1
                item = _fill(items[key], item)
            items[key] = item
    return items


def _item(line: dict[str, Any]) -> Item:
    names = (clean_text(name) for name in _texts(line.get("category")))
    return Item(
        clean_title(" ".join(_texts(line.get("title")))),
        clean_text(" ".join(_texts(line.get("description")))),
        clean_text(" ".join(_texts(line.get("brand")))).removeprefix("by ").strip(),
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
    return [text for text in (value if isinstance(value, list) else [value]) if isinstance(text, str)]


def _number(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if math.isfinite(value) and abs(value) < LATEST_TIMESTAMP else None
