from __future__ import annotations

import gzip
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path

import polars as pl
import pytest

from data_processing.sources.columns import read_table
from data_processing.sources.common import SourceTables
from gream_verl.core.errors import InputError

ITEMS = [("1", "Alien", "", "", ["Horror", "Sci-Fi"]), ("2", "Heat", "Crime", "Fox", [])]


def read(folder: Path, inter: str, items: str = "item,title\n1,T\n", **options: object) -> SourceTables:
    """Read two CSV files with these contents."""
    (folder / "i.csv").write_text(inter)
    (folder / "m.csv").write_text(items)
    return read_table(folder / "i.csv", folder / "m.csv", **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("ending", ["parquet", "csv", "tsv"])
def test_every_format_gives_the_same_tables(tmp_path: Path, ending: str) -> None:
    inter = pl.DataFrame({"user": ["u", "u"], "item": [1, 2], "timestamp": [100, 200], "rating": [4.0, None]})
    items = pl.DataFrame(
        {
            "item": [1, 2], "title": [" Alien", "Heat"], "description": [None, "Crime"], "brand": [None, "Fox"],
            "categories": ["Horror|Sci-Fi| ", None],
        }
    )  # fmt: skip
    for name, table in (("inter", inter), ("item", items)):
        path = tmp_path / f"{name}.{ending}"
        table.write_parquet(path) if ending == "parquet" else table.write_csv(
            path, separator="\t" if ending == "tsv" else ","
        )
    tables = read_table(tmp_path / f"inter.{ending}", tmp_path / f"item.{ending}")
    assert tables.interactions.rows() == [("u", "1", 100), ("u", "2", 200)]
    assert tables.items.rows() == ITEMS
    assert tables.report == {"interaction rows": 2, "item rows": 2, "items without a title": 0}


def test_columns_may_have_other_names_dates_and_lists(tmp_path: Path) -> None:
    when = [datetime.fromtimestamp(seconds, UTC).replace(tzinfo=None) for seconds in (100, 200)]
    inter = pl.DataFrame({"customer": ["u", "u"], "sku": ["1", "2"], "bought": when})
    items = pl.DataFrame({"sku": ["1", "2"], "name": ["Alien", "Heat"], "tags": [["Horror", "Sci-Fi"], []]})
    inter.write_parquet(tmp_path / "i.parquet")
    inter.with_columns(pl.col("bought").dt.to_string("%Y-%m-%d %H:%M:%S")).write_csv(tmp_path / "i.csv")
    items.write_parquet(tmp_path / "m.parquet")
    columns = {"user": "customer", "item": "sku", "timestamp": "bought", "title": "name", "categories": "tags"}
    for name in ("i.parquet", "i.csv"):
        tables = read_table(tmp_path / name, tmp_path / "m.parquet", columns)
        assert tables.interactions.rows() == [("u", "1", 100_000_000), ("u", "2", 200_000_000)]
        assert tables.items["categories"].to_list() == [["Horror", "Sci-Fi"], []]


def test_bad_rows_are_counted_and_listed(tmp_path: Path) -> None:
    inter = "user,item,timestamp\nSmith, John,1,10\n,1,4\nu,1,11\nv,1,12,\nu,1,soon\n"
    tables = read(tmp_path, inter, "item,title,brand\n1,Alien, the film,Fox\n1,Alien,Fox\n1,A\n2\n", bad_rows=0.6)
    assert tables.interactions.rows() == [("u", "1", 11), ("v", "1", 12)]
    assert tables.items.rows() == [("1", "Alien", "", "Fox", [])]
    assert [(reject["row"], reject["reason"], reject["text"]) for reject in tables.rejects] == [
        (2, "too many fields", "Smith\tJohn\t1\t10"),
        (3, "no user, item or timestamp", "None\t1\t4"),
        (6, "no user, item or timestamp", "u\t1\tsoon"),
        (2, "too many fields", "1\tAlien\t the film\tFox"),
    ]
    assert tables.report == {
        "interaction rows": 5, "item rows": 4, "items without a title": 1, "repeated item rows": 1,
        "interactions: no user, item or timestamp": 2, "interactions: too many fields": 1, "items: too many fields": 1,
    }  # fmt: skip


def test_the_share_of_bad_rows_that_stops_the_run_can_be_chosen(tmp_path: Path) -> None:
    inter, items = "user,item,timestamp\n" + "u,1,5\n" * 2 + "u,1,soon\n" * 2000, "item,title\n1,T\n,None\n"
    with pytest.raises(InputError, match=r"i\.csv: 2000 of 2002 .* row 4 .*soon'\); .* a larger share .* than 0\.9$"):
        read(tmp_path, inter, items, bad_rows=0.9)
    tables = read(tmp_path, inter, items, bad_rows=1.0)
    assert (len(tables.interactions), tables.report["interactions: no user, item or timestamp"]) == (2, 2000)
    assert (len(tables.rejects), tables.rejects[999]["row"]) == (1001, 1003)


def test_packed_tables_are_read_and_columns_without_use_may_be_odd(tmp_path: Path) -> None:
    text = 'user,note,item,timestamp\nu,"two\nlines, quoted",1,5\nv,,2,6\n'
    (tmp_path / "i.csv.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "m.tsv.gz").write_bytes(gzip.compress(b'item\ttitle\n1\tA "quoted\n2\tB\n'))
    tables = read_table(tmp_path / "i.csv.gz", tmp_path / "m.tsv.gz")
    assert tables.interactions.rows() == [("u", "1", 5), ("v", "2", 6)]
    assert tables.items["title"].to_list() == ['A "quoted', "B"]


def test_many_rows_keep_their_order_and_bad_ones_their_number(tmp_path: Path) -> None:
    count, bad = 200_000, {7, 123_456, 199_999}
    rows = (f"u{row % 9},{row},{'x' if row in bad else row % 7}\n" for row in range(count))
    tables = read(tmp_path, "user,item,timestamp\n" + "".join(rows))
    items = tables.interactions["item"].cast(pl.String).cast(pl.Int64).to_list()
    assert items == [row for row in range(count) if row not in bad]
    assert [reject["row"] for reject in tables.rejects] == [row + 2 for row in sorted(bad)]


@pytest.mark.parametrize(
    ("inter", "items", "columns", "message"),
    [
        ("user,item\nu,1\n", "item,title\n1,T\n", {}, r"i\.csv: no column 'timestamp' for the timestamp"),
        ("user,item,timestamp\nu,1,1\n", "item\n1\n", {}, r"m\.csv: no column 'title' for the title"),
        ("user,item,timestamp\nu,1,1\n", "item,title\n1,T\n", {"brand": "b"}, r"m\.csv: no column 'b' for the brand"),
        ("user,item,timestamp\nu,1,1\n", "item,title\n1,T\n", {"usr": "u"}, "column 'usr': unknown; known are user"),
        ("user,item,timestamp\nu,1,soon\n", "item,title\n1,T\n", {}, r"i\.csv: 1 of 1 rows cannot be used"),
        ("", "item,title\n1,T\n", {}, r"i\.csv: no column 'user'"),
        ("user,item,timestamp\nu,1,1\n", 'item,title\n1,"T\n2,U\n', {}, r"m\.csv: not a table in UTF-8"),
        ("user,item,timestamp\nu,1,1\n", 'item,title\n1,12" rule\n2,T\n', {}, r"m\.csv: not a table in UTF-8"),
    ],
)
def test_tables_that_cannot_be_used_are_named(
    tmp_path: Path, inter: str, items: str, columns: dict[str, str], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        read(tmp_path, inter, items, columns=columns)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    contents = {
        "utf16.csv": "user,item,timestamp\nu,1,1\n".encode("utf-16"),
        "latin1.csv": b"user,item,timestamp,title\n\xe9,1,1,T\n",
        "x.parquet": b"x",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name}: .*(UTF-8|Parquet)"):
            read_table(tmp_path / name, tmp_path / name)
    with pytest.raises(InputError, match=r"none\.parquet: no such file"):
        read_table(tmp_path / "none.parquet", tmp_path / "none.parquet")


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("user", [[1]], r"column 'user': expected text or whole numbers, got List"),
        ("item", [b"1"], r"column 'item': expected text or whole numbers, got Binary"),
        ("timestamp", [[1]], r"column 'timestamp': expected numbers or dates, got List"),
        ("title", [{"en": "x"}], r"column 'title': expected text for the title, got Struct"),
        ("title", [[b"x"]], r"column 'title': expected text for the title, got List\(Binary\)"),
    ],
)
def test_columns_of_an_odd_type_are_named(tmp_path: Path, column: str, values: list[object], message: str) -> None:
    table = {"user": ["u"], "item": ["1"], "timestamp": [1], "title": ["A"]} | {column: values}
    pl.DataFrame(table).write_parquet(tmp_path / "i.parquet")
    with pytest.raises(InputError, match=message):
        read_table(tmp_path / "i.parquet", tmp_path / "i.parquet")


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        (["10.9", "10.1", "12"], [2, 1, 3]),
        (["0.9", "0.1", "0.1"], [2, 1, 1]),
        (["12.0", "1e3", "11"], [12, 1000, 11]),
        (["1588687728923000002", "1588687728923000001", "7"], [1588687728923000002, 1588687728923000001, 7]),
        ([10.9, 10.1, 12.0], [2, 1, 3]),
        ([3.0, 1.0, 2.0], [3, 1, 2]),
        ([date(1970, 1, 2), date(1970, 1, 1), date(1970, 1, 1)], [24 * 3600 * 10**6, 0, 0]),
        ([1588687728923000002, 1588687728923000001, 0], [1588687728923000002, 1588687728923000001, 0]),
    ],
)
def test_times_keep_their_order(tmp_path: Path, times: list[object], expected: list[int]) -> None:
    pl.DataFrame({"user": ["u"] * 3, "item": ["1"] * 3, "timestamp": times, "title": "T"}).write_parquet(
        tmp_path / "i.parquet"
    )
    tables = read_table(tmp_path / "i.parquet", tmp_path / "i.parquet")
    assert tables.interactions["timestamp"].to_list() == expected


def test_dates_with_and_without_a_zone_are_put_in_order(tmp_path: Path) -> None:
    dates = [
        *("2020-01-05", "2020-01-05 00:00:01", "2020-01-05T00:00:02.5", "2020-01-05T00:00:03Z"),
        *("2020-01-05T02:00:04+02:00", "2020-01-05 00:00:05 UTC", "2020-01-05T00:00:06.000000+0000", "03/04/2021"),
    ]
    rows = "".join(f"u,{number},{date}\n" for number, date in enumerate([*dates, *dates[:7] * 9]))
    tables = read(tmp_path, "user,item,timestamp\n" + rows)
    midnight = datetime(2020, 1, 5, tzinfo=UTC).timestamp()
    seconds = [moment / 1e6 - midnight for moment in tables.interactions["timestamp"].to_list()[:7]]
    assert seconds == [0, 1, 2.5, 3, 4, 5, 6]
    assert tables.report["interactions: no user, item or timestamp"] == 1


@pytest.mark.parametrize("kind", [pl.Int32, pl.Float64, pl.String, pl.Categorical])
def test_ids_of_every_type_find_each_other(tmp_path: Path, kind: type[pl.DataType]) -> None:
    as_text = [" 1", "2 "] if kind is pl.String else ["1", "2"]
    ids = pl.Series("item", as_text if kind in (pl.String, pl.Categorical) else [1, 2]).cast(kind)
    pl.DataFrame({"user": [7, 7], "timestamp": [1, 2]}).with_columns(ids).write_parquet(tmp_path / "i.parquet")
    pl.DataFrame({"title": ["A", "B"], "item": [1, 2]}).write_parquet(tmp_path / "m.parquet")
    tables = read_table(tmp_path / "i.parquet", tmp_path / "m.parquet")
    assert tables.interactions.select("user", "item").rows() == [("7", "1"), ("7", "2")]
    assert tables.items["item"].to_list() == ["1", "2"]


def test_whole_numbers_as_pandas_writes_them_are_ids_others_are_not(tmp_path: Path) -> None:
    items = pl.DataFrame({"item": [1.0, 2.0, 2.5, None], "title": ["A", "B", "C", "D"]})
    items.write_parquet(tmp_path / "m.parquet")
    for rows, expected in (("7.0,1.0,1\n8.0,2.0,2\n", [("7", "1"), ("8", "2")]),
                           ("7.0,1.0,1\n8.1,A,2\n", [("7.0", "1.0"), ("8.1", "A")])):  # fmt: skip
        (tmp_path / "i.csv").write_text("user,item,timestamp\n" + rows)
        tables = read_table(tmp_path / "i.csv", tmp_path / "m.parquet", bad_rows=0.5)
        assert tables.interactions.select("user", "item").rows() == expected
        assert tables.items["item"].to_list() == ["1", "2"]


def test_texts_are_cleaned_and_a_later_row_fills_what_is_empty(tmp_path: Path) -> None:
    items = {
        "item": ["1", "1", "2", "3"],
        "title": ["...", "Heat &amp; dust", "...", "T"],
        "description": [["A <b>film</b>", "of"], ["No"], [], None],
        "categories": ["", "R&amp;B|Drama", "", "x|"],
        "brand": [None, 1.5, None, float("nan")],
    }
    pl.DataFrame(items).write_parquet(tmp_path / "m.parquet")
    (tmp_path / "i.csv").write_text("user,item,timestamp\nu,1,5\n")
    assert read_table(tmp_path / "i.csv", tmp_path / "m.parquet").items.rows() == [
        ("1", "Heat & dust", "A film of", "1.5", ["R&B", "Drama"]),
        ("3", "T", "", "", ["x"]),
    ]


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (["2014-01-02", "1388620800"], "1388620800 and 2014-01-02"),
        (["1388620800", "1388620800000"], "1388620800 and 1388620800000"),
        (["1388620800000.5", "1388620800"], "1388620800 and 1388620800000.5"),
    ],
)
def test_times_of_several_kinds_are_refused(tmp_path: Path, times: list[str], said: str) -> None:
    rows = "".join(f"u,{number},{time}\n" for number, time in enumerate(times))
    with pytest.raises(InputError, match=f"i.csv: its times are of several kinds, such as {said}; write all as one"):
        read(tmp_path, f"user,item,timestamp\n{rows}", "item,title\n0,T\n")


def test_tables_of_a_shop_with_other_names_semicolons_and_dates(tmp_path: Path) -> None:
    inter = "customer;product_id;bought\nu;7;02.01.2014\nu;8;01.02.2014 10:30\n"
    columns = {"user": "customer", "interactions.item": "product_id", "timestamp": "bought", "items.item": "id"}
    tables = read(tmp_path, inter, "id;title\n7;T, first\n8;U\n", columns=columns)
    assert tables.items["title"].to_list() == ["T, first", "U"]
    assert tables.interactions["item"].to_list() == ["7", "8"]
    first, second = tables.interactions["timestamp"]
    assert second - first == (30 * 24 + 10.5) * 3600 * 10**6


def test_a_folder_of_parts_with_decimals_is_one_table(tmp_path: Path) -> None:
    folder = tmp_path / "parts"
    folder.mkdir()
    for part in range(2):
        rows = {"user": ["u"], "item": [Decimal(part)], "timestamp": [Decimal(5 + part)]}
        pl.DataFrame(rows, schema_overrides={"item": pl.Decimal(10, 0)}).write_parquet(folder / f"{part}.parquet")
    (tmp_path / "m.csv").write_text("item,title\n0,T\n1,U\n")
    assert read_table(folder, tmp_path / "m.csv").interactions.rows() == [("u", "0", 5), ("u", "1", 6)]
    with pytest.raises(InputError, match=r"empty: a folder without \.parquet files"):
        (tmp_path / "empty").mkdir()
        read_table(tmp_path / "empty", tmp_path / "m.csv")


def test_a_table_of_interactions_with_items_in_the_authors_layout(tmp_path: Path) -> None:
    (tmp_path / "i.csv").write_text("user,sku,timestamp\nu,7,5\n")
    (tmp_path / "D.item.json").write_text('{"7": {"title": "T", "description": ["About"]}}')
    tables = read_table(tmp_path / "i.csv", tmp_path / "D.item.json", {"item": "sku"})
    assert tables.interactions.rows() == [("u", "7", 5)]
    assert tables.items.rows() == [("7", "T", "About", "", [])]


@pytest.mark.parametrize(("form", "half"), [("csv", "3.5"), ("csv", "3,5"), ("parquet", "3.5")])
def test_low_ratings_are_left_out_and_counted(tmp_path: Path, form: str, half: str) -> None:
    rows = {"user": list("uvwx"), "item": list("1111"), "timestamp": [1, 2, 3, 4], "stars": ["5", half, "4.0", None]}
    table, path = pl.DataFrame(rows), tmp_path / f"i.{form}"
    if form == "csv":
        table.write_csv(path, separator=";")
    else:
        table.with_columns(pl.col("stars").cast(pl.Float64)).write_parquet(path)
    (tmp_path / "m.csv").write_text("item,title\n1,Alien\n")
    for least, users in ((None, "uvwx"), (4, "uw"), (3.5, "uvw")):
        tables = read_table(path, tmp_path / "m.csv", {"rating": "stars"}, least_rating=least)
        assert "".join(tables.interactions["user"].cast(pl.String)) == users
        assert tables.report.get("interactions with a low rating or none", 0) == 4 - len(users)
    with pytest.raises(InputError, match="no column 'rating' for the rating"):
        read_table(path, tmp_path / "m.csv", least_rating=4)
