"""`gream sft`: the check before SFT by LLaMA-Factory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Typer

from gream_verl.cli.common import console, print_tasks
from gream_verl.core.errors import InputError

sft_app = Typer(help="Check SFT by LLaMA-Factory before it starts.", no_args_is_help=True)
Overrides = Annotated[list[str] | None, Argument(metavar="[KEY=VALUE]...", help="As after the config in the training.")]


@sft_app.callback()
def sft() -> None:
    """Make ``check`` a command of a group, although it is the only one."""


@sft_app.command()
def check(
    config: Annotated[Path, Argument(help="The config of the training, one of sft_configs/.")],
    overrides: Overrides = None,
) -> None:
    """Look for faults that silently ruin a training.

    Order of the rows, semantic IDs, template, lengths and old checkpoints. Nothing is written, no weights are loaded.
    """
    from data_processing.sft.check import check_config

    tasks, problems = check_config(config, overrides or ())
    print_tasks("SFT rows", tasks, ["rows", "tokens", "longest"])
    if problems:
        raise InputError("\n  ".join([f"{config}: not ready for training:", *problems]))
    console.print(f"{config}: OK", highlight=False, soft_wrap=True)
