from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from data_processing.indexing.diagnostics import diagnose
from data_processing.indexing.index_report import (
    KnownIndex,
    example_prefixes,
    make_report,
    read_index,
    read_index_file,
    render_table,
    sentences,
    table_rows,
    write_report,
)
from data_processing.indexing.neighbours import distance_by_depth
from data_processing.indexing.saved_index import SavedIndex, codebooks_file
from gream_verl.cli.main import main as cli
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, write_json
from gream_verl.core.semantic_ids import ItemIndex

DIRTY = "<script>alert('x')</script> & \"Ça\" $x^2"
GENRES = ("Hair", "Skin", "Nails", "Bath")
VOID = {"meta"}


def save(
    folder: DataFolder,
    items: list[str],
    *,
    levels: int = 3,
    shift: int = 0,
    titled: int | None = None,
    settings: dict | None = None,
) -> None:
    """Save an index of 4 codes a level: the first is the genre, the others are the digits of a number."""
    numbers = np.array([int(item) for item in items])
    codes = np.stack([numbers % 4, *((numbers + shift) // 4 // 4**level % 4 for level in range(levels - 1))], axis=1)
    codebooks = (
        np.random.default_rng(0).normal(size=(levels, 4, 6)).astype(np.float32)
        / 2.0 ** np.arange(levels)[:, None, None]
    )
    vectors = sum(codebook[codes[:, level]] for level, codebook in enumerate(codebooks)).astype(np.float32)
    vectors += np.random.default_rng(1).normal(size=(400, 6)).astype(np.float32)[numbers] / 10
    settings = settings or {"seed": 0, "text": {DIRTY: 1}}
    SavedIndex(items, vectors, codes, codebooks, np.zeros(6, np.float32), 1.0, settings).save(folder)
    seen: dict[tuple[int, ...], list[int]] = {}
    for row, path in enumerate(map(tuple, codes.tolist())):
        seen.setdefault(path, []).append(row)
    paths = [
        (*path, seen[path].index(row)) if len(seen[path]) > 1 else path
        for row, path in enumerate(map(tuple, codes.tolist()))
    ]
    ItemIndex.from_codes(items, paths).save(folder.index)
    write_json(
        folder.item,
        {item: {"title": f"{DIRTY} {item}", "categories": ["All", GENRES[int(item) % 4]]} for item in items[:titled]},
    )


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    """An index of 80 items on 64 paths: 32 items share theirs with one other."""
    folder = DataFolder(tmp_path / "data", "D")
    save(folder, [str(item) for item in range(80)])
    return folder


class Page(HTMLParser):
    """What a page holds; every tag that is opened must be closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    @property
    def text(self) -> str:
        return "".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        names = ("src", "href", "xlink:href", "srcset", "data", "action")
        self.links += [value or "" for name, value in attrs if name in names]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def read_page(folder: Path) -> tuple[Page, str]:
    html = (folder / "D.index-report.html").read_text(encoding="utf-8")
    return Page(html), html


def cells(report: dict, section: str, name: str) -> list[str]:
    (rows,) = [rows for title, rows in table_rows(report)[1] if title == section]
    (row,) = [row[1:] for row in rows if row[0] == name]
    return row


def test_the_page_is_whole_loads_nothing_and_shows_dirty_titles_as_text(folder: DataFolder, tmp_path: Path) -> None:
    write_report(tmp_path, make_report(read_index(folder)))
    page, html = read_page(tmp_path)
    assert page.links
    assert all(link.startswith("#") for link in page.links)
    assert not set(page.tags) & {"script", "link", "iframe", "img", "object", "embed"}
    assert not re.search(r"@import|url\((?!#)", html)
    assert set(re.findall(r"\w+://[\w./]*", html)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert page.tags.count("svg") == 3
    assert f"{DIRTY} 7" in page.text
    assert '{"' + DIRTY.replace('"', '\\"') + '": 1}' in page.text  # a setting


def test_the_same_index_gives_the_same_bytes_and_another_seed_other_examples(
    folder: DataFolder, tmp_path: Path
) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_report(tmp_path / name, make_report(read_index(folder), read_index(folder), seed=seed))
    for name in ("D.index-report.html", "D.index-report.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    a, c = (read_json(tmp_path / name / "D.index-report.json") for name in "ac")
    assert a["purity"] == c["purity"]
    assert a["purity_random"] != c["purity_random"]


def test_the_numbers_hold_all_that_the_build_wrote_and_neighbours_and_examples(folder: DataFolder) -> None:
    known = read_index(folder)
    built = diagnose(known.vectors, known.codes, known.codebooks, known.categories)
    report = make_report(known)
    assert report == json.loads(json.dumps(report))
    assert {name: report[name] for name in built} == built
    assert report["settings"] == {"seed": 0, "text": {DIRTY: 1}}
    assert report["collisions"] == {"items": 32, "rate": 0.4, "groups": 16, "largest": 2}
    assert report["purity"][:2] == [0.25, 1.0]  # "All" does not count
    assert table_rows(built)[1] == table_rows(report)[1][:-2]  # without neighbours and their distances
    near = report["neighbours"]
    assert (near["sample"], near["neighbours"]) == (80, 10)
    assert near["sharing"][0] > 3 * near["sharing_random"][0]
    assert near["distance"] == sorted(near["distance"], reverse=True)
    assert cells(report, "Collisions", "share of items") == ["0.4"]
    assert cells(report, "Purity", "first code") == ["1"]
    assert cells(report, "Use of codes", "level c: most items") == ["32"]
    assert cells(report, "Neighbours", "items drawn") == ["80"]
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(render_table(report))
    assert re.search(r"level c: codes in use +4 ", console.export_text())


def test_rows_that_need_vectors_show_a_dash_for_an_index_that_is_a_file_alone(
    folder: DataFolder, tmp_path: Path
) -> None:
    report = make_report(read_index_file(folder.index))
    assert report["name"] == "D.index.json"
    for section, name in (
        ("What codes leave unsaid", "after a: variance left"), ("Purity", "first code"), ("Distance", "share no code"),
        ("Neighbours", "of 10 nearest, share first code"), ("Neighbours", "codes shared: nearest"),
    ):  # fmt: skip
        assert cells(report, section, name) == ["–"]
    assert cells(report, "Collisions", "items") == ["32"]
    assert cells(report, "Use of codes", "level a: mean items") == ["20"]
    write_report(tmp_path, {**report, "name": "D"})
    page, _ = read_page(tmp_path)
    assert page.tags.count("svg") == 0
    assert "(no title)" in page.text


def test_two_indexes_of_the_same_items_stand_side_by_side_with_their_difference(
    folder: DataFolder, tmp_path: Path
) -> None:
    other = DataFolder(tmp_path / "other", "D")
    save(other, [str(item) for item in reversed(range(80))], levels=2, shift=3)
    report = make_report(read_index(folder), read_index(other))
    headings, _ = table_rows(report)
    assert headings == ["", "D", "D (other)", "differs by"]
    compared = report["comparison"]
    assert [compared[name] for name in ("items", "other_items", "shared_items")] == [80, 80, 80]
    assert compared["agreement"] == {
        "normalized_mutual_information": pytest.approx(1.0), "adjusted_rand_index": pytest.approx(1.0)
    }  # fmt: skip
    assert compared["columns"]["D"] == {name: report[name] for name in compared["columns"]["D"]}
    assert cells(report, "Catalogue", "levels") == ["3", "2", "+1"]
    assert cells(report, "Collisions", "items") == ["32", "80", "-48"]
    assert cells(report, "Use of codes", "level c: codes in use") == ["4", "–", "–"]
    assert cells(report, "Neighbours", "items drawn") == ["80", "80", "0"]
    vectors, codes = read_index(folder).vectors, read_index(other).codes[::-1]  # theirs are in reverse order
    apart = distance_by_depth(vectors, codes, np.arange(80))["distance"]
    assert compared["columns"]["D (other)"]["neighbours"]["distance"] == apart
    assert len(sentences(report)) == 2
    write_report(tmp_path, report)
    page, _ = read_page(tmp_path)
    assert "80 are in both" in page.text
    assert page.tags.count("svg") == 3


def test_the_settings_files_and_examples_of_both_indexes_are_shown(folder: DataFolder, tmp_path: Path) -> None:
    other = DataFolder(tmp_path / "other", "D")
    save(other, [str(item) for item in range(80)], levels=2, settings={"seed": 7, "field": "title"})
    report = make_report(read_index(folder), read_index(other))
    compared = report["comparison"]
    assert (report["source"], compared["source"]) == (str(folder.index), str(other.index))
    assert (report["settings"]["seed"], compared["settings"]) == (0, {"seed": 7, "field": "title"})
    assert compared["examples"] == example_prefixes(read_index(other))
    assert compared["examples"] != report["examples"]
    write_report(tmp_path, report)
    page, html = read_page(tmp_path)
    assert "<tr><td>seed</td><td>0</td><td>7</td></tr>" in html
    assert "<tr><td>field</td><td>–</td><td>title</td></tr>" in html
    assert f"<tr><td>file</td><td>{folder.index}</td><td>{other.index}</td></tr>" in html
    assert "D: some prefixes of " in page.text
    assert "D (other): some prefixes of 2 codes" in page.text

    alone = make_report(read_index(folder), read_index_file(other.index))["comparison"]
    assert alone["settings"] == {}
    titles = {item["title"] for prefix in alone["examples"]["prefixes"] for item in prefix["shown"]}
    assert "" not in titles  # those of the first


def test_an_index_in_the_form_of_others_is_compared_and_its_collisions_are_told(
    folder: DataFolder, tmp_path: Path
) -> None:
    rows = {str(item): [f"<a_{item % 4}>", f"<b_{min(item // 4, 18)}>"] for item in range(80)}
    path = tmp_path / "letter.index.json"
    write_json(path, rows)
    other = read_index_file(path)
    assert other.codes[:6].tolist() == [[0, 0], [1, 0], [2, 0], [3, 0], [0, 1], [1, 1]]
    assert other.notice == "letter.index.json: 8 items meet on 4 paths; to tell them apart, each has a token more here"
    report = make_report(read_index(folder), other)
    assert report["notices"] == [other.notice]
    assert cells(report, "Collisions", "items") == ["32", "8", "+24"]
    assert report["comparison"]["source"] == str(path)
    sids = {item["sid"] for prefix in report["comparison"]["examples"]["prefixes"] for item in prefix["shown"]}
    assert "<|a_1|><|b_1|>" in sids

    write_json(path, {item: [*row[:1], f"<b_{item}>"] for item, row in rows.items()})
    assert read_index_file(path).notice == ""


def test_no_number_is_broken_in_a_terminal_of_80_columns(folder: DataFolder, tmp_path: Path) -> None:
    other = DataFolder(tmp_path / "other", "Industrial_and_Scientific")
    save(other, [str(item) for item in range(20, 120)], shift=7)
    report = make_report(read_index(folder), read_index(other))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render_table(report))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 80
    words = set(" ".join(lines).split())
    numbers = {cell for _, rows in table_rows(report)[1] for row in rows for cell in row[1:]}
    assert any(re.fullmatch(r"[+-]0\.0\d{3}", number) for number in numbers)
    assert numbers <= words


def test_a_difference_has_three_digits() -> None:
    base = {**diagnose(None, np.array([[0]]), None, [()]), "neighbours": None}
    ours, theirs = (
        {**base, "items": items, "purity_items": told} for items, told in ((0.5790123, 1999.7), (0.5, 1000.0))
    )
    report = {"name": "D", "comparison": {"columns": {"D": ours, "E": theirs}}}
    assert cells(report, "Catalogue", "items") == ["0.579", "0.5", "+0.079"]
    assert cells(report, "Purity", "items with a category that counts") == ["2,000", "1,000", "+1,000"]


def test_an_index_is_compared_with_itself_item_by_item_and_not_row_by_row(folder: DataFolder, tmp_path: Path) -> None:
    raw = list(read_json(folder.index).items())
    write_json(tmp_path / "shuffled.json", dict(raw[40:] + raw[:40]))
    report = make_report(read_index(folder), read_index_file(tmp_path / "shuffled.json"))
    ours, theirs = report["comparison"]["columns"].values()
    left_out = ("distortion", "mean_squared_error")
    assert [theirs.pop(name) for name in left_out] == [None, None]
    assert theirs == {name: value for name, value in ours.items() if name not in left_out}


def test_indexes_of_different_items_are_compared_on_those_they_share(folder: DataFolder, tmp_path: Path) -> None:
    other = DataFolder(tmp_path / "other", "E")
    save(other, [str(item) for item in range(20, 120)], levels=3)
    report = make_report(read_index(folder), read_index(other))
    assert table_rows(report)[0] == ["", "D, all", "E, all", "D, shared", "E, shared", "differs by"]
    assert cells(report, "Catalogue", "items") == ["80", "100", "60", "60", "0"]
    assert cells(report, "Purity", "items with a category that counts") == ["80", "100", "60", "60", "0"]
    assert cells(report, "Neighbours", "items drawn") == ["80", "100", "60", "60", "0"]
    shared, same = list(report["comparison"]["columns"].values())[-2:]
    assert shared["neighbours"] == same["neighbours"]  # the same codes on these, and the vectors of the first
    assert shared["prefixes"] == same["prefixes"]


def test_indexes_without_a_common_item_are_refused(folder: DataFolder, tmp_path: Path) -> None:
    write_json(tmp_path / "f.index.json", {"x": ["<|a_1|>"], "y": ["<|a_2|>"]})
    with pytest.raises(InputError, match=r"f\.index\.json have no item in common"):
        make_report(read_index(folder), read_index_file(tmp_path / "f.index.json"))


def test_items_that_are_retired_or_have_no_title_do_not_stop_the_report(folder: DataFolder) -> None:
    save(folder, [str(item) for item in range(80)], titled=30)
    sids = read_json(folder.index)
    write_json(folder.root / "D.retired.json", {item: sids.pop(item) for item in ("0", "64")})  # a whole collision
    write_json(folder.index, sids)
    known = read_index(folder)
    assert len(known.items) == len(known.codes) == len(known.vectors) == 78  # type: ignore[arg-type]
    report = make_report(known)
    assert (report["items"], report["purity_items"]) == (78, 29)
    titles = {item["title"] for prefix in report["examples"]["prefixes"] for item in prefix["shown"]}
    assert "" in titles
    assert titles & {f"{DIRTY} {item}" for item in range(30)}


def exchange(folder: DataFolder) -> None:
    """Give two items the SID of the other."""
    sids = read_json(folder.index)
    sids["1"], sids["2"] = sids["2"], sids["1"]
    write_json(folder.index, sids)


def make_older(folder: DataFolder) -> None:
    np.savez(codebooks_file(folder), codebooks=np.zeros((3, 4, 6), np.float32))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: codebooks_file(folder).unlink(), "no such file"),
        (lambda folder: folder.embeddings.unlink(), "no such file"),
        (make_older, "earlier version"),
        (exchange, "item '1' has the SID"),
    ],
)
def test_without_what_it_was_built_from_an_index_is_told_by_its_sids_alone_and_it_says_why(
    folder: DataFolder, tmp_path: Path, change: Callable[[DataFolder], None], reason: str
) -> None:
    change(folder)
    report = make_report(read_index(folder))
    (notice,) = report["notices"]
    assert notice.startswith("D: only its SIDs are known, rows that need vectors show “–” (")
    assert reason in notice
    assert cells(report, "What codes leave unsaid", "after a: variance left") == ["–"]
    assert cells(report, "Neighbours", "items drawn") == ["–"]
    assert cells(report, "Collisions", "items") == ["32"]
    assert report["settings"] == {}
    write_report(tmp_path, report)
    assert notice in read_page(tmp_path)[0].text


def test_a_malformed_index_is_refused_in_a_line(folder: DataFolder) -> None:
    history = ["x" * 100] * 1000
    write_json(folder.index, {"1": history})
    for read in (lambda: read_index(folder), lambda: read_index_file(folder.index)):
        with pytest.raises(InputError, match="item '1' has") as caught:
            read()
        assert len(str(caught.value)) < 500 + len(str(folder.index))


def known(codes: list[list[int]]) -> KnownIndex:
    items = [str(item) for item in range(len(codes))]
    index = ItemIndex.from_codes(items, [[*path, item] for item, path in enumerate(codes)])
    return KnownIndex("D", items, np.array(codes), index)


def test_examples_are_prefixes_of_the_depth_at_which_most_hold_three_to_eight_items() -> None:
    codes = [[genre, kind, item] for genre in range(6) for kind in range(6) for item in range(2 + kind % 3)]
    found = example_prefixes(known(codes))  # 24 fit
    assert example_prefixes(known(codes), seed=1)["prefixes"] != found["prefixes"]
    assert found["depth"] == 2
    assert found["drawn_from"] == "prefixes of 3 to 8 items"
    assert len(found["prefixes"]) == 20
    assert {prefix["items"] for prefix in found["prefixes"]} == {3, 4}
    assert [prefix["prefix"] for prefix in found["prefixes"]] == sorted({p["prefix"] for p in found["prefixes"]})
    for prefix in found["prefixes"]:
        assert len(prefix["shown"]) == prefix["items"]
        assert all(item["sid"].startswith(prefix["prefix"]) for item in prefix["shown"])


def test_examples_of_a_catalogue_without_such_prefixes_are_first_codes() -> None:
    found = example_prefixes(known([[item % 2, item] for item in range(30)]))
    assert found["depth"] == 1
    assert found["drawn_from"] == "all first codes, as there are no prefixes of 3 to 8 items"
    assert [(prefix["items"], len(prefix["shown"])) for prefix in found["prefixes"]] == [(15, 8), (15, 8)]


@pytest.mark.parametrize("items", [1, 2, 4])
def test_the_smallest_catalogues_have_a_report(folder: DataFolder, tmp_path: Path, items: int) -> None:
    save(folder, [str(item) for item in range(items)])
    report = make_report(read_index(folder))
    assert (report["neighbours"] is None) == (items == 1)
    write_report(tmp_path, report)
    read_page(tmp_path)


def gream(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["gream", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_the_command_writes_both_files_and_prints_the_table(
    folder: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["index", "report", "--data", folder.root, "--dataset", "D"]
    assert gream(monkeypatch, *where) == 0
    printed = capsys.readouterr().out
    assert re.search(r"share of items +0\.4", printed)
    assert str(folder.root / "D.index-report.html") in printed
    alone = read_json(folder.root / "D.index-report.json")

    codebooks_file(folder).rename(tmp_path / "aside")
    assert gream(monkeypatch, *where, "--other-index", folder.index, "--output", tmp_path / "out") == 0
    assert "D: only its SIDs are known" in capsys.readouterr().out
    both = read_json(tmp_path / "out" / "D.index-report.json")
    assert set(both) == {*alone, "comparison"}
    assert both["purity"] == alone["purity"]
    assert both["distortion"] is None
    assert gream(monkeypatch, *where, "--other-dataset", "E") == 1
    assert gream(monkeypatch, *where, "--other-dataset", "E", "--other-index", "x") == 1
    errors = capsys.readouterr().err
    assert "E.index.json: no such file" in errors
    assert "leave out --other" in errors
