"""Reader for data sets in the layout of the authors, LC-Rec and LETTER: ``<D>.inter.json`` and ``<D>.item.json``."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import polars as pl

from data_processing.sources.clean import clean_text, clean_title
from data_processing.sources.tables import INTERACTIONS, SourceTables, items_frame
from gream_verl.core.data_folder import Item, category_names, item_ids, item_text
from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json

REMEDY = "give the path of a file in the layout of LC-Rec"


def read_layout(interactions: str | os.PathLike[str], items: str | os.PathLike[str]) -> SourceTables:
    """Read ``{user: [item, ...]}`` in time order and ``{item: {title, description, brand, categories}}``.

    The layout has no times: the place in a user's sequence stands for it. Items without a title are left out.

    Args:
        interactions: ``<D>.inter.json``.
        items: ``<D>.item.json``.

    Raises:
        InputError: When a file is missing or has another form.
    """
    sequences, described = read_json(interactions, REMEDY), read_json(items, REMEDY)
    if not isinstance(sequences, dict):
        raise InputError(f"{interactions}: expected {{user: [item, ...]}}; {REMEDY}")
    if not isinstance(described, dict) or not all(isinstance(fields, dict) for fields in described.values()):
        raise InputError(f"{items}: expected {{item: {{title, ...}}}}; {REMEDY}")
    rows = [
        (user, item, place, None)
        for user, taken in sequences.items()
        for place, item in enumerate(item_ids(taken, f"{interactions}: user {user!r}"))
    ]
    known = {item: _item(fields) for item, fields in described.items()}
    titled = {item: fields for item, fields in known.items() if fields.title}
    report = {
        "users": len(sequences),
        "interactions": len(rows),
        "items": len(known),
        "items without a title": len(known) - len(titled),
    }
    return SourceTables(pl.DataFrame(rows, schema=INTERACTIONS, orient="row"), items_frame(titled), report, [])


def _item(fields: Mapping[str, Any]) -> Item:
    names = filter(None, map(clean_text, category_names(fields.get("categories"))))
    return Item(
        clean_title(item_text(fields.get("title"))),
        clean_text(item_text(fields.get("description"))),
        clean_text(item_text(fields.get("brand"))),
        tuple(dict.fromkeys(names)),
    )
