from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from data_processing.indexing.growth import add_items
from data_processing.indexing.residual_index import IndexSettings, build_index
from data_processing.interactions import prepare
from data_processing.sft.mix import MixOptions, write_mix
from data_processing.sft.tasks import TASKS, WINDOW_TASKS
from data_processing.sources.layout_files import read_layout, read_sequences
from gream_verl.core.data_folder import DataFolder, has_texts
from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, write_json

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


def test_lines_of_ids_are_enough_for_an_index_and_rows_of_semantic_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng, lines = np.random.default_rng(0), []
    for user in range(60):
        begin = int(rng.integers(30))
        lines.append(" ".join(map(str, [f"u{user}", *((begin + 2 * step) % 40 for step in range(8))])))
    (tmp_path / "seq.txt").write_text("\n".join(lines))
    folder = DataFolder(tmp_path, "D")
    prepare(read_sequences(tmp_path / "seq.txt", None), folder, core=1)
    assert folder.read_inter()["u0"] == lines[0].split()[1:]
    assert not has_texts(folder.read_items())
    monkeypatch.setattr("data_processing.indexing.embed.load_encoder", lambda *_: pytest.fail("no text to embed"))
    with pytest.raises(InputError, match="without texts it takes a --collaborative-weight above 0"):
        build_index(folder, IndexSettings(collaborative_weight=0))
    index = build_index(folder)
    assert len(set(index.sids.values())) == 40
    first = [index.sids[str(item)][0] for item in range(40)]
    assert np.mean(np.array(first) == np.roll(first, 2)) > 1.5 * np.mean(np.array(first) == np.roll(first, 1))
    report = write_mix(folder, MixOptions(dict.fromkeys(TASKS, 20)))
    assert {task for task, counts in report.items() if counts["made"]} == {"seqrec", *WINDOW_TASKS}
    items = read_json(folder.item) | {"new": {"title": "new"}}
    write_json(folder.item, items)
    assert add_items(folder)["new"] == 1


def test_lines_of_ids_with_a_file_of_items(tmp_path: Path) -> None:
    (tmp_path / "seq.txt").write_text("u 1 2\nv 2\n\n", encoding="utf-8-sig")
    write_json(tmp_path / "D.item.json", {"1": {"title": "Heat"}, "2": {"title": "Alien"}})
    tables = read_sequences(tmp_path / "seq.txt", tmp_path / "D.item.json")
    assert tables.interactions.rows() == [("u", "1", 0), ("u", "2", 1), ("v", "2", 0)]
    assert tables.items["title"].to_list() == ["Heat", "Alien"]
    (tmp_path / "seq.txt").write_bytes(b"u \xff\n")
    with pytest.raises(InputError, match=r"seq\.txt: not a table in UTF-8"):
        read_sequences(tmp_path / "seq.txt", None)
    faults = {"u 1\nu 2\n": "line 2: user 'u' comes twice", "u 1\n\nv 2\n": "line 2: expected `user item"}
    for text, message in faults.items():
        (tmp_path / "seq.txt").write_text(text)
        with pytest.raises(InputError, match=message):
            read_sequences(tmp_path / "seq.txt", None)
