from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_processing.interactions import prepare
from data_processing.sources import amazon
from data_processing.sources.amazon import read_amazon
from data_processing.sources.clean import clean_text, clean_title
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError

SHARED = Path(os.environ.get("GREAM_SHARED_DATA", Path(__file__).parents[5] / "shared" / "data"))
MAGAZINE = SHARED / "magazine2018_raw"
DIRTY = '<span class="a-size-medium a-color-secondary"'


def review(user: str, item: str, time: Any = 100, **other: Any) -> dict[str, Any]:
    return {"reviewerID": user, "asin": item, "unixReviewTime": time, "overall": 5.0, "reviewText": "x", **other}


def metadata(item: str, title: str, **other: Any) -> dict[str, Any]:
    return {"asin": item, "title": title, "description": [], "brand": "", "category": [], **other}


def write(path: Path, rows: list[Any]) -> Path:
    lines = (row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)
    path.write_bytes(gzip.compress(b"\n".join(lines) + b"\n"))
    return path


def read(folder: Path, reviews: list[Any], items: list[Any]) -> amazon.SourceTables:
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
    reviews = [review("u", item) for item in ("a", "b", "c", "d", "no metadata")]
    tables = read(tmp_path, reviews, items)
    assert tables.items.rows() == [
        ("a", "Home & Garden", "", "", ["Magazines", "Home & Garden"]),
        (
            "b",
            "Vogue is the fashion authority. Since 1892 it",
            "Vogue is the fashion authority. Since 1892 it has set the tone.",
            "",
            [],
        ),
        ("c", 'Third "line"', "Late", "Acme", ["Single"]),
    ]
    assert tables.report == {
        "review lines": 5,
        "metadata lines": 7,
        "items with several metadata lines": 1,
        "reviewed items without metadata": 1,
        "titles taken from the description": 1,
        "items without a title": 1,
    }


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        (DIRTY, ""),
        ('" Magazines" />', ""),
        ("I <3 Cats & Dogs", "I <3 Cats & Dogs"),
        ("AT&amp;amp;T", "AT&T"),
        ("Caf&eacute;\n  au   lait", "Café au lait"),
        ("<a href='x'>Link</a> text</span>", "Link text"),
        ("var aPageStart = (new Date()).getTime(); var ue", ""),
        ("...", ""),
        ("日本語", "日本語"),
        ("if a<b then", "if a<b then"),
        ("Love <Live! The best", "Love <Live! The best"),
        ('27" > 24" monitor', '27" > 24" monitor'),
        ('Fine <span class="a-size', "Fine"),
        ("Fine <IMG", "Fine"),
        ("Fine <custom data='x", "Fine"),
        ("Fine</b", "Fine"),
        ("Fine <!-- more", "Fine"),
        ('size">Fine', "Fine"),
    ],
)
def test_titles_lose_html_and_nothing_else(text: str, clean: str) -> None:
    assert clean_title(text) == clean


@given(st.text(alphabet=st.one_of(st.sampled_from(" \t\n\xa0\u2003\x1f\u200b"), st.characters()), max_size=30))
def test_blanks_are_collapsed_as_python_splits(text: str) -> None:
    text = text.replace("<", "").replace(">", "").replace("&", "")
    assert clean_text(text) == " ".join(text.split())


@given(st.text(max_size=60))
def test_cleaning_any_text_ends_and_leaves_no_tags(text: str) -> None:
    cleaned = clean_text(text)
    assert cleaned == " ".join(cleaned.split())
    assert "<span" not in clean_text(f"<span {text}")


def test_single_bad_lines_are_counted_and_sampled(tmp_path: Path) -> None:
    bad = [
        b'{"reviewerID": "u", "asin": ',
        b"\xff\xfe\x00",
        b"[1, 2]",
        b"[" * 100_000,
        review("u", "i", "soon"),
        review("u", "i", None),
        review("u", "i", 1e300),
        review("u", "i", True),
        review("u", "i", 10**400),
        review("", "i"),
        {"asin": "i", "unixReviewTime": 5},
        {"reviewerID": 7, "asin": "i", "unixReviewTime": 5},
    ]
    good = [review(f"u{row}", "i", str(row), overall="high") for row in range(300)]
    items = [metadata("i", "Title"), *([metadata("j", "Other")] * 40), {"title": "no asin"}]
    tables = read(tmp_path, [*bad, b"", *good], items)
    assert tables.interactions.rows()[:2] == [("u0", "i", 0, None), ("u1", "i", 1, None)]
    assert len(tables.interactions) == 300
    assert tables.report["reviews: not an object"] == 4
    assert tables.report["reviews: no user, item or time"] == 8
    assert tables.report["metadata: no asin"] == 1
    assert [reject["row"] for reject in tables.rejects] == [*range(1, 13), 42]
    assert all(len(str(reject["text"])) <= 200 for reject in tables.rejects)


def test_many_bad_lines_stop_the_run_early(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"R\.json\.gz: 1 of 1 rows .* row 1 \(not an object: 'oops'\)"):
        read(tmp_path, [b"oops"], [metadata("i", "Title")])
    with pytest.raises(InputError, match=r"10000 of 10000 rows cannot be used"):
        read(tmp_path, [b"oops"] * 25_000, [metadata("i", "Title")])
    with pytest.raises(InputError, match=r"M\.json\.gz: 2 of 2 rows cannot be used"):
        read(tmp_path, [review("u", "i")], [{"title": "x"}, {"title": "y"}])


def test_a_larger_share_of_bad_lines_may_be_allowed(tmp_path: Path) -> None:
    paths = (
        write(tmp_path / "R.json.gz", [review("u", "i"), b"oops"]),
        write(tmp_path / "M.json.gz", [metadata("i", "Title"), b"oops"]),
    )
    with pytest.raises(InputError, match=r"allow a larger share of bad rows than 0\.05"):
        read_amazon(2018, *paths)
    tables = read_amazon(2018, *paths, bad_rows=0.5)
    assert [(Path(str(reject["file"])).name, reject["row"], reject["text"]) for reject in tables.rejects] == [
        ("R.json.gz", 2, "oops"), ("M.json.gz", 2, "oops"),
    ]  # fmt: skip


@pytest.mark.parametrize("which", ["R.json.gz", "M.json.gz"])
def test_a_truncated_gzip_is_named_with_a_remedy(tmp_path: Path, which: str) -> None:
    paths = [
        write(tmp_path / "R.json.gz", [review(f"u{row}", "i", row) for row in range(2000)]),
        write(tmp_path / "M.json.gz", [metadata("i", f"Title {row}") for row in range(2000)]),
    ]
    cut = tmp_path / which
    cut.write_bytes(cut.read_bytes()[:-200])
    with pytest.raises(InputError, match=rf"{which}: the gzip file is cut short or damaged .*download it again"):
        read_amazon(2018, *paths)
    cut.write_bytes(cut.read_bytes()[:60] + b"garbage" * 20)
    with pytest.raises(InputError, match=rf"{which}: the gzip file is cut short or damaged"):
        read_amazon(2018, *paths)


def test_missing_and_empty_files_are_named(tmp_path: Path) -> None:
    reviews, items = write(tmp_path / "R.json.gz", [review("u", "i")]), write(tmp_path / "M.json.gz", [])
    with pytest.raises(InputError, match=r"M\.json\.gz: holds no rows"):
        read_amazon(2018, reviews, items)
    with pytest.raises(InputError, match=r"none\.json\.gz: no such file; give the path"):
        read_amazon(2018, tmp_path / "none.json.gz", items)


def test_plain_json_lines_are_read_too(tmp_path: Path) -> None:
    reviews, items = tmp_path / "r.json", tmp_path / "m.json"
    reviews.write_text(json.dumps(review("u", "i")) + "\n")
    items.write_text(json.dumps(metadata("i", "Title")))
    assert read_amazon(2018, reviews, items).items["title"].to_list() == ["Title"]


def test_chunks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reviews = [review(f"u{row}", "i", row) for row in range(25)]
    whole = read(tmp_path, reviews, [metadata("i", "Title")])
    monkeypatch.setattr(amazon, "CHUNK", 10)
    assert read(tmp_path, reviews, [metadata("i", "Title")]).interactions.equals(whole.interactions)


@pytest.mark.skipif(not MAGAZINE.is_dir(), reason="the raw Magazine sample is not on this machine")
def test_a_real_dirty_dump_becomes_a_data_set(tmp_path: Path) -> None:
    tables = read_amazon(
        2018, MAGAZINE / "Magazine_Subscriptions_5.json.gz", MAGAZINE / "meta_Magazine_Subscriptions.json.gz"
    )
    assert (tables.report["review lines"], tables.report["metadata lines"]) == (2375, 3385)
    assert tables.report["reviewed items without metadata"] == 6
    report = prepare(tables, DataFolder(tmp_path, "magazine"))
    statistics = report["statistics"]
    assert (statistics["users"], statistics["items"], statistics["interactions"]) == (257, 120, 1767)
    titles = [item.title for item in DataFolder(tmp_path, "magazine").read_items().values()]
    assert not any("<" in title or "&amp;" in title for title in titles)


def test_half_a_surrogate_pair_is_one_bad_row_and_a_whole_one_is_text(tmp_path: Path) -> None:
    items = [metadata("a", "Fine"), metadata("b", "Movie \U0001f3ac"), b'{"asin": "c", "title": "half \\ud83c"}']
    reviews = [review("u", item) for item in ("a", "b")] * 30
    tables = read(tmp_path, reviews, [*items, *(metadata(f"x{number}", "Fine") for number in range(60))])
    assert dict(zip(tables.items["item"], tables.items["title"], strict=True))["b"] == "Movie \U0001f3ac"
    assert "c" not in tables.items["item"]


def test_the_metadata_of_2014_are_python_literals_and_are_never_evaluated(tmp_path: Path) -> None:
    lines = [
        b"{'asin': 'a', 'title': \"Women's Scent\", 'brand': 'Acme', 'categories': [['Beauty', 'Skin'], ['Beauty']]}",
        b"{'asin': 'b', 'title': 'Caf\\xe9', 'price': 1.5, 'related': {'also_bought': ['a']}, 'salesRank': None}",
        b"{'asin': 'c', 'title': __import__('os').system('touch evil')}",
        b"{'asin': 'd', 'title': 'half \\ud83c'}",
        b"{'asin': 'd', 'title': 'half \\U0000d83c'}",
        b'{"asin": "d", "title": "half \xed\xa0\xbd"}',
        *[b"{'asin': 'x', 'title': 'Never reviewed'}"] * 80,
    ]
    reviews = write(tmp_path / "R.json.gz", [review("u", item) for item in ("a", "b", "c", "d")])
    tables = read_amazon(2014, reviews, write(tmp_path / "M.json.gz", lines))
    assert tables.items.rows() == [
        ("a", "Women's Scent", "", "Acme", ["Beauty", "Skin"]),
        ("b", "Café", "", "", []),
    ]
    assert tables.report["metadata: not an object"] == 4
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
        }
    ]  # fmt: skip
    tables = read_amazon(2023, write(tmp_path / "R.jsonl.gz", reviews), write(tmp_path / "M.jsonl.gz", items))
    assert tables.interactions.rows() == [("u", "b", 1588687728923, 4.0), ("v", "b", 1588687729001, 5.0)]
    assert tables.items.rows() == [("b", "Serum", "Soft. Light.", "Acme", ["Beauty", "Face"])]


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
        tables = read_amazon(year, tmp_path / name, items)
        assert tables.interactions.rows() == [("u", "a", 100, 5.0), ("v", "a", 200, None)]


def test_times_with_a_fraction_keep_their_order(tmp_path: Path) -> None:
    tables = read(tmp_path, [review("u", "a", 10.9), review("u", "b", "10.1")], [metadata("a", "A")])
    assert tables.interactions["timestamp"].to_list() == [2, 1]


def test_bad_files_of_ratings_are_named(tmp_path: Path) -> None:
    items = write(tmp_path / "M.json.gz", [metadata("a", "Title")])
    (tmp_path / "r.csv").write_text("u,a,5.0,soon\n")
    with pytest.raises(InputError, match=r"r\.csv: 1 of 1 rows cannot be used, the first is row 1 \(no user"):
        read_amazon(2014, tmp_path / "r.csv", items)
    with pytest.raises(InputError, match=r"r\.csv: no column 'user_id' for the user \(there are u, a, 5\.0, soon\)"):
        read_amazon(2023, tmp_path / "r.csv", items)
    with pytest.raises(InputError, match=r"three\.csv: has 3 columns; expected user, item"):
        (tmp_path / "three.csv").write_text("u,a,5.0\n")
        read_amazon(2014, tmp_path / "three.csv", items)
    with pytest.raises(InputError, match=r"none\.csv: no such file"):
        read_amazon(2014, tmp_path / "none.csv", items)
