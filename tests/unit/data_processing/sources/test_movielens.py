from __future__ import annotations

import zipfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from data_processing.sources import movielens
from data_processing.sources.movielens import read_movielens, readable_title
from data_processing.sources.wheels import Wheel

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ITEM = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Toy Story", "Toy Story"),
        ("Usual Suspects, The", "The Usual Suspects"),
        ("Good, The Bad and The Ugly, The", "The Good, The Bad and The Ugly"),
        ("Horseman on the Roof, The (Hussard sur le toit, Le)", "The Horseman on the Roof (Le Hussard sur le toit)"),
        ("Double vie, La (Double Life, The)", "La Double vie (The Double Life)"),
        ("Avventura, L'", "L'Avventura"),
        ("Fast, Cheap & Out of Control", "Fast, Cheap & Out of Control"),
        ("Paris, Texas", "Paris, Texas"),
        ("Corrina, Corrina", "Corrina, Corrina"),
    ],
)
def test_articles_come_first(title: str, expected: str) -> None:
    assert readable_title(title) == expected


def test_the_files_are_taken_from_the_wheel_then_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / movielens.RECBOLE.file
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{movielens.MEMBER}.inter", INTER + "1\t12\t5\t10\n")
        archive.writestr(f"{movielens.MEMBER}.item", ITEM + "12\tUsual Suspects, The\t1995\tCrime Thriller\n")
    changed = replace(movielens.RECBOLE, sha256=sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(movielens, "RECBOLE", changed)
    monkeypatch.setattr(Wheel, "fetch", lambda self, folder: wheel)
    first = read_movielens(tmp_path / "cache")
    assert first.items["title"].to_list() == ["The Usual Suspects"]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["ml-100k.inter", "ml-100k.item"]
    wheel.unlink()
    assert read_movielens(tmp_path / "cache").items.equals(first.items)
