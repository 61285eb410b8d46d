"""Reader of data sets in the layout of the authors, LC-Rec and LETTER: ``<D>.inter.json`` and ``<D>.item.json``."""

from __future__ import annotations

from pathlib import Path

import polars as pl

from data_processing.sources.clean import clean_item
from data_processing.sources.common import INTERACTIONS, RowChecks, SourceTables, source_tables
from gream_verl.core.data_folder import Item, item_of
from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json
from gream_verl.core.split import read_interactions

REMEDY = "give the path of a file in the layout of LC-Rec"


def read_layout(interactions: Path, items: Path) -> SourceTables:
    """Read ``{user: [item, ...]}`` in time order and ``{item: {title, description, brand, categories}}``.

    The layout has no times: the position in a user's sequence stands for it.
    """
    sequences, cleaned = read_interactions(interactions, REMEDY), read_items(items)
    rows = [(user, item, position) for user, taken in sequences.items() for position, item in enumerate(taken)]
    table = pl.DataFrame(rows, schema=INTERACTIONS, orient="row")
    return source_tables(table, cleaned, RowChecks(interactions, rows=len(rows)), RowChecks(items, rows=len(cleaned)))


def read_items(path: Path) -> dict[str, Item]:
    """Read ``{item: {title, description, brand, categories}}``."""
    described = read_json(path, REMEDY)
    if not isinstance(described, dict) or not all(isinstance(fields, dict) for fields in described.values()):
        raise InputError(f"{path}: expected {{item: {{title, ...}}}}; {REMEDY}")
    return {item: clean_item(item_of(fields)) for item, fields in described.items()}
