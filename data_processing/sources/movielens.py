"""MovieLens-100K, out of the RecBole wheel.

MovieLens may not be redistributed, so the project carries none of it. The wheel is fetched from the package index of
pip, checked against its hash, and never installed.
"""

from __future__ import annotations

import re
from pathlib import Path

from data_processing.sources.common import SourceTables
from data_processing.sources.recbole import read_recbole
from data_processing.sources.wheels import Wheel

RECBOLE = Wheel(
    "recbole==1.2.1",
    "recbole-1.2.1-py3-none-any.whl",
    "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
)
MEMBER = "recbole/dataset_example/ml-100k/ml-100k"

_ARTICLES = "The|A|An|Le|La|Les|L'|Il|Lo|I|El|Los|Las|Der|Die|Das|Det|Den|O|Os"
_TRAILING_ARTICLE = re.compile(rf"([^()]+), ({_ARTICLES})(?=\s*(?:[()]|$))")


def read_movielens(cache: Path, *, least_rating: float | None = None) -> SourceTables:
    """Fetch MovieLens-100K if the folder ``cache`` does not hold it, and read it."""
    interactions, items = (cache / f"ml-100k.{kind}" for kind in ("inter", "item"))
    RECBOLE.provide({f"{MEMBER}.inter": interactions, f"{MEMBER}.item": items})
    return read_recbole(interactions, items, rewrite_title=readable_title, least_rating=least_rating)


def readable_title(title: str) -> str:
    """Put the article of a catalogue title where a reader expects it.

    >>> readable_title("Usual Suspects, The"), readable_title("Avventura, L'")
    ('The Usual Suspects', "L'Avventura")
    """
    return _TRAILING_ARTICLE.sub(r"\2 \1", title.strip()).replace("L' ", "L'")
