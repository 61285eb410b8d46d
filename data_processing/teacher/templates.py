"""The prompts of the teacher: text files that a user may copy and edit."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

from gream_verl.core.errors import InputError
from gream_verl.core.files import require_file, write_text

DIVIDER = "---"
"""The line between the system's turn and the user's."""
FIELDS: Mapping[str, tuple[str, ...]] = {
    "item": ("title", "brand", "categories", "description", "reviews"),
    "user": ("history", "target"),
    "chain": ("history", "target"),
    "again": ("reason",),
}
"""What each prompt may be told, as ``$field``."""
NEEDED: Mapping[str, tuple[str, ...]] = {
    "item": ("title",),
    "user": ("history", "target"),
    "chain": ("history", "target"),
    "again": ("reason",),
}

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        system: The system's turn, "" for none.
        user: The user's turn, with ``$fields``.
    """

    system: str
    user: str

    def messages(self, **fields: str) -> Messages:
        """Return the conversation with the fields filled in; what a field holds is never read as a field itself."""
        turns = [("system", self.system), ("user", self.user)]
        return [{"role": role, "content": Template(text).substitute(fields)} for role, text in turns if text]


def read_prompts(folder: str | os.PathLike[str] | None = None) -> dict[str, Prompt]:
    """Read every prompt.

    Args:
        folder: Where the user's own lie; those of the package when None.

    Raises:
        InputError: When a file is missing, or has a field that is not known or lacks one that is needed.
    """
    if folder is None:
        return {name: _parse(name, _packaged(name)) for name in FIELDS}
    remedy = "write all of them with `gream data prompts FOLDER` and edit those"
    paths = {name: require_file(Path(folder) / f"{name}.txt", remedy) for name in FIELDS}
    return {name: _parse(name, _read(path), str(path)) for name, path in paths.items()}


def write_prompts(folder: str | os.PathLike[str]) -> list[Path]:
    """Write the package's prompts to a folder, to be edited; files that are there stay as they are."""
    paths = [Path(folder) / f"{name}.txt" for name in FIELDS]
    for name, path in zip(FIELDS, paths, strict=True):
        if not path.exists():
            write_text(path, _packaged(name))
    return paths


def _packaged(name: str) -> str:
    return files("data_processing.teacher").joinpath("prompts", f"{name}.txt").read_text(encoding="utf-8")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path}: not text in UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8"
        ) from error


def _parse(name: str, text: str, source: str = "") -> Prompt:
    place = source or f"{name}.txt"
    before, divider, after = text.strip().partition(f"\n{DIVIDER}\n")
    prompt = Prompt(before.strip(), after.strip()) if divider else Prompt("", before.strip())
    template = Template(f"{prompt.system}\n{prompt.user}")
    if not template.is_valid():
        raise InputError(f"{place}: a $ that begins no field; write $$ for a dollar sign")
    used = template.get_identifiers()
    for field in used:
        if field not in FIELDS[name]:
            near = difflib.get_close_matches(field, FIELDS[name], n=1)
            hint = f"did you mean ${near[0]}?" if near else f"there are ${', $'.join(FIELDS[name])}."
            raise InputError(f"{place}: field ${field} is not known; {hint} Write $$ for a dollar sign")
    if missing := [field for field in NEEDED[name] if field not in used]:
        raise InputError(f"{place}: field ${missing[0]} is missing; the teacher cannot answer without it")
    return prompt
