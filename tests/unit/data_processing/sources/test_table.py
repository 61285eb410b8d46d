from __future__ import annotations

import gzip
from datetime import UTC, datetime
from pathlib import Path

import polars as pl
import pytest

from data_processing.sources.table import read_table
from gream_verl.core.errors import InputError

ROWS = [("u", "1", 100, 4.0), ("u", "2", 200, None)]
ITEMS = [("1", "Alien", "", "", ["Horror", "Sci-Fi"]), ("2", "Heat", "Crime", "Fox", [])]


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
    assert tables.interactions.rows() == ROWS
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
        assert tables.interactions.rows() == [("u", "1", 100_000_000, None), ("u", "2", 200_000_000, None)]
        assert tables.items["categories"].to_list() == [["Horror", "Sci-Fi"], []]


def test_single_bad_rows_are_counted_and_sampled(tmp_path: Path) -> None:
    (tmp_path / "i.csv").write_text("user,item,timestamp\n" + "u,1,5\n" * 60 + ",1,5\nu,1,soon\n")
    (tmp_path / "m.csv").write_text("item,title\n" + "".join(f"{n},T\n" for n in range(60)) + "1,Again\n99,\n")
    tables = read_table(tmp_path / "i.csv", tmp_path / "m.csv")
    assert tables.report == {
        "interaction rows": 62, "item rows": 62, "items without a title": 1,
        "interactions: no user, item or timestamp": 2, "items with several rows": 1,
    }  # fmt: skip
    assert [(reject["file"], reject["row"]) for reject in tables.rejects] == [
        (str(tmp_path / "i.csv"), 62), (str(tmp_path / "i.csv"), 63),
    ]  # fmt: skip
    assert [reject["text"] for reject in tables.rejects[:2]] == ["None\t1\t5", "u\t1\tsoon"]


def test_the_share_of_bad_rows_that_stops_the_run_can_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "i.csv").write_text("user,item,timestamp\n" + "u,1,5\n" * 2 + "u,1,soon\n" * 2000)
    (tmp_path / "m.csv").write_text("item,title\n1,T\n,None\n")
    paths = tmp_path / "i.csv", tmp_path / "m.csv"
    with pytest.raises(InputError, match=r"i\.csv: 2000 of 2002 .* row 4 .*soon'\); .* a larger share .* than 0\.9$"):
        read_table(*paths, bad_rows=0.9)
    tables = read_table(*paths, bad_rows=1.0)
    assert (len(tables.interactions), tables.report["interactions: no user, item or timestamp"]) == (2, 2000)
    assert (len(tables.rejects), tables.rejects[999]["row"]) == (1001, 1003)


def test_one_column_may_serve_twice(tmp_path: Path) -> None:
    (tmp_path / "i.csv").write_text("user,item,timestamp\n" + "u,1,5\n" * 30 + "u,1,x\n")
    (tmp_path / "m.csv").write_text("item,title\n1,T\n")
    tables = read_table(tmp_path / "i.csv", tmp_path / "m.csv", {"rating": "timestamp"})
    assert tables.interactions.rows()[0] == ("u", "1", 5, 5.0)
    assert tables.rejects[0]["text"] == "u\t1\tx"


def test_packed_tables_are_read_and_columns_without_use_may_be_odd(tmp_path: Path) -> None:
    text = 'user,note,item,timestamp\nu,"two\nlines, quoted",1,5\nv,,2,6\n'
    (tmp_path / "i.csv.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "m.tsv.gz").write_bytes(gzip.compress(b'item\ttitle\n1\tA "quoted\n2\tB\n'))
    tables = read_table(tmp_path / "i.csv.gz", tmp_path / "m.tsv.gz")
    assert tables.interactions.rows() == [("u", "1", 5, None), ("v", "2", 6, None)]
    assert tables.items["title"].to_list() == ['A "quoted', "B"]


def test_many_rows_keep_their_order_and_bad_ones_their_number(tmp_path: Path) -> None:
    count, bad = 400_000, {7, 123_456, 399_999}
    rows = (f"u{row},{row},{'x' if row in bad else row % 7}\n" for row in range(count))
    (tmp_path / "i.csv").write_text("user,item,timestamp\n" + "".join(rows))
    (tmp_path / "m.csv").write_text("item,title\n1,T\n")
    tables = read_table(tmp_path / "i.csv", tmp_path / "m.csv")
    assert tables.interactions["item"].cast(pl.String).cast(pl.Int64).to_list() == [
        row for row in range(count) if row not in bad
    ]
    assert [reject["row"] for reject in tables.rejects] == [row + 2 for row in sorted(bad)]


@pytest.mark.parametrize(
    ("inter", "items", "columns", "message"),
    [
        ("user,item\nu,1\n", "item,title\n1,T\n", {}, r"i\.csv: no column 'timestamp' for the timestamp"),
        ("user,item,timestamp\nu,1,1\n", "item\n1\n", {}, r"m\.csv: no column 'title' for the title"),
        ("user,item,timestamp\nu,1,1\n", "item,title\n1,T\n", {"brand": "b"}, r"m\.csv: no column 'b' for the brand"),
        ("user,item,timestamp\nu,1,1\n", "item,title\n1,T\n", {"rating": "r"}, r"i\.csv: no column 'r' for the rating"),
        ("user,item,timestamp\nu,1,1\n", "item,title\n1,T\n", {"usr": "u"}, "column 'usr': unknown; known are user"),
        ("user,item,timestamp\nu,1,soon\n", "item,title\n1,T\n", {}, r"i\.csv: 1 of 1 rows cannot be used"),
        ("", "item,title\n1,T\n", {}, r"i\.csv: no column 'user'"),
        ("user,item,timestamp\nu,1,1\n", 'item,title\n1,"T\n2,U\n', {}, r"m\.csv: a double quote is not closed"),
        ("user,item,timestamp\nu,1,1\n", 'item,title\n1,12" rule\n2,T\n', {}, r"m\.csv: a double quote is not closed"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path: Path, inter: str, items: str, columns: dict, message: str) -> None:
    (tmp_path / "i.csv").write_text(inter)
    (tmp_path / "m.csv").write_text(items)
    with pytest.raises(InputError, match=message):
        read_table(tmp_path / "i.csv", tmp_path / "m.csv", columns)


def test_rows_with_too_many_fields_are_bad_rows(tmp_path: Path) -> None:
    (tmp_path / "i.csv").write_text("user,item,timestamp\nSmith, John,1,10\n,1,4\nu,1,11\nv,1,12,\n")
    (tmp_path / "m.csv").write_text("item,title,brand\n1,Alien, the film,Fox\n1,Alien,Fox\n2\n")
    tables = read_table(tmp_path / "i.csv", tmp_path / "m.csv", bad_rows=0.5)
    assert tables.interactions.rows() == [("u", "1", 11, None), ("v", "1", 12, None)]
    assert tables.items.rows() == [("1", "Alien", "", "Fox", [])]
    assert [(reject["row"], reject["reason"], reject["text"]) for reject in tables.rejects] == [
        (2, "too many fields", "Smith\t John\t1\t10"),
        (3, "no user, item or timestamp", "None\t1\t4"),
        (2, "too many fields", "1\tAlien\t the film\tFox"),
    ]
    (tmp_path / "i.csv").write_text("user,item,timestamp\n" + "u,1,2,3\n" * 1100 + "u,,2\n" * 5 + "u,1,2\n")
    report = read_table(tmp_path / "i.csv", tmp_path / "m.csv", bad_rows=1.0).report
    assert report["interactions: too many fields"] == 1100
    assert report["interactions: no user, item or timestamp"] == 5


@pytest.mark.parametrize(
    "content", ["user,item,timestamp\nu,1,1\n".encode("utf-16"), b"user,item,timestamp\n\xe9,1,1\n"]
)
def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "i.csv").write_bytes(content)
    with pytest.raises(InputError, match=r"i\.csv: .*not UTF-8.*save the table as UTF-8"):
        read_table(tmp_path / "i.csv", tmp_path / "i.csv")


@pytest.mark.parametrize(
    ("times", "places"),
    [
        (["10.9", "10.1", "12"], [2, 1, 3]),
        (["0.9", "0.1", "0.1"], [2, 1, 1]),
        (["12.0", "1e3", "11"], [12, 1000, 11]),
        (["1588687728923000002", "1588687728923000001", "1588687728923000003.0"], None),
        ([10.9, 10.1, 12.0], [2, 1, 3]),
        ([3.0, 1.0, 2.0], [3, 1, 2]),
        ([1588687728923000002, 1588687728923000001, 0], [1588687728923000002, 1588687728923000001, 0]),
    ],
)
def test_times_keep_their_order(tmp_path: Path, times: list, places: list[int] | None) -> None:
    pl.DataFrame({"user": ["u"] * 3, "item": ["1"] * 3, "timestamp": times}).write_parquet(tmp_path / "i.parquet")
    (tmp_path / "m.csv").write_text("item,title\n1,T\n")
    read = read_table(tmp_path / "i.parquet", tmp_path / "m.csv").interactions["timestamp"].to_list()
    if places is None:
        assert read[0] == read[1] + 1
    else:
        assert read == places


def test_whole_numbers_as_pandas_writes_them_are_ids_others_are_not(tmp_path: Path) -> None:
    items = pl.DataFrame({"item": [1.0, 2.0, 2.5, None], "title": ["A", "B", "C", "D"]})
    items.write_parquet(tmp_path / "m.parquet")
    (tmp_path / "i.csv").write_text("user,item,timestamp\n7.0,1.0,1\n8.0,2.0,2\n")
    tables = read_table(tmp_path / "i.csv", tmp_path / "m.parquet", bad_rows=0.5)
    assert tables.interactions.select("user", "item").rows() == [("7", "1"), ("8", "2")]
    assert tables.items["item"].to_list() == ["1", "2"]
    (tmp_path / "i.csv").write_text("user,item,timestamp\n7.0,1.0,1\n8.1,A,2\n")
    tables = read_table(tmp_path / "i.csv", tmp_path / "m.parquet", bad_rows=0.5)
    assert tables.interactions.select("user", "item").rows() == [("7.0", "1.0"), ("8.1", "A")]


def test_texts_are_cleaned_and_a_later_row_fills_what_is_empty(tmp_path: Path) -> None:
    (tmp_path / "i.csv").write_text("user,item,timestamp\nu,1,5\n")
    items = {
        "item": ["1", "1", "2", "3"],
        "title": ["...", "Heat &amp; dust", "...", "T"],
        "description": [["A <b>film</b>", "of"], ["No"], [], None],
        "categories": ["", "R&amp;B|Drama", "", "x|"],
        "brand": [None, 1.5, None, float("nan")],
    }
    pl.DataFrame(items).write_parquet(tmp_path / "m.parquet")
    tables = read_table(tmp_path / "i.csv", tmp_path / "m.parquet")
    assert tables.items.rows() == [
        ("1", "Heat & dust", "A film of", "1.5", ["R&B", "Drama"]),
        ("3", "T", "", "", ["x"]),
    ]
    assert tables.report["items without a title"] == tables.report["items with several rows"] == 1


@pytest.mark.parametrize(("values", "kind"), [([{"en": "x"}], "Struct"), ([[b"x"]], "List")])
def test_texts_of_a_type_of_no_use_are_named(tmp_path: Path, values: list, kind: str) -> None:
    (tmp_path / "i.csv").write_text("user,item,timestamp\nu,1,5\n")
    pl.DataFrame({"item": ["1"], "title": values}).write_parquet(tmp_path / "m.parquet")
    with pytest.raises(InputError, match=rf"column 'title' for the title: expected text, got {kind}"):
        read_table(tmp_path / "i.csv", tmp_path / "m.parquet")


def test_a_file_that_is_no_parquet_is_named(tmp_path: Path) -> None:
    (tmp_path / "i.parquet").write_text("x")
    with pytest.raises(InputError, match=r"i\.parquet: not a Parquet file"):
        read_table(tmp_path / "i.parquet", tmp_path / "i.parquet")
    with pytest.raises(InputError, match=r"none\.parquet: no such file"):
        read_table(tmp_path / "none.parquet", tmp_path / "i.parquet")


def test_dates_with_and_without_a_zone_are_put_in_order(tmp_path: Path) -> None:
    dates = [
        *("2020-01-05", "2020-01-05 00:00:01", "2020-01-05T00:00:02.5", "2020-01-05T00:00:03Z"),
        *("2020-01-05T02:00:04+02:00", "2020-01-05 00:00:05 UTC", "2020-01-05T00:00:06.000000+0000", "03/04/2021"),
    ]
    text = "".join(f"u,{number},{date}\n" for number, date in enumerate([*dates, *dates[:7] * 9]))
    (tmp_path / "i.csv").write_text("user,item,timestamp\n" + text)
    (tmp_path / "m.csv").write_text("item,title\n1,T\n")
    tables = read_table(tmp_path / "i.csv", tmp_path / "m.csv")
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


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("user", [[1]], r"column 'user': expected ids as text or whole numbers, got List"),
        ("item", [b"1"], r"column 'item': expected ids as text or whole numbers, got Binary"),
        ("timestamp", [[1]], r"column 'timestamp' for the timestamp: expected numbers, got List"),
    ],
)
def test_columns_of_no_use_are_named(tmp_path: Path, column: str, values: list, message: str) -> None:
    table = pl.DataFrame({"user": ["u"], "item": ["1"], "timestamp": [1]} | {column: values})
    table.write_parquet(tmp_path / "i.parquet")
    pl.DataFrame({"item": ["1"], "title": ["A"]}).write_parquet(tmp_path / "m.parquet")
    with pytest.raises(InputError, match=message):
        read_table(tmp_path / "i.parquet", tmp_path / "m.parquet")
