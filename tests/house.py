"""The rule of the house: which room may import which, and how long a file may be. Run as a script by `make check`."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LONGEST_FILE = 350
MOST_LINES = 15_400
PREPARATION = {"gream_verl.core", "data_processing"}
MAY_IMPORT = {
    "gream_verl": set(),
    "gream_verl.core": {"gream_verl"},
    "gream_verl.cpu": {"gream_verl.core"},
    "gream_verl.plugin": {"gream_verl.core", "gream_verl.cpu", "gream_verl.decoding"},
    "gream_verl.model": {"gream_verl.core", "gream_verl"},
    "gream_verl.decoding": {"gream_verl.core"},
    "gream_verl.evaluation": {"gream_verl.core", "gream_verl.model", "gream_verl.decoding"},
    "gream_verl.serving": {"gream_verl.core", "gream_verl.model", "gream_verl.decoding"},
    "gream_verl.pipeline": {"gream_verl.core", "gream_verl"},
    "data_processing": {"gream_verl.core", "data_processing.sources"},
    "data_processing.sources": PREPARATION,
    "data_processing.indexing": PREPARATION,
    "data_processing.teacher": PREPARATION,
    "data_processing.sft": PREPARATION,
}
"""Rooms that a room may import besides itself. ``gream_verl.cli`` may import all of them; no room may import it."""


def python_files() -> list[Path]:
    """Return every module of the two packages."""
    return sorted(file for package in ("gream_verl", "data_processing") for file in (ROOT / package).rglob("*.py"))


def room_of(module: str) -> str:
    """Return the room of a module.

    >>> room_of("data_processing.sft.mix"), room_of("data_processing.rl"), room_of("gream_verl.core")
    ('data_processing.sft', 'data_processing', 'gream_verl.core')
    """
    package, *rest = module.split(".")
    return f"{package}.{rest[0]}" if rest and (ROOT / package / rest[0]).is_dir() else package


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Yield line and room of every import of our packages, also of those inside functions."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        rooms = {room_of(name) for name in names if name.partition(".")[0] in ("gream_verl", "data_processing")}
        yield from ((node.lineno, room) for room in sorted(rooms))


def climbing_imports() -> list[str]:
    """Return every import that goes against :data:`MAY_IMPORT`, as ``file:line: room imports room``."""
    found = []
    for file in python_files():
        path = file.relative_to(ROOT)
        room = room_of(".".join(path.with_suffix("").parts))
        for line, imported in imports(file):
            if room != "gream_verl.cli" and imported != room and imported not in MAY_IMPORT[room]:
                found.append(f"{path}:{line}: {room} imports {imported}")
    return found


def line_counts() -> dict[Path, int]:
    """Return the number of lines of every module."""
    return {file.relative_to(ROOT): len(file.read_text(encoding="utf-8").splitlines()) for file in python_files()}


def main() -> int:
    """Print the lines of each room; return 1 when a file is too long, an import climbs or there are too many lines."""
    counts = line_counts()
    rooms: Counter[str] = Counter()
    for file, lines in counts.items():
        rooms[room_of(".".join(file.with_suffix("").parts))] += lines
    for room, lines in sorted(rooms.items()):
        print(f"{lines:7,} {room}")
    print(f"{sum(rooms.values()):7,} lines, at most {MOST_LINES:,}")
    faults = climbing_imports()
    faults += [
        f"{file}: {lines} lines, at most {LONGEST_FILE}" for file, lines in counts.items() if lines > LONGEST_FILE
    ]
    print("\n".join(faults) or "no file is too long, no import climbs")
    return int(bool(faults) or sum(rooms.values()) > MOST_LINES)


if __name__ == "__main__":
    sys.exit(main())
