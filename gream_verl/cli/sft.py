"""`gream sft`: what surrounds SFT by LLaMA-Factory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from gream_verl.cli.common import console, print_dict
from gream_verl.core.errors import InputError

sft_app = typer.Typer(help="SFT by LLaMA-Factory: before and after.", no_args_is_help=True)

ConfigArgument = Annotated[Path, typer.Argument(help="The config of the run, one of sft_configs/.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="As behind the config in the training.")
]


@sft_app.command()
def check(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
) -> None:
    """Look for what LLaMA-Factory does not say or says late: order, vocabulary, template, lengths, disk.

    Nothing is written, no weights are loaded. Give FORCE_TORCHRUN, NPROC_PER_NODE and NNODES as for the training.
    """
    from data_processing.sft.check import check_config
    from data_processing.sft.config import SftConfig

    found = check_config(SftConfig.read(config, overrides or ()))
    columns = ("rows", "tokens", "longest", "supervised")
    table = Table("task", *(Column(name, justify="right") for name in columns), box=SIMPLE_HEAD)
    for task, counts in found.tasks.items():
        table.add_row(task, *(f"{counts[column]:,}" for column in columns))
    if found.tasks:
        console.print(table)
    if found.facts:
        print_dict("Training", found.facts)
    for remark in found.remarks:
        console.print(remark, highlight=False, markup=False, soft_wrap=True)
    if found.problems:
        raise InputError("\n  ".join([f"{config}: to be mended before training:", *found.problems]))
    console.print(f"{config}: OK", highlight=False, soft_wrap=True)


@sft_app.command()
def report(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
) -> None:
    """Tell what a training did: loss by task, lengths, speed. Writes training.json and training_loss.png beside it.

    The loss by task needs `include_num_input_tokens_seen: non_padding` and `logging_steps: 1`, as in sft_configs/.
    """
    from data_processing.sft.config import SftConfig
    from data_processing.sft.training import LEGEND, report_training, summary, task_rows

    read = SftConfig.read(config, overrides or ())
    training = report_training(read)
    header, *rows = task_rows(training)
    table = Table(
        Column(header[0]),
        *(Column(name, justify="right") for name in header[1:]),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption=LEGEND,
    )
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for sentence in [summary(training), *training["remarks"]]:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    console.print(f"{read.output / 'training_loss.png'}, training.json", highlight=False, soft_wrap=True)
