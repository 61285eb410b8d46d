"""`gream data tasks|mix`: the SFT rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from data_processing.sft.rules import Wording
from gream_verl.cli.common import (
    DatasetOption,
    DryRunOption,
    HistoryOption,
    RunArgument,
    SeedOption,
    console,
    pairs,
    print_tasks,
)
from gream_verl.cli.data import data_app
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.run_folder import RunFolder

if TYPE_CHECKING:
    from data_processing.sft.lengths import LengthLimit
    from data_processing.sft.mix import MixOptions

RowsOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TASK=COUNT",
        help="Rows of a task: a number, or 40% of those that exist; a weight with --total. Repeat it.",
    ),
]
TotalOption = Annotated[int | None, typer.Option(min=1, help="Rows of all tasks together, shared by weight.")]
BlockOption = Annotated[int, typer.Option(min=1, help="Rows of one task that stay together: the batch per device.")]
TokenizerOption = Annotated[
    str | None, typer.Option(help="Tokenizer of the model, to shorten histories until every row fits --longest.")
]
LongestOption = Annotated[int, typer.Option(min=1, help="Longest row in tokens: the trainer's cutoff_len.")]


@data_app.command()
def tasks(
    run: RunArgument,
    rows: RowsOption = None,
    total: TotalOption = None,
    history: HistoryOption = 20,
    block: BlockOption = 16,
    tokenizer: TokenizerOption = None,
    longest: LongestOption = 2048,
    dry_run: DryRunOption = False,
    seed: SeedOption = 0,
    dataset: DatasetOption = None,
) -> None:
    """Write the alignment tasks alone: D-align.parquet.

    Default: every row that exists. Tasks: seqrec, item2index, index2item, fusionseqrec, itemsearch, preferenceobtain,
    itemfeatureobtain, historyreconstruction.
    """
    from data_processing.sft.mix import MixOptions
    from data_processing.sft.tasks import REASONING, TASKS

    counts = _row_counts(rows) or {task: 1.0 for task in TASKS if task != REASONING}
    if REASONING in counts:
        raise InputError("--rows reasoning: chains of thought are no alignment task; `gream data mix` has both")
    options = MixOptions(counts, seed, total, history, block, _length_limit(tokenizer, longest))
    folder = RunFolder.open(run, dataset).data
    _write(folder, options, folder.align, dry_run)


@data_app.command()
def mix(
    run: RunArgument,
    rows: RowsOption = None,
    total: TotalOption = None,
    history: HistoryOption = 20,
    block: BlockOption = 16,
    name: Annotated[str, typer.Option(help="Write D-NAME.parquet: another mix next to D-mix.parquet.")] = "mix",
    chains: Annotated[
        Wording, typer.Option(help="Chains of thought by rule: notes are short, sentences suit a pretrained model.")
    ] = "notes",
    tokenizer: TokenizerOption = None,
    longest: LongestOption = 2048,
    dry_run: DryRunOption = False,
    seed: SeedOption = 0,
    dataset: DatasetOption = None,
) -> None:
    """Write the SFT rows by the curriculum: D-mix.parquet.

    They are alignment tasks and chains of thought (task reasoning). Default: a mix for the tiny model. D-mix.png shows
    the share of chains. D-mix-eval-TASK.parquet are held-out rows.
    """
    from data_processing.sft.mix import TINY_MIX, MixOptions

    counts = _row_counts(rows) or dict(TINY_MIX)
    options = MixOptions(counts, seed, total, history, block, _length_limit(tokenizer, longest), chains)
    folder = RunFolder.open(run, dataset).data
    _write(folder, options, folder.mix_of(name), dry_run)


def _write(folder: DataFolder, options: MixOptions, output: Path, dry_run: bool) -> None:
    from data_processing.sft.mix import write_mix

    report = write_mix(folder, options, output, dry_run=dry_run)
    title = "SFT rows" + (", not written" if dry_run else "")
    print_tasks(title, report, ["asked", "exist", "made", "held out", "leaks"])
    if options.limit:
        print_tasks("Tokens of a row", report, ["longest", "shortened", "left out"])
    if not dry_run:
        console.print(f"{output}, its picture {output.stem}.png", highlight=False, soft_wrap=True)


def _length_limit(tokenizer: str | None, longest: int) -> LengthLimit | None:
    """Return a limit that counts the tokens of a whole conversation as the trainer does."""
    if tokenizer is None:
        return None
    from data_processing.sft.lengths import LengthLimit, token_counter
    from gream_verl.model.loading import load_tokenizer

    return LengthLimit(token_counter(load_tokenizer(tokenizer)), longest)


def _row_counts(rows: list[str] | None) -> dict[str, int | float]:
    """Read ``TASK=COUNT``, ``TASK=SHARE%`` and ``TASK=WEIGHT``."""
    counts: dict[str, int | float] = {}
    for task, value in pairs(rows, "--rows").items():
        number = value.removesuffix("%")
        try:
            counts[task] = float(number) / 100 if value != number else int(value) if value.isdigit() else float(value)
        except ValueError:
            raise InputError(f"--rows {task}={value}: expected a number or a share, such as seqrec=40%") from None
    return counts
