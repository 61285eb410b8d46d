"""Texts that users wrote about items, from the reviews of an Amazon dump."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from data_processing.sources.amazon import Id, read_chunks
from data_processing.sources.clean import clean_text
from data_processing.sources.common import BAD_ROWS, INTERACTIONS, RowChecks

FIELDS = [("user", Id), ("item", Id), *((name, Any, None) for name in ("summary", "text", "votes"))]
KEYS = {name: INTERACTIONS[name] for name in ("user", "item")}
BEST = pl.Schema({**KEYS, "text": pl.String(), "votes": pl.Int64(), "row": pl.Int64()})
MOST_VOTES = 10**9  # a larger count is an error of the dump


def read_review_texts(
    year: int,
    reviews: Path,
    training: Mapping[str, Sequence[str]],
    *,
    per_item: int = 5,
    letters: int = 400,
    bad_rows: float = BAD_ROWS,
) -> pl.DataFrame:
    """Return the best reviews of every item, among those of interactions for training.

    The reviews that most users found helpful come first, then the longest (after the cut), then the first in the file.
    Of a user who reviewed an item several times, the best review counts. Memory holds only the best reviews.

    Args:
        year: Release of the dump: 2014, 2018 or 2023.
        reviews: Reviews as JSON lines.
        training: The items of every user whose reviews may be used, the result of ``DataFolder.read_training``.
        per_item: Most reviews per item.
        letters: Longest text, in letters; it ends with a whole word.
        bad_rows: Largest share of bad lines that does not stop the run.

    Returns:
        Columns ``item`` and ``text`` (``summary: text``, without HTML), items sorted as text, the best review first.
    """
    pairs = [(user, item) for user, items in training.items() for item in items]
    allowed = pl.DataFrame(pairs, schema=KEYS, orient="row")
    best, rows = pl.DataFrame(schema=BEST), 0
    for chunk in read_chunks(reviews, year, RowChecks(reviews, bad_rows), FIELDS):
        found = pl.DataFrame({name: [getattr(line, name) for line in chunk] for name in KEYS}, schema=KEYS)
        chosen = found.with_row_index("row").join(allowed, on=list(KEYS), how="semi", maintain_order="left")
        lines = [chunk[row] for row in chosen["row"]]
        chosen = chosen.with_columns(
            text=pl.Series([_text(line, letters) for line in lines], dtype=pl.String),
            votes=pl.Series([_votes(line.votes) for line in lines], dtype=pl.Int64),
            row=pl.col("row").cast(pl.Int64) + rows,
        )
        best = _best(pl.concat([best, chosen.select(*BEST)]), per_item)
        rows += len(chunk)
    return best.select(pl.col("item").cast(pl.String), "text").sort("item", maintain_order=True)


def _text(line: Any, letters: int) -> str:
    """Return summary and text of a review, cut at the end of a word."""
    parts = (clean_text(part) for part in (line.summary, line.text) if isinstance(part, str))
    text = ": ".join(filter(None, parts))
    return text if len(text) <= letters else text[: letters + 1].rpartition(" ")[0] or text[:letters]


def _votes(value: Any) -> int:
    """Return the count of helpful votes: a number, text such as "1,234", or [helpful, all]; else 0."""
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, str):
        value = value.replace(",", "").strip()
        value = int(value) if value.isascii() and value.isdigit() and len(value) < 10 else 0
    return value if type(value) is int and 0 <= value < MOST_VOTES else 0


def _best(reviews: pl.DataFrame, per_item: int) -> pl.DataFrame:
    """Return the best ``per_item`` reviews of every item, the best first, one of each user."""
    return (
        reviews.filter(pl.col("text") != "")
        .sort("votes", pl.col("text").str.len_chars(), "row", descending=[True, True, False])
        .unique(["user", "item"], keep="first", maintain_order=True)
        .filter(pl.int_range(pl.len()).over("item") < per_item)
    )
