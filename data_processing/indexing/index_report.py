"""A page and a table on an item index, alone or beside another: numbers, pictures, examples with titles."""

from __future__ import annotations

import io
import json
import os
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from data_processing.indexing.diagnostics import diagnose, prefix_numbers
from data_processing.indexing.foreign import read_foreign
from data_processing.indexing.neighbours import (
    NEIGHBOURS,
    Neighbours,
    distance_by_depth,
    find_neighbours,
    neighbour_prefixes,
)
from data_processing.indexing.saved_index import load_saved
from gream_verl.core.data_folder import DataFolder, Item
from gream_verl.core.errors import InputError
from gream_verl.core.files import write_json, write_text
from gream_verl.core.semantic_ids import ItemIndex, parse_token

EXAMPLES = 20
EXAMPLE_ITEMS = (3, 8)
"""Fewest and most items of a prefix that says something as an example."""
DIFFERENCE = "differs by"
TERMINAL = 80
"""Columns of a terminal in which no number is to be broken."""
BALANCE = {
    "min": "least items",
    "mean": "mean items",
    "max": "most items",
    "used": "codes in use",
    "entropy": "entropy",
    "perplexity": "perplexity",
}
"""What the table tells of each level."""
NOTES = {
    "Use of codes": "Items a code of each level. Entropy: 1 when all codes are used evenly. Perplexity: the number of "
    "codes that, used evenly, would be as hard to guess. Without codebooks, all levels are taken to have as many codes "
    "as the largest one in use.",
    "What codes leave unsaid": "What is left of the vectors once the codes up to a level are known: the squared length "
    "of the rest, summed as a share of their variance, and its mean over the items. Each index in its own vectors, so "
    "compare only the shares of indexes with other vectors.",
    "Collisions": "Items that share their whole path with another, before collision tokens tell them apart.",
    "Prefixes": "How soon codes tell items apart.",
    "Purity": "Share of items that carry the category most common among the items of their prefix; categories that 90% "
    "of the items carry do not count. No code: the floor. Small prefixes are pure by chance, so compare with prefixes "
    "as many and as large that have their items dealt at random.",
    "Neighbours": "Items drawn at random, and the nearest to each among all others by Euclidean distance. At random: "
    "any two items. Items that are alike should share codes.",
    "Distance": "Mean Euclidean distance of items that share so many codes and no more; it should fall with each.",
}
"""What the sections of the table tell, in order."""


@dataclass(frozen=True)
class KnownIndex:
    """An item index and what is known of its items.

    Attributes:
        name: What tables call it.
        items: Item ids, the order of all rows.
        codes: int32 [items, levels], codes from 0, without collision tokens.
        index: Their semantic IDs.
        vectors: float32 [items, dimensions], what was clustered; None when not known.
        codebooks: float32 [levels, codes, dimensions]; None when not known.
        details: Titles and categories of items; any may be missing.
        settings: What the index was built with.
        source: Its file, in the folder that the user gave.
        notice: What the user should know of how it was read, a sentence; "" for nothing.
    """

    name: str
    items: Sequence[str]
    codes: np.ndarray
    index: ItemIndex
    vectors: np.ndarray | None = None
    codebooks: np.ndarray | None = None
    details: Mapping[str, Item] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    source: str = "item index"
    notice: str = ""

    @property
    def categories(self) -> list[Collection[str]]:
        """Categories of each item."""
        return [self.details[item].categories if item in self.details else () for item in self.items]

    def title(self, item: str) -> str:
        """Return the title of ``item``, "" where it has none."""
        return self.details[item].title if item in self.details else ""

    def take(self, rows: np.ndarray) -> KnownIndex:
        """Return the index of some items.

        Args:
            rows: int [items to keep], in the order to have them in.
        """
        if np.array_equal(rows, np.arange(len(self.items))):
            return self
        vectors = None if self.vectors is None else self.vectors[rows]
        return replace(self, items=[self.items[row] for row in rows], codes=self.codes[rows], vectors=vectors)


def read_index(folder: DataFolder) -> KnownIndex:
    """Read the index of a data set, with titles where there are any, vectors and codebooks where they belong to it.

    Raises:
        InputError: When the index is missing or malformed, or the titles are.
    """
    index = ItemIndex.load(folder.index)
    details = folder.read_items() if folder.item.is_file() else {}
    code = {token: parsed[1] - 1 for token in index.tokens if (parsed := parse_token(token))}
    flat = (code[token] for sid in index.sids.values() for token in sid[: index.base_levels])
    codes = np.fromiter(flat, np.int32, len(index) * index.base_levels).reshape(len(index), -1)
    known = KnownIndex(folder.name, list(index.sids), codes, index, details=details, source=str(folder.index))
    try:
        saved = load_saved(folder, index)
    except InputError as error:
        return replace(
            known, notice=f"{folder.name}: only its SIDs are known, rows that need vectors show “–” ({error})"
        )
    everything = replace(
        known, items=saved.items, codes=saved.codes, vectors=saved.vectors, codebooks=saved.codebooks,
        settings=saved.settings,
    )  # fmt: skip
    return everything.take(np.array([row for row, item in enumerate(saved.items) if item in known.index.sids]))


def read_index_file(path: str | os.PathLike[str]) -> KnownIndex:
    """Read an index of which there is nothing but its semantic IDs, in any form that :func:`read_foreign` knows.

    Raises:
        InputError: When the file is missing or malformed.
    """
    name, foreign, notice = Path(path).name, read_foreign(path), ""
    if foreign.collisions:
        meet, paths = sum(map(len, foreign.collisions)), len(foreign.collisions)
        notice = f"{name}: {meet:,} items meet on {paths:,} paths; to tell them apart, each has a token more here"
    index = foreign.index(resolve=bool(foreign.collisions))
    codes = foreign.codes.astype(np.int32)
    return KnownIndex(name, list(index.sids), codes, index, source=str(path), notice=notice)


def make_report(first: KnownIndex, other: KnownIndex | None = None, *, seed: int = 0) -> dict[str, Any]:
    """Return all numbers on an index, ready for JSON.

    Args:
        first: The index.
        other: Another one to lay beside it.
        seed: Seed of everything that is drawn.

    Returns:
        ``name`` and ``source``; what :func:`diagnose` gives; ``neighbours``: :func:`neighbour_prefixes` and
        :func:`distance_by_depth`, None without vectors; ``settings``; ``examples``: :func:`example_prefixes`;
        ``notices``: sentences on how the indexes were read; with another index also ``comparison``: :func:`compare`.

    Raises:
        InputError: When the two indexes have no item in common.
    """
    near = _neighbours(first, seed)
    measured = _measure(first, first.vectors, near, seed)
    report = {
        "name": first.name,
        "source": first.source,
        **measured,
        "settings": dict(first.settings),
        "examples": example_prefixes(first, seed=seed),
        "notices": [index.notice for index in (first, other) if index is not None and index.notice],
    }
    if other is not None:
        if other.name == first.name:
            other = replace(other, name=f"{other.name} (other)")
        report["comparison"] = compare(first, other, measured, near, seed)
    return report


def compare(
    first: KnownIndex, other: KnownIndex, measured: Mapping[str, Any], near: Neighbours | None, seed: int
) -> dict[str, Any]:
    """Return the numbers of two indexes on the items that both have.

    Both are measured with the categories and, for neighbours, the vectors of the first.

    Args:
        first: An index.
        other: Another one.
        measured: The numbers of ``first`` on all its items.
        near: Neighbours among all items of ``first``.
        seed: Seed of everything that is drawn.

    Returns:
        ``with``, the name of the other, and its ``source``, ``settings`` and ``examples``, with titles of the first
        where it has none; numbers of items: ``items``, ``other_items``, ``shared_items``; ``agreement`` of the first
        codes on shared items, ``normalized_mutual_information`` and ``adjusted_rand_index``; ``columns``: name to
        numbers, the last two on shared items, those before, if any, on all items of each index.

    Raises:
        InputError: When the indexes have no item in common.
    """
    ours_name, theirs_name = first.name, other.name
    row_of = {item: row for row, item in enumerate(other.items)}
    rows = np.array([row for row, item in enumerate(first.items) if item in row_of], np.int64)
    if not len(rows):
        raise InputError(
            f"{first.source} and {other.source} have no item in common ({reprlib.repr(first.items[0])} and "
            f"{reprlib.repr(other.items[0])} are their first ones); compare indexes of one data set"
        )
    ours = first.take(rows)
    theirs = replace(other.take(np.array([row_of[item] for item in ours.items])), details=first.details)
    columns: dict[str, Mapping[str, Any]] = {}
    if not len(ours.items) == len(first.items) == len(other.items):
        columns[f"{ours_name}, all"] = measured
        columns[f"{theirs_name}, all"] = _measure(other, other.vectors, _neighbours(other, seed), seed)
        ours_name, theirs_name = f"{ours_name}, shared", f"{theirs_name}, shared"
    if ours is not first:
        near = _neighbours(ours, seed)
        measured = _measure(ours, ours.vectors, near, seed)
    columns[ours_name] = measured
    columns[theirs_name] = _measure(theirs, ours.vectors, near, seed)
    first_codes = ours.codes[:, 0], theirs.codes[:, 0]
    return {
        "with": other.name,
        "source": other.source,
        "settings": dict(other.settings),
        "examples": example_prefixes(replace(other, details={**first.details, **other.details}), seed=seed),
        "items": len(first.items),
        "other_items": len(other.items),
        "shared_items": len(rows),
        "agreement": {
            "normalized_mutual_information": float(normalized_mutual_info_score(*first_codes)),
            "adjusted_rand_index": float(adjusted_rand_score(*first_codes)),
        },
        "columns": columns,
    }


def _neighbours(index: KnownIndex, seed: int) -> Neighbours | None:
    if index.vectors is None or len(index.items) < 2:
        return None
    return find_neighbours(index.vectors, seed=seed)


def _measure(index: KnownIndex, vectors: np.ndarray | None, near: Neighbours | None, seed: int) -> dict[str, Any]:
    """Return the numbers of one index; ``near`` are neighbours among ``vectors``."""
    measured = diagnose(index.vectors, index.codes, index.codebooks, index.categories, seed=seed)
    measured["neighbours"] = None
    if vectors is not None and near is not None:
        measured["neighbours"] = neighbour_prefixes(index.codes, near)
        measured["neighbours"] |= distance_by_depth(vectors, index.codes, near.items, seed=seed)
    return measured


def example_prefixes(index: KnownIndex, *, count: int = EXAMPLES, seed: int = 0) -> dict[str, Any]:
    """Draw prefixes to show what items have in common that share one.

    They are of the depth at which most items are in prefixes of 3 to 8 items, and hold so many. Where there is no such
    prefix, they are first codes, and only the first 8 of their items are named.

    Args:
        index: The index.
        count: Prefixes to draw; all when there are fewer.
        seed: Seed of the draw.

    Returns:
        ``depth``; ``drawn_from``, what was drawn from; and ``prefixes``: a ``prefix`` as text, the number of its
        ``items``, and ``shown``: ``item``, ``sid`` and ``title`` ("" for none) of each.
    """
    fewest, most = EXAMPLE_ITEMS
    prefixes = prefix_numbers(index.codes)
    sizes = [np.bincount(depth) for depth in prefixes]
    fit = [np.flatnonzero((fewest <= size) & (size <= most)) for size in sizes]
    covered = [int(sizes[depth][fit[depth]].sum()) for depth in range(1, len(sizes))]
    depth = 1 + int(np.argmax(covered))
    candidates = fit[depth] if len(fit[depth]) else np.arange(len(sizes[depth]))
    chosen = np.random.default_rng(seed).choice(candidates, min(count, len(candidates)), replace=False)
    shown = []
    for prefix in np.sort(chosen):
        rows = np.flatnonzero(prefixes[depth] == prefix)
        items = [index.items[row] for row in rows[:most]]
        shown.append(
            {
                "prefix": "".join(index.index.sids[items[0]][:depth]),
                "items": len(rows),
                "shown": [{"item": item, "sid": index.index.text(item), "title": index.title(item)} for item in items],
            }
        )
    fitting = f"prefixes of {fewest} to {most} items"
    drawn_from = fitting if len(fit[depth]) else f"all first codes, as there are no {fitting}"
    return {"depth": depth, "drawn_from": drawn_from, "prefixes": shown}


def table_rows(report: Mapping[str, Any]) -> tuple[list[str], list[tuple[str, list[list[str]]]]]:
    """Return the table of a report as text.

    Args:
        report: What :func:`make_report` returned, or :func:`diagnose`, which tells nothing of neighbours.

    Returns:
        The headings, and for each section its title and rows, the name first. "–" stands for what cannot be computed.
        With two indexes, the last column is the first less the other, on the items that both have.
    """
    compared = "comparison" in report
    columns = report["comparison"]["columns"] if compared else {report.get("name", ""): report}
    values = [dict(_rows(measured)) for measured in columns.values()]
    longest = max(columns.values(), key=lambda measured: measured["levels"])
    sections: dict[str, list[list[str]]] = {}
    for section, name in dict(_rows(longest)):
        row = [column.get((section, name)) for column in values]
        cells = [_text(value) for value in row]
        if compared:
            ours, theirs = row[-2:]
            cells.append("–" if ours is None or theirs is None else _text(ours - theirs, "+"))
        sections.setdefault(section, []).append([name, *cells])
    return ["", *columns, *([DIFFERENCE] if compared else [])], list(sections.items())


def _rows(measured: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], float | None]]:
    """Yield section, name and value of every row of the table."""
    levels = [chr(ord("a") + level) for level in range(measured["levels"])]
    codes = ["no code", "first code", *(f"first {depth} codes" for depth in range(2, len(levels) + 1))]

    yield ("Catalogue", "items"), measured["items"]
    yield ("Catalogue", "levels"), len(levels)
    yield ("Catalogue", "codes a level"), measured["codes"]
    for key, name in BALANCE.items():
        for level, balance in zip(levels, measured["balance"], strict=True):
            yield ("Use of codes", f"level {level}: {name}"), balance[key]
    for key, name in (("distortion", "variance left"), ("mean_squared_error", "mean squared error")):
        for number, level in enumerate(levels):
            yield ("What codes leave unsaid", f"after {level}: {name}"), _at(measured[key], number)
    yield ("Collisions", "items"), measured["collisions"]["items"]
    yield ("Collisions", "share of items"), measured["collisions"]["rate"]
    yield ("Collisions", "groups"), measured["collisions"]["groups"]
    yield ("Collisions", "largest group"), measured["collisions"]["largest"]
    for key, name in (("prefixes", "distinct prefixes"), ("items_a_prefix", "mean items a prefix")):
        for depth, prefix in enumerate(codes[1:], start=1):
            yield ("Prefixes", f"{prefix}: {name}"), measured[key][depth]
    yield ("Purity", "items with a category that counts"), measured["purity_items"]
    for depth, prefix in enumerate(codes):
        yield ("Purity", prefix), _at(measured["purity"], depth)
        if depth:
            yield ("Purity", f"{prefix}: at random"), _at(measured["purity_random"], depth)
    if "neighbours" not in measured:  # diagnose looks for none
        return
    near = measured["neighbours"] or {}
    count = near.get("neighbours", NEIGHBOURS)
    yield ("Neighbours", "items drawn"), near.get("sample")
    yield ("Neighbours", "codes shared: nearest"), _at(near.get("depth_by_rank"), 0)
    yield ("Neighbours", f"codes shared: number {count}"), _at(near.get("depth_by_rank"), -1)
    yield ("Neighbours", "codes shared: at random"), near.get("depth_random")
    for number, prefix in enumerate(codes[1:]):
        yield ("Neighbours", f"of {count} nearest, share {prefix}"), _at(near.get("sharing"), number)
        yield ("Neighbours", f"of {count} at random, share {prefix}"), _at(near.get("sharing_random"), number)
    for depth, prefix in enumerate(codes):
        yield ("Distance", f"share {prefix}"), _at(near.get("distance"), depth)
        yield ("Distance", f"share {prefix}: pairs drawn"), _at(near.get("pairs"), depth)


def _at(values: Sequence[Any] | None, place: int) -> Any:
    return values[place] if values else None


def _text(value: float | None, sign: str = "") -> str:
    if value is None:
        return "–"
    whole = isinstance(value, int) or abs(value) >= 999.5
    digits, sign = 3 if sign else 4, sign if value else ""
    return f"{value:{sign},.0f}" if whole else f"{value:{sign}.{digits}g}"


def sentences(report: Mapping[str, Any]) -> list[str]:
    """Return on which items the numbers stand and, with two indexes, how much they agree."""
    if "comparison" not in report:
        return []
    compared = report["comparison"]
    agreement = compared["agreement"]
    return [
        f"{report['name']} has {compared['items']:,} items, {compared['with']} has {compared['other_items']:,}, and "
        f"{compared['shared_items']:,} are in both. The difference is {report['name']} less {compared['with']} on "
        f"those, with the categories and, for neighbours and distances, the vectors of {report['name']}.",
        "Agreement of the first codes on the items in both, from 0 (none) to 1 (the same groups): normalised mutual "
        f"information {agreement['normalized_mutual_information']:.3f}, adjusted Rand index "
        f"{agreement['adjusted_rand_index']:.3f}. Only the latter is corrected for chance.",
    ]


def render_table(report: Mapping[str, Any]) -> Table:
    """Return the table for the terminal: headings, and the names of rows, are broken before any number is."""
    headings, sections = table_rows(report)
    columns = list(zip(*(row for _, rows in sections for row in rows), strict=True))
    names, *widths = (max(map(len, column)) for column in columns)
    room = (TERMINAL - 2 - names) // len(widths) - 1
    table = Table(
        title=Text(f"Item index {report.get('name', '')}"), title_justify="left", box=SIMPLE_HEAD,
        padding=0, caption=Text("\n".join(sentences(report))), caption_justify="left",
    )  # fmt: skip
    table.add_column("")
    for heading, width in zip(headings[1:], widths, strict=True):
        word = max(map(len, heading.split()), default=0)
        table.add_column(Text(heading), justify="right", overflow="fold", width=max(width, min(word, room)))
    for title, rows in sections:
        table.add_row(Text(title, style="bold"))
        for row in rows:
            table.add_row(*map(Text, row))
        table.add_section()
    return table


def write_report(folder: str | os.PathLike[str], report: Mapping[str, Any]) -> None:
    """Write ``<name>.index-report.json`` and ``<name>.index-report.html``.

    Args:
        folder: Where to write.
        report: What :func:`make_report` returned.

    Raises:
        InputError: When a file cannot be written.
    """
    headings, sections = table_rows(report)
    indexes = {report["name"]: report}
    if "comparison" in report:
        indexes[report["comparison"]["with"]] = report["comparison"]
    settings = {name: None for index in indexes.values() for name in index["settings"]}  # each once, in order
    template = files("data_processing.indexing").joinpath("index_report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(
        report=report,
        sentences=sentences(report),
        headings=headings,
        sections=sections,
        notes=NOTES,
        pictures=_pictures(report),
        indexes=indexes,
        settings=[[name, *(_setting(index["settings"], name) for index in indexes.values())] for name in settings],
    )
    write_json(Path(folder) / f"{report['name']}.index-report.json", report, indent=1)
    write_text(Path(folder) / f"{report['name']}.index-report.html", page)


def _setting(settings: Mapping[str, Any], name: str) -> str:
    value = settings.get(name, "–")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _pictures(report: Mapping[str, Any]) -> list[Markup]:
    """Return the pictures there are numbers for."""
    columns = {report["name"]: report}
    if "comparison" in report:
        columns = dict(list(report["comparison"]["columns"].items())[-2:])  # on shared items
    near = {name: measured["neighbours"] for name, measured in columns.items() if measured["neighbours"]}
    told = {name: measured for name, measured in columns.items() if measured["purity"]}
    random = {name: [values["depth_random"]] * values["neighbours"] for name, values in near.items()}
    drawn = [
        (
            "Codes shared with neighbours", "neighbour, nearest first", "mean codes shared", 1,
            {name: values["depth_by_rank"] for name, values in near.items()}, random,
        ),
        (
            "Distance of items that share codes", "codes shared, and no more", "mean distance", 0,
            {name: values["distance"] for name, values in near.items()}, {},
        ),
        (
            "Purity of prefixes", "codes of the prefix", "share of items", 0,
            {name: measured["purity"] for name, measured in told.items()},
            {name: measured["purity_random"] for name, measured in told.items()},
        ),
    ]  # fmt: skip
    return [_picture(*picture) for picture in drawn if picture[4]]


def _picture(
    title: str, x: str, y: str, start: int, lines: Mapping[str, Sequence[Any]], random: Mapping[str, Sequence[Any]]
) -> Markup:
    """Return a line an index, and a dashed one of random items, as inline SVG: the same bytes for the same data."""
    figure = Figure(figsize=(5.6, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, fontsize=10, loc="left")
    axes.set(xlabel=x, ylabel=y)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    for number, (name, values) in enumerate(lines.items()):
        places = range(start, start + len(values))
        shown = [np.nan if value is None else value for value in values]
        label = name.replace("$", r"\$")  # a name is no formula
        axes.plot(places, shown, color=f"C{number}", linewidth=1.4, marker=".", label=label)
        if name in random:
            axes.plot(places, random[name], color=f"C{number}", linewidth=1, linestyle="--", label=f"{label}: random")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    buffer = io.StringIO()
    with rc_context({"svg.hashsalt": "gream", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    return Markup('<div role="img" aria-label="{}">').format(title) + Markup(svg[svg.index("<svg") :] + "</div>")
