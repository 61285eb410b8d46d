"""`gream data tasks|mix`: the SFT rows."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from gream_verl.cli.common import DEFAULT_DATA, DataOption, DatasetOption, HistoryOption, SeedOption, console, pairs
from gream_verl.cli.data import data_app
from gream_verl.core.errors import InputError
from gream_verl.pipeline.quickstart import DEFAULT_DATASET


class Chains(StrEnum):
    """Wordings of the chains that rules write."""

    notes = "notes"
    sentences = "sentences"


RowsOption = Annotated[
    list[str] | None,
    typer.Option(help="Rows of a task: TASK=COUNT, or TASK=40% of those that exist; a weight with --total. Repeat it."),
]
TotalOption = Annotated[int | None, typer.Option(min=1, help="Rows of all tasks together, shared by weight.")]
BlockOption = Annotated[int, typer.Option(min=1, help="Rows of one task that stay together: the batch a device.")]
TokenizerOption = Annotated[
    str | None, typer.Option(help="Tokenizer of the model, to shorten histories until every row fits --longest.")
]
LongestOption = Annotated[int, typer.Option(min=1, help="Tokens a row may have: the trainer's cutoff_len.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Count the rows, and write nothing.")]


@data_app.command()
def tasks(
    data: DataOption = DEFAULT_DATA,
    dataset: DatasetOption = DEFAULT_DATASET,
    rows: RowsOption = None,
    total: TotalOption = None,
    history: HistoryOption = 20,
    block: BlockOption = 16,
    tokenizer: TokenizerOption = None,
    longest: LongestOption = 2048,
    dry_run: DryRunOption = False,
    seed: SeedOption = 0,
) -> None:
    """Write the alignment tasks alone, without chains of thought: D-align.parquet. Default: every row that exists.

    Tasks: seqrec, item2index, index2item, fusionseqrec, itemsearch, preferenceobtain, itemfeatureobtain,
    historyreconstruction.
    """
    from data_processing.sft.tasks import REASONING, TASKS
    from gream_verl.core.data_folder import DataFolder

    folder = DataFolder(data, dataset)
    counts = _row_counts(rows) if rows else {task: 1.0 for task in TASKS if task != REASONING}
    if REASONING in counts:
        raise InputError("--rows reasoning: chains of thought are no alignment task; `gream data mix` has both")
    _write_sft(folder, folder.align, counts, total, history, block, tokenizer, longest, dry_run, seed)


@data_app.command()
def mix(
    data: DataOption = DEFAULT_DATA,
    dataset: DatasetOption = DEFAULT_DATASET,
    rows: RowsOption = None,
    total: TotalOption = None,
    history: HistoryOption = 20,
    block: BlockOption = 16,
    name: Annotated[str, typer.Option(help="Write D-NAME.parquet: another mix beside D-mix.parquet.")] = "mix",
    chains: Annotated[
        Chains, typer.Option(help="How rules word chains of thought: notes are short, sentences suit a real model.")
    ] = Chains.notes,
    tokenizer: TokenizerOption = None,
    longest: LongestOption = 2048,
    dry_run: DryRunOption = False,
    seed: SeedOption = 0,
) -> None:
    """Write the SFT mix, D-mix.parquet: alignment tasks and chains of thought (task reasoning), by the curriculum.

    Default: a mix for the tiny model. D-mix.png shows where the chains lie, and the lengths when there is a tokenizer.
    """
    from gream_verl.core.data_folder import DataFolder
    from gream_verl.pipeline.quickstart import TINY_MIX

    folder = DataFolder(data, dataset)
    counts: dict[str, int | float] = _row_counts(rows) if rows else {**TINY_MIX}
    output = folder.mix_of(name)
    _write_sft(folder, output, counts, total, history, block, tokenizer, longest, dry_run, seed, chains.value)


def _write_sft(
    folder: Any,
    output: Path,
    rows: dict[str, int | float],
    total: int | None,
    history: int,
    block: int,
    tokenizer: str | None,
    longest: int,
    dry_run: bool,
    seed: int,
    wording: str = "notes",
) -> None:
    from data_processing.sft.mix import write_mix

    limit = _length_limit(tokenizer, longest) if tokenizer else None
    report = write_mix(
        folder, rows=rows, seed=seed, total=total, history=history, block=block, limit=limit, dry_run=dry_run,
        output=output, wording=wording,
    )  # fmt: skip
    _print_rows("SFT rows" + (", not written" if dry_run else ""), report["tasks"], ("asked", "exist", "made"))
    if limit:
        _print_rows("Tokens of a row", report["tasks"], ("median", "95%", "longest", "shortened", "left out"))
    leaks = {kind: count for kind, count in report["leaks"].items() if kind != "rate"}
    if leaks:
        console.print(f"chains dropped because they name their target: {leaks} ({report['leaks']['rate']:.2%})")
    if not dry_run:
        console.print(f"{output}, its picture {output.stem}.png", highlight=False, soft_wrap=True)


def _print_rows(title: str, rows: dict[str, dict[str, float]], columns: tuple[str, ...]) -> None:
    table = Table("task", *(Column(name, justify="right") for name in columns), title=title, box=SIMPLE_HEAD)
    for task, values in rows.items():
        table.add_row(task, *(f"{values[column]:,.0f}" for column in columns))
    console.print(table)


def _length_limit(tokenizer: str, longest: int) -> Any:
    """Return a limit that counts the tokens of a whole conversation as the trainer does."""
    from transformers import AutoTokenizer

    from data_processing.sft.lengths import LengthLimit, token_counter

    try:
        loaded = AutoTokenizer.from_pretrained(tokenizer)
    except (OSError, ValueError) as error:
        raise InputError(f"--tokenizer {tokenizer}: cannot be loaded ({error})") from error
    return LengthLimit(token_counter(loaded), longest)


def _row_counts(rows: list[str]) -> dict[str, int | float]:
    """Read ``TASK=COUNT``, ``TASK=SHARE%`` and ``TASK=WEIGHT``."""
    counts: dict[str, int | float] = {}
    for task, value in pairs(rows, "--rows").items():
        number = value.removesuffix("%")
        try:
            counts[task] = float(number) / 100 if value != number else int(value) if value.isdigit() else float(value)
        except ValueError:
            raise InputError(
                f"--rows {task}={value}: expected TASK=COUNT or TASK=SHARE%, such as seqrec=10000 or seqrec=40%"
            ) from None
    return counts
