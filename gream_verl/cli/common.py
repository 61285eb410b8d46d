"""Options, console and printing that all commands of ``gream`` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gream_verl.core.errors import InputError

console = Console()

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of the run, such as runs/Beauty.")]
DatasetOption = Annotated[str | None, typer.Option("--dataset", help="Name of the data set, where RUN holds several.")]
HistoryOption = Annotated[int, typer.Option("--history", min=1, help="Longest history in a prompt, in items.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random: same seed, same bytes.")]


def print_dict(title: str, values: dict[str, Any]) -> None:
    """Print a dictionary as a table; nested ones with their keys joined."""
    table = Table(title=title, show_header=False, title_justify="left")
    for key, value in _flat(values):
        table.add_row(escape(key), f"{value:,.4g}" if isinstance(value, float) else escape(str(value)))
    console.print(table)


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in values.items():
        rows += _flat(value, f"{prefix}{key} ") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return rows


def pairs(given: list[str] | None, option: str) -> dict[str, str]:
    """Return what ``NAME=VALUE`` options say."""
    pairs = [one.partition("=") for one in given or []]
    if wrong := [name for name, equals, value in pairs if not (name and equals and value)]:
        raise InputError(f"{option} {wrong[0]!r}: expected NAME=VALUE")
    return {name: value for name, _, value in pairs}
