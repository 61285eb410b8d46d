from __future__ import annotations

from pathlib import Path

import pytest

from data_processing.sources.recbole import read_recbole
from gream_verl.core.errors import InputError

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ITEM = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"


def write(folder: Path, inter: str, item: str) -> tuple[Path, Path]:
    paths = folder / "d.inter", folder / "d.item"
    for path, text in zip(paths, (inter, item), strict=True):
        path.write_text(text, encoding="utf-8")
    return paths


def test_movielens_style_files(tmp_path: Path) -> None:
    paths = write(
        tmp_path,
        INTER + "196\t242\t3\t881250949\n186\t302\t3.5\t891717742.0\n",
        ITEM + "242\tKolya\t1996\tComedy\n302\tNénette et Boni\t1996\tSci-Fi Children's\n267\tno\tunkonwn\tunknown\n",
    )
    tables = read_recbole(*paths)
    assert tables.interactions.rows() == [("196", "242", 881250949), ("186", "302", 891717742)]
    assert tables.items.rows() == [
        ("242", "Kolya", "Released in 1996.", "", ["Comedy"]),
        ("302", "Nénette et Boni", "Released in 1996.", "", ["Sci-Fi", "Children's"]),
        ("267", "no", "", "", []),
    ]
    assert tables.report == {
        "interaction rows": 2, "item rows": 3, "items without a title": 0, "items with a title only": 1
    }  # fmt: skip


def test_other_fields_dirty_texts_and_repeated_items(tmp_path: Path) -> None:
    header = "item_id:token\tname:token\tdescription:token\trelease_year:token\tbrand:token\tgenre:token\n"
    rows = [
        "i\t...\tA <b>film</b>\t1990\t\t",
        "i\tHeat &amp; dust\tNo\t1990\tFox &amp; co\tR&amp;B <i>Drama</i>",
        "j\t...\t\t\t\t",
        'k\tA "quoted title\t\t1990\tAcme\tone, two',
    ]
    tables = read_recbole(*write(tmp_path, INTER + "u\ti\t1\t1\n", header + "\n".join(rows) + "\n"))
    assert tables.items.rows() == [
        ("i", "Heat & dust", "A film", "Fox & co", ["R&B Drama"]),
        ("k", 'A "quoted title', "Released in 1990.", "Acme", ["one, two"]),
    ]
    assert tables.report == {
        "interaction rows": 1, "item rows": 4, "items without a title": 1, "repeated item rows": 1
    }  # fmt: skip


def test_bad_rows_are_counted_and_listed(tmp_path: Path) -> None:
    good = "".join(f"u{row}\ti\t1\t{row}\n" for row in range(100))
    bad = "u\ti\t1\tyesterday\n\ti\t1\t5\nu\t\t1\t5\nu\ti\t1\tnan\nu\n"
    items = "".join(f"i{row}\tTitle {row}\t1990\tDrama\n" for row in range(100))
    paths = write(tmp_path, INTER + good + bad, ITEM + items + "i5\tAgain\t1990\tDrama\nempty\t\t1990\tDrama\n")
    tables = read_recbole(*paths)
    assert len(tables.interactions) == 100
    assert tables.report["interactions: no user, item or timestamp"] == 5
    assert [reject["row"] for reject in tables.rejects] == [102, 103, 104, 105, 106]
    assert tables.items.filter(item="i5")["title"].to_list() == ["Title 5"]
    with pytest.raises(InputError, match=r"d\.inter: 5 of 105 rows .* \(no user, item or timestamp: 'u.*yesterday"):
        read_recbole(*paths, bad_rows=0.04)


@pytest.mark.parametrize(
    ("inter", "item", "message"),
    [
        (INTER + "u\ti\t1\tx\n", ITEM + "i\tT\t1\tD\n", "1 of 1 rows cannot be used, the first is row 2"),
        (INTER, ITEM + "i\tT\t1\tD\n", "holds no rows"),
        (INTER + "u\ti\t1\t1\n", ITEM, "holds no rows"),
        ("user_id\titem_id\nu\ti\n", ITEM, "header field 'user_id': expected name:type"),
        ("", ITEM, "is empty"),
        (INTER + "u\ti\t1\t1\n", ITEM + "i\tT\t1\tD\tmore\n", r"row 2 \(too many fields: .*more"),
        (INTER + "u\ti\t1\t1\n", "title:token\ttitle:token_seq\n", "header field 'title' is there twice"),
        (INTER.replace("timestamp", "time"), ITEM, "no column 'timestamp'"),
        (INTER + "u\ti\t1\t1\n", ITEM.replace("movie_title", "words"), "no column 'title' for the title"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path: Path, inter: str, item: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        read_recbole(*write(tmp_path, inter, item))
    assert str(tmp_path) in str(caught.value)
