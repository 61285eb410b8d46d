"""Options, console and printing that all commands of ``gream`` share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from typer import Argument, Option

from gream_verl.core.errors import InputError

console = Console()

Run = Annotated[Path, Argument(metavar="RUN", help="Folder of the run, such as runs/Beauty.")]
Config = Annotated[Path | None, Option("--config", "-c", help="YAML with more settings, see docs/. Options win.")]
Dataset = Annotated[str | None, Option("--dataset", help="Name of the data set, where RUN holds several.")]
History = Annotated[int, Option("--history", min=1, help="Longest history in a prompt, in items.")]
Seed = Annotated[int, Option("--seed", min=0, help="Seed of everything random: same seed, same bytes.")]
DryRun = Annotated[bool, Option("--dry-run", help="Count, and write nothing.")]


def print_dict(title: str, values: Mapping[str, Any]) -> None:
    """Print a dictionary as a table; nested ones with their keys joined."""
    table = Table(title=title, show_header=False, title_justify="left")
    for key, value in _flat(values):
        table.add_row(escape(key), f"{value:,.4g}" if isinstance(value, float) else escape(str(value)))
    console.print(table)


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        rows += _flat(value, f"{prefix}{key} ") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return rows


def print_tasks(title: str, tasks: Mapping[str, Mapping[str, int]], columns: Sequence[str]) -> None:
    """Print counts of SFT rows: a row per task, a column for each of ``columns``."""
    table = Table("task", *(Column(name, justify="right") for name in columns), title=title, box=SIMPLE_HEAD)
    for task, counts in tasks.items():
        table.add_row(task, *(f"{counts[column]:,}" for column in columns))
    console.print(table)


def pairs(given: Sequence[str] | None, option: str) -> dict[str, str]:
    """Read the values of an option of the form ``NAME=VALUE``."""
    made = [one.partition("=") for one in given or ()]
    if wrong := [name for name, equals, value in made if not (name and equals and value)]:
        raise InputError(f"{option} {wrong[0]!r}: expected NAME=VALUE")
    found = {name: value for name, _, value in made}
    if len(found) < len(made):
        raise InputError(f"{option}: a name is given twice among {', '.join(given or ())}; give each once")
    return found
