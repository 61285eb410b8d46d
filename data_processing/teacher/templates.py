"""The prompts of the teacher: text files that a user may copy and edit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

from gream_verl.core.errors import InputError
from gream_verl.core.files import require_file, write_text

OURS = Path(__file__).with_name("prompts")
DIVIDER = "\n---\n"  # between the system's turn and the user's
FIELDS: Mapping[str, tuple[str, ...]] = {
    "item": ("title", "brand", "categories", "description", "reviews"),
    "user": ("history", "target"),
    "chain": ("history", "target"),
    "again": ("reason",),
}
"""The ``$fields`` of each prompt. A prompt needs all of them; ``item`` needs only the title."""
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Prompt:
    """One prompt: the system's turn, "" for none, and the user's, with ``$fields``."""

    system: str
    user: str

    def messages(self, **fields: str) -> Messages:
        """Return the conversation with the fields filled in; a ``$`` in the value of a field stays as it is."""
        turns = [("system", self.system), ("user", self.user)]
        return [{"role": role, "content": Template(text).substitute(fields)} for role, text in turns if text]


def read_prompts(folder: str | os.PathLike[str] | None = None) -> dict[str, Prompt]:
    """Read and check every prompt of a folder, None for those of the package."""
    remedy = f"write all of them with `gream data prompts {folder}`"
    return {name: _read(require_file(Path(folder or OURS) / f"{name}.txt", remedy)) for name in FIELDS}


def write_prompts(folder: str | os.PathLike[str]) -> list[Path]:
    """Write the package's prompts to a folder, to be edited; existing files stay as they are."""
    paths = [Path(folder) / f"{name}.txt" for name in FIELDS]
    for path in paths:
        if not path.exists():
            write_text(path, (OURS / path.name).read_text(encoding="utf-8"))
    return paths


def _read(path: Path) -> Prompt:
    try:
        template = Template(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8; save it as UTF-8") from error
    known = set(FIELDS[path.stem])
    needed = {"title"} if path.stem == "item" else known
    if not template.is_valid():
        raise InputError(f"{path}: a $ that begins no field; write $$ for a dollar sign")
    if not needed <= (used := set(template.get_identifiers())) <= known:
        wrong = ", ".join(f"${field}" for field in sorted(used - known | needed - used))
        raise InputError(f"{path}: unknown or missing: {wrong}; the fields are ${', $'.join(FIELDS[path.stem])}")
    system, divider, user = template.template.strip().partition(DIVIDER)
    return Prompt(system.strip(), user.strip()) if divider else Prompt("", system.strip())
