"""From raw tables to one time-ordered sequence per user: deduplication, k-core, order, split."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from data_processing.sources.common import EPOCHS, SourceTables
from data_processing.sources.layout_files import read_items
from gream_verl.core.data_folder import PREPARE, DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, write_json, write_text
from gream_verl.core.split import HELD_OUT, by_time

SHORTEST = HELD_OUT + 1
"""Least interactions of a user: one for training, one for validation, one for the test."""
_json = json.JSONEncoder(ensure_ascii=False).encode


def deduplicate(interactions: pl.DataFrame) -> pl.DataFrame:
    """Keep the earliest interaction of every user and item; of equal times the first in the file."""
    earliest = interactions.with_row_index("row").sort("timestamp", maintain_order=True)
    return earliest.unique(["user", "item"], keep="first").sort("row").drop("row")


def k_core(interactions: pl.DataFrame, core: int, shortest: int = 1) -> pl.DataFrame:
    """Drop users and items with fewer than ``core`` interactions until none is left; row order is kept.

    Args:
        interactions: Columns user and item.
        core: Least interactions of a user and of an item.
        shortest: Least interactions of a user, when that is more.
    """
    users, items = (interactions[column].to_physical().to_numpy() for column in ("user", "item"))
    rows = np.arange(len(interactions))
    while True:
        user, item = users[rows], items[rows]
        enough = (np.bincount(user)[user] >= max(core, shortest)) & (np.bincount(item)[item] >= core)
        if enough.all():
            return interactions[rows]
        rows = rows[enough]


def ordered(interactions: pl.DataFrame) -> pl.DataFrame:
    """Return the interactions user by user, users sorted by :func:`sort_ids`, each user's in time order.

    Interactions of a user at the same time keep the order of the table.
    """
    users = sort_ids(interactions["user"].unique().cast(pl.String))
    ranks = pl.DataFrame({"user": users}, schema={"user": interactions["user"].dtype}).with_row_index("rank")
    ranked = interactions.join(ranks, on="user", maintain_order="left")
    return ranked.sort("rank", "timestamp", maintain_order=True).drop("rank")


def sort_ids(ids: Iterable[str]) -> list[str]:
    """Sort ids as numbers where all are numbers, else as text."""
    ids = list(ids)
    numbers = all(key.isascii() and key.isdigit() for key in ids)
    return sorted(ids, key=lambda key: (int(key), key) if numbers else (0, key))


class TimeSplit(NamedTuple):
    """Parts of a temporal split (:mod:`gream_verl.core.split`): shares of all interactions, or their first days."""

    validation: float | date = 0.1
    test: float | date = 0.1


def split_by_time(in_order: pl.DataFrame, parts: TimeSplit) -> dict[str, Any]:
    """Return the content of ``<D>.split.json`` for interactions in the order of :func:`ordered`."""
    times = np.sort(in_order["timestamp"].to_numpy())
    test = _first_of(times, parts.test, len(times))
    validation = _first_of(times, parts.validation, test)
    if not 0 < validation < test < len(times):
        raise InputError(
            f"{parts.validation} (validation) and {parts.test} (test) leave no training or nothing to test"
        )
    validation_from, test_from = times[[min(round(start), len(times) - 1) for start in (validation, test)]].tolist()
    grouped = in_order.group_by("user", maintain_order=True).agg("timestamp").cast({"user": pl.String})
    users = {user: by_time(taken, validation_from, test_from) for user, taken in grouped.iter_rows()}
    made = {
        "kind": "temporal",
        "validation_from": validation_from,
        "test_from": test_from,
        "training_interactions": sum(split.training for split in users.values()),
        "validation_users": sum(split.validation is not None for split in users.values()),
        "test_users": sum(split.test is not None for split in users.values()),
    }
    if not (made["validation_users"] and made["test_users"]):
        raise InputError(
            f"a temporal split leaves {made['validation_users']} users for validation and {made['test_users']} for the "
            "test; choose other shares"
        )
    return made | {"users": users}


def _first_of(times: np.ndarray, part: float | date, end: float) -> float:
    """Return the position in rising ``times`` of a part: that of its first day, or of a share that ends at ``end``."""
    if not isinstance(part, date):
        return end - part * len(times)
    middle = times[len(times) // 2]
    unit = next((low / EPOCHS[0] for low in EPOCHS if low <= middle <= 42 * low), None)
    if unit is None:
        raise InputError(f"{part}: times such as {middle} are no dates; give shares")
    return int(np.searchsorted(times, (part - date(1970, 1, 1)).total_seconds() * unit))


def statistics(by_user: dict[str, list[str]]) -> dict[str, float]:
    """Return the numbers by which data sets are compared; sparsity is the share of user-item pairs not interacted."""
    lengths = [len(sequence) for sequence in by_user.values()]
    items = {item for sequence in by_user.values() for item in sequence}
    return {
        "users": len(by_user),
        "items": len(items),
        "interactions": sum(lengths),
        "sparsity": 1 - sum(lengths) / (len(by_user) * len(items)),
        "mean_length": sum(lengths) / len(lengths),
        "longest": max(lengths),
    }


def prepare(
    tables: SourceTables, folder: DataFolder, *, core: int = 5, split: TimeSplit | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Filter and order the interactions, and write ``<D>.inter.json``, ``<D>.item.json`` and ``<D>.report.json``.

    Rows of the source that could not be used are written to ``<D>.rejects.jsonl``, before anything can stop the run.

    Args:
        tables: The tables of a source.
        folder: The folder for the files.
        core: Least interactions of users and items (k-core).
        split: A temporal split, written to ``<D>.split.json``; leave-one-out when None.
        dry_run: Return the report and write nothing.

    Returns:
        The report: ``statistics``, ``split``, ``dropped`` (interactions, users and items, by reason), ``source``
        (counts of the reader), ``rejects_file`` (its name, None without rejects).
    """
    if not dry_run and tables.rejects:
        write_text(folder.rejects, "".join(_json(reject) + "\n" for reject in tables.rejects))
    elif not dry_run:
        folder.rejects.unlink(missing_ok=True)
    kept, dropped = _filtered(tables, folder.name, core, 1 if split else SHORTEST)
    named = kept.select(pl.col("user", "item").cast(pl.String))
    by_user = dict(named.group_by("user", maintain_order=True).agg("item").iter_rows())
    parts = split_by_time(kept, split) if split else {"kind": "leave-one-out"}
    report = {
        "statistics": statistics(by_user),
        "split": {name: value for name, value in parts.items() if name != "users"},
        "dropped": dropped,
        "core": core,
        "source": tables.report,
        "rejects_file": folder.rejects.name if tables.rejects else None,
    }
    if not dry_run:
        folder.reviews.unlink(missing_ok=True)  # some may be of interactions that are held out now
        _write_items(tables.items, kept, folder)
        if split:  # first: a kill before the interactions are written leaves files that do not fit and are refused
            write_json(folder.split, parts)
        write_json(folder.inter, by_user)
        if not split:
            folder.split.unlink(missing_ok=True)
        write_json(folder.report, report, indent=1)
    return report


def _filtered(tables: SourceTables, name: str, core: int, shortest: int) -> tuple[pl.DataFrame, dict[str, int]]:
    """Return the interactions of the core, in the order of :func:`ordered`, and the counts of what was dropped."""
    titled = tables.items.select(pl.col("item").cast(tables.interactions["item"].dtype))
    known = tables.interactions.join(titled, on="item", how="semi", maintain_order="left")
    unknown = sort_ids(tables.interactions.join(titled, on="item", how="anti")["item"].unique().cast(pl.String))
    if unknown and known.is_empty():
        raise InputError(
            f"{name}: no item of the interactions, such as {', '.join(unknown[:3])}, is among the items with a title, "
            f"such as {', '.join(titled['item'][:3])}; check that both files are of one catalogue, and their columns"
        )
    unique = deduplicate(known)
    kept = k_core(unique, core, shortest)
    if kept.is_empty():
        raise InputError(
            f"{name}: none of {len(tables.interactions)} interactions is left ({len(known)} of titled items, "
            f"{len(unique)} without repeats); lower the core ({core})"
        )
    named = {f"items without a title, such as {', '.join(unknown[:3])}": len(unknown)} if unknown else {}
    return ordered(kept), {
        **named,
        "interactions with an item that has no title": len(tables.interactions) - len(known),
        "repeated interactions": len(known) - len(unique),
        "interactions outside the core": len(unique) - len(kept),
        "users outside the core": unique["user"].n_unique() - kept["user"].n_unique(),
        "items outside the core": len(tables.items) - kept["item"].n_unique(),
    }


def _write_items(items: pl.DataFrame, kept: pl.DataFrame, folder: DataFolder) -> None:
    kept_items = kept.select(pl.col("item").unique().cast(pl.String))
    rows = {row.pop("item"): row for row in items.join(kept_items, on="item", how="semi").iter_rows(named=True)}
    lines = (f"{_json(item)}: {_json(rows[item])}" for item in sort_ids(rows))
    write_text(folder.item, "{\n" + ",\n".join(lines) + "\n}\n")


def take_items(folder: DataFolder, file: Path) -> None:
    """Put the items of another file into ``<D>.item.json``; those that are there stay as they are."""
    known = read_json(folder.item, PREPARE)
    new = {item: fields for item, fields in read_items(file).items() if item not in known}
    if untitled := [item for item, fields in new.items() if not fields.title]:
        raise InputError(f"{file}: item {untitled[0]!r} has neither title nor description; give it one")
    write_json(folder.item, known | {item: asdict(fields) for item, fields in new.items()})
