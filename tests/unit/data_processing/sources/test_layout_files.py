from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_processing.interactions import prepare
from data_processing.sources.layout_files import read_layout
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.files import write_json

SHARED = Path(os.environ.get("GREAM_SHARED_DATA", Path(__file__).parents[5] / "shared" / "data"))
BEAUTY = SHARED / "beauty2014"


def write(folder: Path, inter: object, items: object) -> tuple[Path, Path]:
    paths = folder / "D.inter.json", folder / "D.item.json"
    for path, value in zip(paths, (inter, items), strict=True):
        write_json(path, value)
    return paths


def test_the_order_of_a_sequence_stands_for_time(tmp_path: Path) -> None:
    items = {
        "0": {"title": "A &amp; B", "categories": [["Film", "Horror"]], "brand": "Fox", "description": ["A", "B"]},
        "1": {"title": "Heat", "categories": "Film"},
        "2": {"title": ""},
    }
    tables = read_layout(*write(tmp_path, {"u": [1, 0, 2], "v": ["0"]}, items))
    assert tables.interactions.rows() == [("u", "1", 0), ("u", "0", 1), ("u", "2", 2), ("v", "0", 0)]
    assert tables.items.rows() == [("0", "A & B", "A B", "Fox", ["Film", "Horror"]), ("1", "Heat", "", "", ["Film"])]
    assert tables.report == {"interaction rows": 4, "item rows": 3, "items without a title": 1}


@pytest.mark.parametrize(
    ("inter", "items", "message"),
    [
        (["u"], {}, r"D\.inter\.json: expected \{user: \[item"),
        ({"u": [None]}, {}, r"D\.inter\.json: user 'u': no list of ids"),
        ({}, {"1": "Heat"}, r"D\.item\.json: expected \{item: \{title"),
    ],
)
def test_other_forms_are_named(tmp_path: Path, inter: object, items: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_layout(*write(tmp_path, inter, items))


def test_items_are_read_as_the_data_folder_reads_them(tmp_path: Path) -> None:
    items = {
        "0": {"title": "A", "categories": "Musical Instruments,Guitar & Bass, Picks"},
        "1": {"title": "B", "categories": [["Film", "Horror"], ["Film"]], "description": ["x", "y"], "brand": "Fox"},
        "2": {"title": "C", "categories": ["Keyboards and everything that goes with them, and more of the same"]},
    }
    tables = read_layout(*write(tmp_path, {"u": ["0", "1", "2"]}, items))
    read = {row.pop("item"): row for row in tables.items.iter_rows(named=True)}
    for key, item in DataFolder(tmp_path, "D").read_items().items():
        assert read[key] == {**vars(item), "categories": list(item.categories)}


@pytest.mark.skipif(not BEAUTY.is_dir(), reason="GREAM_SHARED_DATA holds no beauty2014")
def test_beauty_has_the_numbers_that_are_published(tmp_path: Path) -> None:
    tables = read_layout(BEAUTY / "Beauty.inter.json", BEAUTY / "Beauty.item.json")
    statistics = prepare(tables, DataFolder(tmp_path, "Beauty"))["statistics"]
    assert (statistics["users"], statistics["items"], statistics["interactions"]) == (22363, 12101, 198502)
