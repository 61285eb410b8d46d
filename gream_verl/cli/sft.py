"""`gream sft`: the check before SFT by LLaMA-Factory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from gream_verl.cli.common import console
from gream_verl.core.errors import InputError

sft_app = typer.Typer(help="SFT by LLaMA-Factory.", no_args_is_help=True)


@sft_app.callback()
def sft() -> None:
    """SFT by LLaMA-Factory."""


@sft_app.command()
def check(
    config: Annotated[Path, typer.Argument(help="The config of the training, one of sft_configs/.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As after the config in the training.")
    ] = None,
) -> None:
    """Look for faults that silently ruin a training: order, semantic IDs, template, lengths, old checkpoints.

    Nothing is written, no weights are loaded.
    """
    from data_processing.sft.check import check_config

    tasks, problems = check_config(config, overrides or ())
    columns = ("rows", "tokens", "longest")
    table = Table("task", *(Column(name, justify="right") for name in columns), box=SIMPLE_HEAD)
    for task, counts in tasks.items():
        table.add_row(task, *(f"{counts[column]:,}" for column in columns))
    console.print(table)
    if problems:
        raise InputError("\n  ".join([f"{config}: not ready for training:", *problems]))
    console.print(f"{config}: OK", highlight=False, soft_wrap=True)
