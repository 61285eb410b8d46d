from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from data_processing.sources import movielens
from data_processing.sources.movielens import read_movielens, readable_title
from data_processing.sources.wheels import Wheel
from gream_verl.core.errors import InputError

INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
ITEM = "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
WHEEL = Wheel("small-thing==1.0", "small_thing-1.0-py3-none-any.whl", "9c99" * 16)
has_pip = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize(
    ("title", "expected"),
    [
        ("Toy Story", "Toy Story"),
        ("Good, The Bad and The Ugly, The", "The Good, The Bad and The Ugly"),
        ("Horseman on the Roof, The (Hussard sur le toit, Le)", "The Horseman on the Roof (Le Hussard sur le toit)"),
        ("Double vie, La (Double Life, The)", "La Double vie (The Double Life)"),
        ("Avventura, L'", "L'Avventura"),
        ("Fast, Cheap & Out of Control", "Fast, Cheap & Out of Control"),
        ("Paris, Texas", "Paris, Texas"),
    ],
)
def test_articles_come_first(title: str, expected: str) -> None:
    assert readable_title(title) == expected


def test_the_files_are_taken_from_the_wheel_then_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = tmp_path / "recbole.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{movielens.MEMBER}.inter", INTER + "1\t12\t5\t10\n")
        archive.writestr(f"{movielens.MEMBER}.item", ITEM + "12\tUsual Suspects, The\t1995\tCrime Thriller\n")
    monkeypatch.setattr(Wheel, "fetch", lambda self, folder: wheel)
    first = read_movielens(tmp_path / "cache")
    assert first.items.rows() == [("12", "The Usual Suspects", "Released in 1995.", "", ["Crime", "Thriller"])]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["ml-100k.inter", "ml-100k.item"]
    wheel.unlink()
    assert read_movielens(tmp_path / "cache").items.equals(first.items)


@pytest.mark.skipif(not has_pip, reason="this environment has no pip")
def test_real_pip_that_finds_a_wheel_with_another_hash_ends_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "links").mkdir()
    with zipfile.ZipFile(tmp_path / "links" / WHEEL.file, "w") as archive:
        info = "small_thing-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: small-thing\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    for name, value in {"NO_INDEX": "1", "CONFIG_FILE": os.devnull, "FIND_LINKS": str(tmp_path / "links")}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    with pytest.raises(InputError, match=r"small-thing==1\.0: pip did not fetch it \(ERROR: .*HASHES"):
        WHEEL.provide({"small/thing.txt": tmp_path / "thing.txt"})
    assert not (tmp_path / "thing.txt").exists()
