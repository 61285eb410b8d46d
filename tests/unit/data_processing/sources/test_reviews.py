from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from data_processing.interactions import deduplicate
from data_processing.sources import reviews as module
from data_processing.sources.amazon import read_amazon
from data_processing.sources.clean import cut_text
from data_processing.sources.reviews import read_review_texts
from gream_verl.core.errors import InputError

SHARED = Path(os.environ.get("GREAM_SHARED_DATA", Path(__file__).parents[5] / "shared" / "data"))
MAGAZINE = SHARED / "magazine2018_raw"
FORMS = {
    2014: ("reviewerID", "asin", "summary", "reviewText", "helpful"),
    2018: ("reviewerID", "asin", "summary", "reviewText", "vote"),
    2023: ("user_id", "parent_asin", "title", "text", "helpful_vote"),
}


def write(path: Path, rows: list[Any], year: int = 2018) -> Path:
    lines = (
        row if isinstance(row, bytes) else json.dumps(dict(zip(FORMS[year], row, strict=False))).encode()
        for row in rows
    )
    path.write_bytes(gzip.compress(b"\n".join(lines) + b"\n"))
    return path


def pairs(*rows: str) -> pl.DataFrame:
    return pl.DataFrame([tuple(row) for row in rows], schema=["user", "item"], orient="row")


@pytest.mark.parametrize(("year", "votes"), [(2014, ([3, 4], [12, 12])), (2018, ("3", "1,200")), (2023, (3, 12))])
def test_helpful_reviews_come_first_then_long_ones_then_those_before(tmp_path: Path, year: int, votes: Any) -> None:
    rows = [
        ("p", "a", "Short", "x"),
        ("q", "a", "Longer &amp; longer", "<b>so</b> it is"),
        ("r", "a", "Helpful", "x", votes[0]),
        ("s", "a", "More helpful", "x", votes[1]),
        ("t", "a", "Short", "y"),
        ("u", "a", "Not of training", "x" * 300, votes[1]),
        ("p", "b", "Only", None),
    ]
    path = write(tmp_path / "R.json.gz", rows, year)
    texts = read_review_texts(year, path, pairs("pb", "pa", "qa", "ra", "sa", "ta", "zz"), per_item=4)
    assert texts.rows() == [
        ("a", "More helpful: x"), ("a", "Helpful: x"), ("a", "Longer & longer: so it is"), ("a", "Short: x"),
        ("b", "Only"),
    ]  # fmt: skip


def test_dirty_lines_and_odd_fields_are_passed_over(tmp_path: Path) -> None:
    odd = [("p", "a", ["x"], {"y": 1}, votes) for votes in (True, "many", [], -1, 10**30, "9" * 30, None, {"a": 1})]
    rows = [
        *odd, b"oops", b"", {"reviewerID": "p"}, ("", "a"), (7, "a"), ("p", "a", "<br />", "&nbsp;"),
        b"{'reviewerID': 'p', 'asin': 'a', 'summary': 'A literal'}", ("p", "a", "Fine", "text " * 200),
    ]  # fmt: skip
    rows = [json.dumps(row).encode() if isinstance(row, dict) else row for row in rows]
    texts = read_review_texts(2018, write(tmp_path / "R.json.gz", rows), pairs("pa"), letters=20, bad_rows=0.5)
    assert texts.rows() == [("a", "Fine: text text text")]
    with pytest.raises(InputError, match=r"R\.json\.gz: 4 of 15 rows cannot be used"):
        read_review_texts(2018, tmp_path / "R.json.gz", pairs("pa"))


def test_nothing_found_is_an_empty_table_and_ratings_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "R.json.gz", [("p", "a", "x", "y")])
    assert read_review_texts(2018, path, pairs("zz")).schema == {"item": pl.String, "text": pl.String}
    with pytest.raises(InputError, match=r"ratings\.csv: a file of ratings holds no texts"):
        read_review_texts(2018, tmp_path / "ratings.csv", pairs("pa"))


def test_a_text_is_cut_at_the_end_of_a_word() -> None:
    assert [cut_text("one two three", letters) for letters in (2, 3, 6, 7, 12, 13)] == [
        "on", "one", "one", "one two", "one two", "one two three",
    ]  # fmt: skip


def test_chunks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        (user, item, f"{user}{number}", "x" * (number % 7)) for number in range(40) for user in "pqr" for item in "ab"
    ]
    path = write(tmp_path / "R.json.gz", rows)
    allowed = pairs(*(user + item for user in "pqr" for item in "ab"))
    whole = read_review_texts(2018, path, allowed, per_item=2)
    monkeypatch.setattr("data_processing.sources.json_lines.BLOCK", 100)
    monkeypatch.setattr(module, "CHUNK", 7)
    assert read_review_texts(2018, path, allowed, per_item=2).equals(whole)
    assert whole["item"].to_list() == ["a", "a", "b", "b"]


@pytest.mark.skipif(not MAGAZINE.is_dir(), reason="the raw Magazine sample is not on this machine")
def test_real_reviews_give_texts_for_the_items_that_are_kept() -> None:
    path = MAGAZINE / "Magazine_Subscriptions_5.json.gz"
    tables = read_amazon(2018, path, MAGAZINE / "meta_Magazine_Subscriptions.json.gz")
    kept = deduplicate(tables.interactions).select("user", "item")
    texts = read_review_texts(2018, path, kept, per_item=3, letters=200)
    assert 100 < texts["item"].n_unique() <= kept["item"].n_unique()
    assert texts.group_by("item").len()["len"].max() == 3
    assert texts["text"].str.len_chars().max() <= 200
    assert not texts["text"].str.contains("<br|&quot;|&amp;").any()
    assert texts.equals(read_review_texts(2018, path, kept, per_item=3, letters=200))
