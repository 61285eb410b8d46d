"""The prompts of the teacher: text files that a user may copy and edit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

from gream_verl.core.errors import InputError
from gream_verl.core.files import require_file, write_text

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
    """Read every prompt from a folder, None for those of the package.

    Raises:
        InputError: When a file is missing, is not UTF-8, or has an unknown field or lacks one.
    """
    if folder is None:
        return {name: _parse(name, _packaged(name), name) for name in FIELDS}
    remedy = f"write all of them with `gream data prompts {folder}`"
    paths = {name: require_file(Path(folder) / f"{name}.txt", remedy) for name in FIELDS}
    try:
        return {name: _parse(name, path.read_text(encoding="utf-8-sig"), str(path)) for name, path in paths.items()}
    except UnicodeDecodeError as error:
        raise InputError(f"{folder}: a prompt is not UTF-8 ({error.object[:40]!r}...); save it as UTF-8") from error


def write_prompts(folder: str | os.PathLike[str]) -> list[Path]:
    """Write the package's prompts to a folder, to be edited; existing files stay as they are."""
    paths = {name: Path(folder) / f"{name}.txt" for name in FIELDS}
    for name, path in paths.items():
        if not path.exists():
            write_text(path, _packaged(name))
    return list(paths.values())


def _packaged(name: str) -> str:
    return files("data_processing.teacher").joinpath("prompts", f"{name}.txt").read_text(encoding="utf-8")


def _parse(name: str, text: str, source: str) -> Prompt:
    template, known = Template(text), set(FIELDS[name])
    needed = {"title"} if name == "item" else known
    if not template.is_valid():
        raise InputError(f"{source}: a $ that begins no field; write $$ for a dollar sign")
    if not needed <= (used := set(template.get_identifiers())) <= known:
        wrong = ", ".join(f"${field}" for field in sorted(used - known | needed - used))
        raise InputError(f"{source}: unknown or missing: {wrong}; the fields are ${', $'.join(FIELDS[name])}")
    system, divider, user = text.strip().partition(DIVIDER)
    return Prompt(system.strip(), user.strip()) if divider else Prompt("", system.strip())
