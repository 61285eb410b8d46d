from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from data_processing.sources import amazon
from data_processing.sources.reviews import read_review_texts
from gream_verl.core.errors import InputError

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
    training = {"p": ["b", "a"], "q": ["a"], "r": ["a"], "s": ["a"], "t": ["a"], "z": ["z"]}
    texts = read_review_texts(year, write(tmp_path / "R.json.gz", rows, year), training, per_item=4)
    assert texts.rows() == [
        ("a", "More helpful: x"), ("a", "Helpful: x"), ("a", "Longer & longer: so it is"), ("a", "Short: x"),
        ("b", "Only"),
    ]  # fmt: skip


def test_dirty_lines_and_odd_fields_are_passed_over(tmp_path: Path) -> None:
    odd = [("p", "a", ["x"], {"y": 1}, votes) for votes in (True, "many", [], -1, 10**30, "9" * 30, None, {"a": 1})]
    rows = [
        *odd, b"oops", b"", b'{"reviewerID": "p"}', ("", "a"), (7, "a"), ("p", "a", "<br />", "&nbsp;"),
        b"{'reviewerID': 'p', 'asin': 'a', 'summary': 'A literal'}", ("p", "a", "Fine", "text " * 200),
    ]  # fmt: skip
    path = write(tmp_path / "R.json.gz", rows)
    texts = read_review_texts(2018, path, {"p": ["a"]}, letters=20, bad_rows=0.5)
    assert texts.rows() == [("a", "Fine: text text text")]
    with pytest.raises(InputError, match=r"R\.json\.gz: 4 of 15 rows cannot be used"):
        read_review_texts(2018, path, {"p": ["a"]})


def test_nothing_found_is_an_empty_table(tmp_path: Path) -> None:
    path = write(tmp_path / "R.json.gz", [("p", "a", "x", "y")])
    assert read_review_texts(2018, path, {"z": ["z"]}).rows() == []


def test_chunks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        (user, item, f"{user}{number}", "x" * (number % 7)) for number in range(40) for user in "pqr" for item in "ab"
    ]
    path, training = write(tmp_path / "R.json.gz", rows), {user: ["a", "b"] for user in "pqr"}
    whole = read_review_texts(2018, path, training, per_item=2)
    monkeypatch.setattr(amazon, "CHUNK", 7)
    assert read_review_texts(2018, path, training, per_item=2).equals(whole)
    assert whole["item"].to_list() == ["a", "a", "b", "b"]
