"""What users wrote about items, from the reviews of an Amazon dump."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import polars as pl

from data_processing.sources.amazon import CHUNK, RELEASES, AmazonRelease, Id, holds_ratings, renamed
from data_processing.sources.clean import clean_text, cut_text
from data_processing.sources.json_lines import read_json_lines
from data_processing.sources.tables import BAD_ROWS, INTERACTIONS, RowChecks
from gream_verl.core.errors import InputError


class Written(msgspec.Struct, gc=False):
    """What is needed of a review here, as it stands there."""

    user: Id
    item: Id
    summary: Any = None
    text: Any = None
    votes: Any = None


def read_review_texts(
    year: int,
    reviews: str | os.PathLike[str],
    pairs: pl.DataFrame,
    *,
    per_item: int = 5,
    letters: int = 400,
    bad_rows: float = BAD_ROWS,
) -> pl.DataFrame:
    """Return the best reviews of every item, out of those that ``pairs`` allow.

    The reviews that most found helpful come first, then the longest (up to the cut), then the first in the file. Of a
    user who reviewed an item several times, the best review counts. No more than the best reviews are held in memory.

    Args:
        year: Release of the dump: 2014, 2018 or 2023.
        reviews: Reviews as JSON lines.
        pairs: Columns ``user`` and ``item``: the interactions whose reviews may be used, those of training.
        per_item: Reviews an item, at most.
        letters: Length of a text, at most; it ends with a whole word.
        bad_rows: Largest share of bad lines, 0 to 1, that does not stop the run.

    Returns:
        Columns ``item`` and ``text`` (``summary: text``, without HTML), items sorted as text, the best review first.

    Raises:
        InputError: When the file is missing or cut short, holds no texts, or too many of its lines cannot be used.
    """
    path = Path(reviews)
    if holds_ratings(path):
        raise InputError(f"{path}: a file of ratings holds no texts; give the file of reviews, such as reviews.json.gz")
    kinds = {name: INTERACTIONS[name] for name in ("user", "item")}
    allowed = pairs.select(pl.col(name).cast(pl.String).cast(kind) for name, kind in kinds.items())
    best = pl.DataFrame(
        schema=kinds | {"text": pl.String(), "votes": pl.Int64(), "length": pl.Int64(), "row": pl.Int64()}
    )
    rows, waiting = 0, [best]
    for chunk in _chunks(path, RELEASES[year], bad_rows):
        frame = pl.DataFrame(
            {"user": [review.user for review in chunk], "item": [review.item for review in chunk]},
            schema_overrides=kinds,
        )
        chosen = frame.with_row_index("row").join(allowed, on=["user", "item"], how="semi", maintain_order="left")
        texts = [_text(chunk[row], letters) for row in chosen["row"]]
        waiting.append(
            chosen.with_columns(
                text=pl.Series(texts, dtype=pl.String),
                votes=pl.Series([_votes(chunk[row].votes) for row in chosen["row"]], dtype=pl.Int64),
                length=pl.Series(map(len, texts), dtype=pl.Int64),
                row=pl.col("row").cast(pl.Int64) + rows,
            ).select(best.columns)
        )
        rows += len(chunk)
        if sum(map(len, waiting[1:])) >= max(CHUNK, len(waiting[0])):  # so that sorting stays a small part
            waiting = [_best(pl.concat(waiting), per_item)]
    found = _best(pl.concat(waiting), per_item).with_columns(pl.col("item").cast(pl.String))
    return found.sort("item", maintain_order=True).select("item", "text")


def _chunks(path: Path, release: AmazonRelease, bad_rows: float) -> Iterator[list[Written]]:
    checks = RowChecks(str(path), bad_rows)
    names = {name: getattr(release, name) for name in Written.__struct_fields__}

    def mend(number: int, line: dict[str, Any]) -> Written | None:
        user, item, *others = (line.get(name) for name in names.values())
        if isinstance(user, str) and user and isinstance(item, str) and item:
            return Written(user, item, *others)
        checks.skip(number, "no user or item", str(line))
        return None

    chunk: list[Written] = []
    expected = f"{release.user} and {release.item} in every line"
    for reviews in read_json_lines(path, checks, expected, renamed(Written, names), mend):
        chunk += reviews
        if len(chunk) >= CHUNK:
            yield chunk
            chunk = []
    yield chunk


def _text(review: Written, letters: int) -> str:
    parts = (clean_text(part) for part in (review.summary, review.text) if isinstance(part, str))
    return cut_text(": ".join(filter(None, parts)), letters)


def _votes(value: Any) -> int:
    """Return how many found a review helpful: a number, text such as "1,234", or [helpful, all]; else 0."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, str):
        value = value.replace(",", "").strip()
        value = int(value) if value.isascii() and value.isdigit() and len(value) < 10 else 0
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**9 else 0


def _best(reviews: pl.DataFrame, per_item: int) -> pl.DataFrame:
    return (
        reviews.filter(pl.col("text") != "")
        .sort("votes", "length", "row", descending=[True, True, False])
        .unique(["user", "item"], keep="first", maintain_order=True)
        .filter(pl.int_range(pl.len()).over("item") < per_item)
    )
