"""From raw tables to one time-ordered sequence per user: deduplication, k-core, order, leave-one-out."""

from __future__ import annotations

from typing import Any

import polars as pl

from data_processing.layout import DataFolder
from data_processing.sources.tables import SourceTables
from gream_verl.files import InputError, write_json
from gream_verl.split import HELD_OUT

SHORTEST = HELD_OUT + 1
"""A user needs this many interactions: one to learn from, one to validate, one to test."""


def deduplicate(interactions: pl.DataFrame) -> pl.DataFrame:
    """Keep the earliest interaction of every user and item; of equal times the first in the file."""
    return (
        interactions.with_row_index("row")
        .sort("timestamp", "row")
        .unique(["user", "item"], keep="first", maintain_order=True)
        .sort("row")
        .drop("row")
    )


def k_core(interactions: pl.DataFrame, core: int) -> pl.DataFrame:
    """Drop users and items with fewer than ``core`` interactions until none is left; row order is kept."""
    while True:
        kept = interactions.filter(pl.len().over("user") >= core).filter(pl.len().over("item") >= core)
        if len(kept) == len(interactions):
            return kept
        interactions = kept


def sequences(interactions: pl.DataFrame) -> dict[str, list[str]]:
    """Return the items of every user in time order, users sorted; equal times keep the order of the table."""
    grouped = interactions.sort("timestamp", maintain_order=True).group_by("user", maintain_order=True).agg("item")
    by_user = dict(grouped.iter_rows())
    return {user: by_user[user] for user in sort_ids(by_user)}


def sort_ids(ids: Any) -> list[str]:
    """Sort ids as numbers where all are numbers, else as text."""
    ids = list(ids)
    numbers = all(key.isascii() and key.isdigit() for key in ids)
    return sorted(ids, key=lambda key: (int(key), key) if numbers else (0, key))


def statistics(by_user: dict[str, list[str]]) -> dict[str, float]:
    """Return the numbers by which data sets are compared.

    Returns:
        users, items, interactions, sparsity (share of user-item pairs without an interaction), mean and longest length.

    Raises:
        InputError: When there is no interaction.
    """
    if not any(by_user.values()):
        raise InputError("the data set holds no interactions; prepare it anew")
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


def prepare(tables: SourceTables, folder: DataFolder, *, core: int = 5) -> dict[str, Any]:
    """Filter and order the interactions, and write ``<D>.inter.json``, ``<D>.item.json`` and ``<D>.report.json``.

    Args:
        tables: What a source reader gave.
        folder: Where to write.
        core: Users and items keep at least so many interactions (k-core).

    Returns:
        What the report holds: ``statistics``, ``dropped`` (interactions, users and items, by reason), ``source``
        (counts of the reader), ``rejects`` (a sample of skipped rows).

    Raises:
        InputError: When no interaction is left.
    """
    core = max(core, 1)
    known = tables.interactions.join(tables.items.select("item"), on="item", how="semi", maintain_order="left")
    unique = deduplicate(known)
    kept = k_core(unique, core).filter(pl.len().over("user") >= SHORTEST)
    if kept.is_empty():
        raise InputError(
            f"{folder.name}: none of {len(tables.interactions)} interactions is left ({len(known)} are of an item with "
            f"a title, {len(unique)} of these are no repeats): no user and item has {max(core, SHORTEST)} of them; "
            f"lower the core ({core}) or bring more data"
        )
    by_user = sequences(kept)
    items = _write_items(tables.items, kept, folder)
    write_json(folder.inter, by_user)
    report = {
        "statistics": statistics(by_user),
        "dropped": {
            "interactions with an item that has no title": len(tables.interactions) - len(known),
            "repeated interactions": len(known) - len(unique),
            "interactions outside the core": len(unique) - len(kept),
            "users with too few interactions": unique["user"].n_unique() - len(by_user),
            "items outside the core": len(tables.items) - items,
        },
        "core": core,
        "source": tables.report,
        "rejects": tables.rejects,
    }
    write_json(folder.report, report, indent=1)
    return report


def _write_items(items: pl.DataFrame, kept: pl.DataFrame, folder: DataFolder) -> int:
    rows = {row.pop("item"): row for row in items.join(kept, on="item", how="semi").iter_rows(named=True)}
    write_json(folder.item, {item: rows[item] for item in sort_ids(rows)}, indent=0)
    return len(rows)
