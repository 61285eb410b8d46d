"""From raw tables to one time-ordered sequence per user: deduplication, k-core, order, split."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl

from data_processing.sources.tables import SourceTables, collector_paused
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.files import write_json, write_text
from gream_verl.core.split import HELD_OUT, by_time

SHORTEST = HELD_OUT + 1
"""A user needs this many interactions: one to learn from, one to validate, one to test."""

_json = json.JSONEncoder(ensure_ascii=False).encode


def deduplicate(interactions: pl.DataFrame) -> pl.DataFrame:
    """Keep the earliest interaction of every user and item; of equal times the first in the file."""
    user, item = (pl.col(name).to_physical().cast(pl.UInt64) for name in ("user", "item"))
    pairs = interactions.select("timestamp", pair=user * 2**32 + item)
    repeated = pairs["pair"].is_duplicated()
    rows = repeated.arg_true()
    first = pairs[rows].with_columns(row=rows).sort("timestamp", "row").unique("pair", keep="first")["row"]
    kept = ~repeated.to_numpy()
    kept[first.to_numpy()] = True
    return interactions.filter(kept)


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
    places = pl.DataFrame({"user": users}, schema={"user": interactions["user"].dtype}).with_row_index("place")
    placed = interactions.join(places, on="user", maintain_order="left")
    # Two stable sorts by one column are faster than one by both.
    return placed.sort("timestamp", maintain_order=True).sort("place", maintain_order=True).drop("place")


def sequences(interactions: pl.DataFrame) -> dict[str, list[str]]:
    """Return the items of every user in time order, users sorted; equal times keep the order of the table."""
    named = ordered(interactions).select(pl.col("user", "item").cast(pl.String))
    return dict(named.group_by("user", maintain_order=True).agg("item").iter_rows())


def sort_ids(ids: Any) -> list[str]:
    """Sort ids as numbers where all are numbers, else as text."""
    ids = list(ids)
    numbers = all(key.isascii() and key.isdigit() for key in ids)
    return sorted(ids, key=lambda key: (int(key), key) if numbers else (0, key))


@dataclass(frozen=True)
class TimeSplit:
    """What a temporal split holds out, as shares of all interactions, the latest ones (:mod:`gream_verl.core.split`).

    Attributes:
        validation: Share from the first moment of validation to the first of the test.
        test: Share from the first moment of the test on.
    """

    validation: float = 0.1
    test: float = 0.1

    def __post_init__(self) -> None:
        if not (self.validation > 0 and self.test > 0 and self.validation + self.test < 1):
            raise InputError(
                f"shares of {self.validation} for validation and {self.test} for the test leave no training"
            )


def split_by_time(interactions: pl.DataFrame, shares: TimeSplit) -> dict[str, Any]:
    """Return what ``<D>.split.json`` holds.

    Args:
        interactions: What :func:`ordered` gives.
        shares: What to hold out.

    Raises:
        InputError: When no user has an interaction to validate on, or none to test on.
    """
    times = np.sort(interactions["timestamp"].to_numpy())
    held_out = len(times) * np.array([1 - shares.validation - shares.test, 1 - shares.test])
    validation_from, test_from = times[np.minimum(np.rint(held_out).astype(int), len(times) - 1)].tolist()
    grouped = interactions.group_by("user", maintain_order=True).agg("timestamp").cast({"user": pl.String})
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
            "test: no other has an interaction before and after the moment; choose other shares, or leave-one-out"
        )
    return made | {"users": users}


def training_pairs(folder: DataFolder) -> pl.DataFrame:
    """Return the interactions that training may see, columns ``user`` and ``item``."""
    training = folder.read_training()
    rows = [(user, item) for user, part in training.items() for item in part]
    return pl.DataFrame(rows, schema={"user": pl.String(), "item": pl.String()}, orient="row")


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


@collector_paused()
def prepare(
    tables: SourceTables, folder: DataFolder, *, core: int = 5, split: TimeSplit | None = None, dry_run: bool = False
) -> dict[str, Any]:
    """Filter and order the interactions, and write ``<D>.inter.json``, ``<D>.item.json`` and ``<D>.report.json``.

    Rows of the source that could not be used are written to ``<D>.rejects.jsonl``, before anything can stop the run.

    Args:
        tables: What a source reader gave.
        folder: Where to write.
        core: Users and items keep at least so many interactions (k-core).
        split: A temporal split, written to ``<D>.split.json``; leave-one-out when None.
        dry_run: Return the report and write nothing.

    Returns:
        What the report holds: ``statistics``, ``split``, ``dropped`` (interactions, users and items, by reason),
        ``source`` (counts of the reader), ``rejects_file`` (its name, None without rejects).

    Raises:
        InputError: When no interaction is left.
    """
    core = max(core, 1)
    shortest = 1 if split else SHORTEST
    if not dry_run:
        _write_rejects(tables.rejects, folder)
    titled = tables.items.select(pl.col("item").cast(tables.interactions["item"].dtype))
    known = tables.interactions.join(titled, on="item", how="semi", maintain_order="left")
    unique = deduplicate(known)
    kept = k_core(unique, core, shortest)
    if kept.is_empty():
        raise InputError(
            f"{folder.name}: none of {len(tables.interactions)} interactions is left ({len(known)} are of an item with "
            f"a title, {len(unique)} of these are no repeats): no user and item has {max(core, shortest)} of them; "
            f"lower the core ({core}) or bring more data"
        )
    by_user = sequences(kept)
    parts = split_by_time(ordered(kept), split) if split else {"kind": "leave-one-out"}
    report = {
        "statistics": statistics(by_user),
        "split": {name: value for name, value in parts.items() if name != "users"},
        "dropped": {
            "interactions with an item that has no title": len(tables.interactions) - len(known),
            "repeated interactions": len(known) - len(unique),
            "interactions outside the core": len(unique) - len(kept),
            "users outside the core": unique["user"].n_unique() - len(by_user),
            "items outside the core": len(tables.items) - kept["item"].n_unique(),
        },
        "core": core,
        "source": tables.report,
        "rejects_file": folder.rejects.name if tables.rejects else None,
    }
    if not dry_run:
        if folder.reviews.is_file():
            folder.reviews.unlink()  # some may be of interactions that are held out now
        _write_items(tables.items, kept, folder)
        if split:  # before the interactions: should the run be killed between, they do not go together, and that shows
            write_json(folder.split, parts)
        write_json(folder.inter, by_user)
        if not split:
            folder.split.unlink(missing_ok=True)
        write_json(folder.report, report, indent=1)
    return report


def _write_rejects(rejects: Sequence[Mapping[str, Any]], folder: DataFolder) -> None:
    if rejects:
        write_text(folder.rejects, "".join(_json(reject) + "\n" for reject in rejects))
    elif folder.rejects.is_file():
        folder.rejects.unlink()


def _write_items(items: pl.DataFrame, kept: pl.DataFrame, folder: DataFolder) -> None:
    kept_items = kept.select(pl.col("item").unique().cast(pl.String))
    rows = {row.pop("item"): row for row in items.join(kept_items, on="item", how="semi").iter_rows(named=True)}
    lines = (f"{_json(item)}: {_json(rows[item])}" for item in sort_ids(rows))
    write_text(folder.item, "{\n" + ",\n".join(lines) + "\n}\n")
