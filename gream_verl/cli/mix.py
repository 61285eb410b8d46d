"""`gream data tasks|mix`: the SFT rows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from data_processing.sft.rules import Wording
from gream_verl.cli.common import Dataset, DryRun, History, Run, Seed, console, pairs, print_dict, print_tasks
from gream_verl.cli.data import data_app
from gream_verl.core.errors import InputError
from gream_verl.core.run_folder import RunFolder

if TYPE_CHECKING:
    from data_processing.sft.best_of import BestOf
    from data_processing.sft.lengths import LengthLimit
    from data_processing.sft.mix import MixOptions
    from gream_verl.core.data_folder import DataFolder

ROWS = "Rows of a task: a count, or 40% of those that exist; with --total a weight. May be repeated."
Rows = Annotated[list[str] | None, Option(metavar="TASK=COUNT", help=ROWS)]
Total = Annotated[int | None, Option(min=1, help="Rows of all tasks together, shared by weight.")]
Block = Annotated[int, Option(min=1, help="Rows of one task that stay together: the batch per device.")]
Tokenizer = Annotated[str | None, Option(help="Tokenizer or model; histories shrink to fit --longest.")]
BestOfK = Annotated[str | None, Option(metavar="K=MODEL", help="Of K chains per row, take the best for an SFT model.")]
Longest = Annotated[int | None, Option(min=1, help="Longest row in tokens: the trainer's cutoff_len. Default: 2048.")]


@data_app.command()
def tasks(
    run: Run,
    rows: Rows = None,
    total: Total = None,
    history: History = 20,
    block: Block = 16,
    tokenizer: Tokenizer = None,
    longest: Longest = None,
    dry_run: DryRun = False,
    seed: Seed = 0,
    dataset: Dataset = None,
) -> None:
    """Write the alignment tasks alone: D-align.parquet.

    Tasks: seqrec, window, continuation, item2index, index2item, fusionseqrec, itemsearch, preferenceobtain,
    itemfeatureobtain, historyreconstruction. Default: every row that exists.
    """
    from data_processing.sft.mix import MixOptions
    from data_processing.sft.tasks import REASONING, TASKS

    counts = _row_counts(rows) or {task: 1.0 for task in TASKS if task != REASONING}
    if REASONING in counts:
        raise InputError("--rows reasoning: chains of thought are no alignment task; use `gream data mix`")
    folder = RunFolder.open(run, dataset).data
    options = MixOptions(counts, seed, total, history, block, _length_limit(tokenizer, longest))
    _write(folder, options, folder.align, dry_run)


@data_app.command()
def mix(
    run: Run,
    rows: Rows = None,
    total: Total = None,
    history: History = 20,
    block: Block = 16,
    name: Annotated[str, Option(help="Name of the mix: D-NAME.parquet.")] = "mix",
    chains: Annotated[Wording, Option(help="Wording of chains by rule: short notes, or sentences.")] = "notes",
    tokenizer: Tokenizer = None,
    longest: Longest = None,
    best_of: BestOfK = None,
    dry_run: DryRun = False,
    seed: Seed = 0,
    dataset: Dataset = None,
) -> None:
    """Write the SFT rows by the curriculum: D-mix.parquet.

    It holds alignment tasks and chains of thought (task reasoning); by default a small mix for the tiny model.
    D-mix.png shows the share of chains. Held-out rows are in D-mix-eval-TASK.parquet.
    """
    from data_processing.sft.mix import TINY_MIX, MixOptions

    counts = _row_counts(rows) or dict(TINY_MIX)
    folder, limit = RunFolder.open(run, dataset).data, _length_limit(tokenizer, longest)
    options = MixOptions(counts, seed, total, history, block, limit, chains, _chooser(best_of))
    _write(folder, options, folder.mix_of(name), dry_run)


def _write(folder: DataFolder, options: MixOptions, output: Path, dry_run: bool) -> None:
    from data_processing.sft.mix import write_mix

    report = write_mix(folder, options, output, dry_run=dry_run)
    print_tasks("SFT rows", report, ["asked", "exist", "made", "held out", "leaks", "untrue"])
    if chosen := report.get("reasoning", {}).get("best of"):
        print_dict("Gain over the first chain", chosen)
    if options.limit:
        print_tasks("Tokens of a row", report, ["longest", "shortened", "left out"])
    said = "Not written" if dry_run else f"{output}, its picture {output.stem}.png"
    console.print(said, soft_wrap=True, markup=False)


def _length_limit(tokenizer: str | None, longest: int | None) -> LengthLimit | None:
    """Return a limit that counts the tokens of a whole conversation as the trainer does."""
    if tokenizer is None:
        if longest is not None:
            raise InputError("--longest goes with --tokenizer, which counts the tokens")
        return None
    from data_processing.sft.lengths import LengthLimit, token_counter
    from gream_verl.model.loading import load_tokenizer

    return LengthLimit(token_counter(load_tokenizer(tokenizer)), longest or 2048)


def _chooser(best_of: str | None) -> BestOf | None:
    """Read ``K=MODEL``: the choice among K chains by a model; None without one."""
    if best_of is None:
        return None
    ((candidates, judge),) = pairs([best_of], "--best-of").items()
    if not candidates.isdigit() or candidates == "0":
        raise InputError(f"--best-of {best_of}: expected a number of chains and a model, such as 4=runs/Beauty/sft")
    from data_processing.sft.best_of import BestOf
    from data_processing.sft.lengths import render_prompts
    from gream_verl.model.answer_judge import AnswerJudge
    from gream_verl.model.loading import resolve_model

    score, count = AnswerJudge(resolve_model(Path(judge))), int(candidates)
    return BestOf(lambda rows: score(render_prompts(score.tokenizer, rows), [row.assistant for row in rows]), count)


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
