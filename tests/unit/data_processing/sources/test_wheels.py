from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from data_processing.sources.wheels import Wheel
from gream_verl.core.errors import InputError

WHEEL = Wheel("small-thing==1.0", "small_thing-1.0-py3-none-any.whl", "9c99" * 16)
has_pip = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0


def make_wheel(folder: Path) -> Path:
    wheel = folder / WHEEL.file
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("small/thing.txt", "content")
        archive.writestr(
            "small_thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: small-thing\nVersion: 1.0\n"
        )
        archive.writestr(
            "small_thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr("small_thing-1.0.dist-info/RECORD", "")
    return wheel


def test_a_wheel_with_another_hash_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected 9c999c999c99"):
        WHEEL.unpack(make_wheel(tmp_path), {"small/thing.txt": tmp_path / "out" / "thing.txt"})
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not has_pip, reason="this environment has no pip")
def test_real_pip_that_finds_no_wheel_or_a_wrong_one_ends_in_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(InputError, match=r"small-thing==1\.0: pip could not fetch it .*check the network"):
        WHEEL.fetch(tmp_path)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    (tmp_path / "links").mkdir()
    make_wheel(tmp_path / "links")
    with pytest.raises(InputError, match="gave a file with another hash"):
        WHEEL.fetch(tmp_path)
