"""Readers of sequences: the layout of the authors, LC-Rec and LETTER (``<D>.inter.json``), and lines of ids.

Neither has times: the position in a user's sequence stands for the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from data_processing.sources.clean import clean_item
from data_processing.sources.common import INTERACTIONS, RowChecks, SourceTables, readable, source_tables
from gream_verl.core.data_folder import Item, item_of
from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, require_file
from gream_verl.core.split import read_interactions

REMEDY = "give the path of a file in the layout of LC-Rec"


def read_layout(interactions: Path, items: Path) -> SourceTables:
    """Read ``{user: [item, ...]}`` in time order and ``{item: {title, description, brand, categories}}``."""
    return _tables(interactions, read_interactions(interactions, REMEDY), items, read_items(items))


def read_sequences(interactions: Path, items: Path | None) -> SourceTables:
    """Read lines ``user item item ...`` in time order, as of S3-Rec and OneRec-Think, and items as in the layout.

    Without a file of items, the id of an item is all that is known of it.
    """
    sequences: dict[str, list[str]] = {}
    with readable(interactions):
        lines = require_file(interactions, "give its path").read_text("utf-8-sig").rstrip().split("\n")
    for number, line in enumerate(lines, 1):
        user, *taken = line.split() or [""]
        if not taken or user in sequences:
            problem = f"user {user!r} comes twice" if taken else "expected `user item item ...`"
            raise InputError(f"{interactions}: line {number}: {problem}; correct the file")
        sequences[user] = taken
    ids = {item: Item(item) for taken in sequences.values() for item in taken}
    return _tables(interactions, sequences, items or interactions, read_items(items) if items else ids)


def _tables(
    interactions: Path, sequences: Mapping[str, Sequence[str]], items: Path, cleaned: Mapping[str, Item]
) -> SourceTables:
    rows = [(user, item, position) for user, taken in sequences.items() for position, item in enumerate(taken)]
    table = pl.DataFrame(rows, schema=INTERACTIONS, orient="row")
    return source_tables(table, cleaned, RowChecks(interactions, rows=len(rows)), RowChecks(items, rows=len(cleaned)))


def read_items(path: Path) -> dict[str, Item]:
    """Read ``{item: {title, description, brand, categories}}``."""
    described = read_json(path, REMEDY)
    if not isinstance(described, dict) or not all(isinstance(fields, dict) for fields in described.values()):
        raise InputError(f"{path}: expected {{item: {{title, ...}}}}; {REMEDY}")
    return {item: clean_item(item_of(fields)) for item, fields in described.items()}
