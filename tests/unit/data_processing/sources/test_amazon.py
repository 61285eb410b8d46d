from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from data_processing.sources import amazon
from data_processing.sources.amazon import read_amazon
from data_processing.sources.common import SourceTables
from gream_verl.core.errors import InputError

DIRTY = '<span class="a-size-medium a-color-secondary"'


def review(user: str, item: str, time: Any = 100, **other: Any) -> dict[str, Any]:
    return {"reviewerID": user, "asin": item, "unixReviewTime": time, "overall": 5.0, "reviewText": "x", **other}


def metadata(item: str, title: str, **other: Any) -> dict[str, Any]:
    return {"asin": item, "title": title, "description": [], "brand": "", "category": [], **other}


def write(path: Path, rows: list[Any]) -> Path:
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(gzip.compress(b"\n".join(lines) + b"\n"))
    return path


def read(folder: Path, reviews: list[Any], items: list[Any]) -> SourceTables:
    return read_amazon(2018, write(folder / "R.json.gz", reviews), write(folder / "M.json.gz", items))


def test_dirty_metadata_is_cleaned(tmp_path: Path) -> None:
    items = [
        metadata("a", "Home &amp; <b>Garden</b>", category=["Magazines", "Home &amp; Garden", "<span>x</span>" * 40]),
        metadata("b", DIRTY, description=["<p>Vogue is the fashion authority. ", "Since 1892 it has set the tone."]),
        metadata("c", DIRTY),
        metadata("c", DIRTY, brand="by Acme", description=["Late"]),
        metadata("c", "Third &quot;line&quot;", brand="Other", category="Single"),
        metadata("d", DIRTY),
        metadata("never reviewed", "Title"),
    ]
    tables = read(tmp_path, [review("u", item) for item in ("a", "b", "c", "d", "no metadata")], items)
    text = "Vogue is the fashion authority. Since 1892 it has set the tone."
    assert tables.items.rows() == [
        ("a", "Home & Garden", "", "", ["Magazines", "Home & Garden"]),
        ("b", "Vogue is the fashion authority. Since 1892 it", text, "", []),
        ("c", 'Third "line"', "Late", "Acme", ["Single"]),
    ]
    assert tables.report == {
        "interaction rows": 5,
        "item rows": 7,
        "items without a title": 1,
        "repeated item rows": 2,
        "titles taken from the description": 1,
        "reviewed items without metadata": 1,
    }


def test_bad_lines_are_counted_and_listed(tmp_path: Path) -> None:
    bad = [
        b'{"reviewerID": "u", "asin": ',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        review("u", "i", "soon"),
        review("u", "i", 10**400),
        review("", "i"),
        {"reviewerID": 7, "asin": "i", "unixReviewTime": 5},
    ]
    good = [review(f"u{row}", "i", str(row)) for row in range(300)]
    tables = read(tmp_path, [*bad, b"", *good], [metadata("i", "T"), *([metadata("j", "O")] * 40), {"title": "none"}])
    assert tables.interactions.rows() == [(f"u{row}", "i", row) for row in range(300)]
    assert tables.report["interactions: not an object"] == 2
    assert tables.report["interactions: no usable reviewerID, asin, unixReviewTime"] == 5
    assert tables.report["items: no usable asin"] == 1
    assert [reject["row"] for reject in tables.rejects] == [*range(1, 8), 42]
    assert all(len(str(reject["text"])) <= 200 for reject in tables.rejects)


def test_too_many_bad_lines_stop_the_run_unless_they_are_allowed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"10000 of 10000 rows cannot be used"):
        read(tmp_path, [b"oops"] * 25_000, [metadata("i", "Title")])
    paths = (
        write(tmp_path / "R.json.gz", [review("u", "i"), b"oops"]),
        write(tmp_path / "M.json.gz", [metadata("i", "Title"), b"oops"]),
    )
    with pytest.raises(InputError, match=r"R\.json\.gz: 1 of 2 .* row 2 .* larger share of bad rows than 0\.05"):
        read_amazon(2018, *paths)
    tables = read_amazon(2018, *paths, bad_rows=0.5)
    assert [(Path(str(reject["file"])).name, reject["row"], reject["text"]) for reject in tables.rejects] == [
        ("R.json.gz", 2, "oops"), ("M.json.gz", 2, "oops"),
    ]  # fmt: skip


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    reviews, items = write(tmp_path / "R.json.gz", [review("u", "i")]), write(tmp_path / "M.json.gz", [])
    with pytest.raises(InputError, match=r"M\.json\.gz: holds no rows"):
        read_amazon(2018, reviews, items)
    with pytest.raises(InputError, match=r"none\.json\.gz: no such file; give the path"):
        read_amazon(2018, tmp_path / "none.json.gz", items)


def test_chunks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reviews = [review(f"u{row}", "i", row) for row in range(25)]
    whole = read(tmp_path, reviews, [metadata("i", "Title")])
    monkeypatch.setattr(amazon, "CHUNK", 10)
    assert read(tmp_path, reviews, [metadata("i", "Title")]).interactions.equals(whole.interactions)


def test_half_a_surrogate_pair_is_a_bad_row_and_a_whole_one_is_text(tmp_path: Path) -> None:
    items = [metadata("b", "Movie \U0001f3ac"), b'{"asin": "c", "title": "half \\ud83c"}']
    tables = read(tmp_path, [review("u", "b")], [*items, *(metadata(f"x{row}", "Fine") for row in range(60))])
    assert tables.items["title"].to_list() == ["Movie \U0001f3ac"]
    assert tables.report["items: not an object"] == 1


def test_the_metadata_of_2014_are_python_literals_and_are_never_evaluated(tmp_path: Path) -> None:
    lines = [
        b"{'asin': 'a', 'title': \"Women's Scent\", 'brand': 'Acme', 'categories': [['Beauty', 'Skin'], ['Beauty']]}",
        b"{'asin': 'b', 'title': 'Caf\\xe9', 'price': 1.5, 'related': {'also_bought': ['a']}, 'salesRank': None}",
        b"{'asin': 'c', 'title': __import__('os').system('touch evil')}",
        b"{'asin': 'd', 'title': 'half \\U0000d83c'}",
        *[b"{'asin': 'x', 'title': 'Never reviewed'}"] * 80,
    ]
    reviews = write(tmp_path / "R.json.gz", [review("u", item) for item in ("a", "b", "c", "d")])
    tables = read_amazon(2014, reviews, write(tmp_path / "M.json.gz", lines))
    assert tables.items.rows() == [
        ("a", "Women's Scent", "", "Acme", ["Beauty", "Skin"]),
        ("b", "Café", "", "", []),
    ]
    assert tables.report["items: not an object"] == 2
    assert not list(Path.cwd().glob("evil"))


def test_the_times_of_2023_keep_their_order_and_items_go_by_their_parent(tmp_path: Path) -> None:
    reviews = [
        {"user_id": "u", "asin": "b1", "parent_asin": "b", "timestamp": 1588687728923, "rating": 4.0, "text": "x"},
        {"user_id": "v", "asin": "b2", "parent_asin": "b", "timestamp": 1588687729001, "rating": 5.0, "text": "y"},
    ]
    items = [
        {
            "parent_asin": "b", "title": "Serum", "description": ["Soft.", "Light."], "store": "Acme",
            "main_category": "All Beauty", "categories": ["Beauty", "Face"],
            "features": ["With roses."], "details": {"Item Form": "Gel", "Size": {"of": "no text"}},
        }
    ]  # fmt: skip
    tables = read_amazon(2023, write(tmp_path / "R.jsonl.gz", reviews), write(tmp_path / "M.jsonl.gz", items))
    assert tables.interactions.rows() == [("u", "b", 1588687728923), ("v", "b", 1588687729001)]
    assert tables.items.rows() == [
        ("b", "Serum", "Soft. Light. With roses. Item Form: Gel.", "Acme", ["Beauty", "Face"])
    ]


def test_times_with_a_fraction_keep_their_order(tmp_path: Path) -> None:
    tables = read(tmp_path, [review("u", "a", 10.9), review("u", "b", "10.1")], [metadata("a", "A")])
    assert tables.interactions["timestamp"].to_list() == [2, 1]


@pytest.mark.parametrize(
    ("year", "text"),
    [
        (2014, "u,a,5.0,100\nv,a,,200\n"),
        (2018, "a,u,5.0,100\na,v,,200\n"),
        (2023, "user_id,parent_asin,rating,timestamp\nu,a,5.0,100\nv,a,,200\n"),
    ],
)
def test_files_of_ratings_have_the_columns_of_their_release(tmp_path: Path, year: int, text: str) -> None:
    items = write(tmp_path / "M.json.gz", [{"asin": "a", "parent_asin": "a", "title": "Title"}])
    (tmp_path / "plain.csv").write_text(text)
    (tmp_path / "packed.csv.gz").write_bytes(gzip.compress(text.encode()))
    for name in ("plain.csv", "packed.csv.gz"):
        assert read_amazon(year, tmp_path / name, items).interactions.rows() == [("u", "a", 100), ("v", "a", 200)]


@pytest.mark.parametrize(
    ("year", "text", "message"),
    [
        (2014, "u,a,5.0,soon\n", r"r\.csv: 1 of 1 rows cannot be used, the first is row 1 \(no user"),
        (2023, "u,a,5.0,soon\n", r"r\.csv: no column 'user_id' for the user \(there are u, a, 5\.0, soon\)"),
        (2014, "u,a,5.0\n", r"r\.csv: has 3 columns; expected user, item"),
    ],
)
def test_bad_files_of_ratings_are_named(tmp_path: Path, year: int, text: str, message: str) -> None:
    (tmp_path / "r.csv").write_text(text)
    with pytest.raises(InputError, match=message):
        read_amazon(year, tmp_path / "r.csv", write(tmp_path / "M.json.gz", [metadata("a", "Title")]))


def test_files_of_another_release_are_named(tmp_path: Path) -> None:
    old, items = [review("u", "a")], [metadata("a", "Title")]
    new = [{"user_id": "u", "parent_asin": "a", "asin": "b", "timestamp": 5}]
    for year, reviews, release in ((2023, old, "2014 or 2018"), (2018, new, "2023"), (2014, new, "2023")):
        with pytest.raises(InputError, match=rf"cannot be used.*\. It is of Amazon {release}$"):
            read_amazon(year, write(tmp_path / "R.json.gz", reviews), write(tmp_path / "M.json.gz", items))
    with pytest.raises(InputError) as error:
        read_amazon(2018, write(tmp_path / "R.json.gz", [{"asin": "a"}]), write(tmp_path / "M.json.gz", items))
    assert "It is of Amazon" not in str(error.value)
    ratings = {2014: "A1C6M8LCIX4M6M,0001713353,5.0,1123804800\n", 2018: "B00006L9LC,A1C6M8LCIX4M6M,5.0,1123804800\n"}
    for year, other in ((2014, 2018), (2018, 2014)):
        (tmp_path / "ratings.csv").write_text(ratings[other])
        with pytest.raises(InputError, match=f"in the order of Amazon {other}; give --source amazon{other}"):
            read_amazon(year, tmp_path / "ratings.csv", tmp_path / "M.json.gz")


def test_low_ratings_are_left_out_of_each_release(tmp_path: Path) -> None:
    items = write(tmp_path / "M.json.gz", [{"asin": "a", "parent_asin": "a", "title": "Title"}])
    old = [review("u", "a", overall=2.0), review("v", "a", overall=4.0), review("w", "a", overall=None)]
    new = [
        {"user_id": user, "parent_asin": "a", "timestamp": 5, "rating": stars} for user, stars in (("u", 1), ("v", 5))
    ]
    for year, rows in ((2014, old), (2018, old), (2023, new)):
        tables = read_amazon(year, write(tmp_path / "R.json.gz", rows), items, least_rating=4)
        assert tables.interactions["user"].to_list() == ["v"]
        assert tables.report["interactions with a low rating or none"] == len(rows) - 1
    (tmp_path / "ratings.csv").write_text("a,u,3.0,100\na,v,4.5,200\n")
    assert read_amazon(2018, tmp_path / "ratings.csv", items, least_rating=4).interactions.rows() == [("v", "a", 200)]
