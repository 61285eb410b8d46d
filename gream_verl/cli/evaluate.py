"""The commands of ``gream`` that follow a training: evaluate, compare, report, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.console import Group
from typer import Argument, Option, Typer

from gream_verl.cli.common import Config, Dataset, Run, Seed, console
from gream_verl.core.errors import InputError
from gream_verl.core.rsvr import Mode
from gream_verl.core.run_folder import RunFolder

evaluate_app = Typer()
CHECKPOINT = "A Hugging Face folder, or verl's folder of checkpoints. Default: RUN/srpo, else RUN/sft."
Results = Annotated[
    list[str], Argument(metavar="RESULT...", help="Runs, folders of results, or files; NAME=PATH gives one a name.")
]


@evaluate_app.command()
def evaluate(
    run: Run,
    checkpoint: Annotated[Path | None, Argument(metavar="CHECKPOINT", help=CHECKPOINT)] = None,
    config: Config = None,
    mode: Annotated[Mode | None, Option(help="One mode only. Default: both.")] = None,
    name: Annotated[str | None, Option(help="Name of the results. Default: that of CHECKPOINT.")] = None,
    overwrite: Annotated[bool | None, Option("--overwrite", help="Replace results of another protocol.")] = None,
    prompts: Annotated[Path | None, Option(help="Parquet of prompts. Default: those of RUN.")] = None,
    limit: Annotated[int | None, Option(help="Size of a seeded sample of users. Default: all.")] = None,
    chains: Annotated[int | None, Option(help="Chains of thought per user. Default: 1.")] = None,
    max_tokens: Annotated[int | None, Option(help="Longest response, in tokens. Default: 256.")] = None,
    beams: Annotated[int | None, Option(help="Beams, and length of the lists. Default: 30.")] = None,
    endpoint: Annotated[str | None, Option(help="OpenAI-compatible server that samples the chains.")] = None,
    seed: Annotated[int | None, Option(help="Seed of everything random. Default: 0.")] = None,
    dataset: Dataset = None,
) -> None:
    """Rank all items for every held-out interaction.

    It reports Recall, NDCG, MRR, the share of valid items and the mean RSVR, next to popularity and co-occurrence. The
    authors' files and checkpoints work unchanged. The YAML has every setting, see docs/evaluation.md.
    """
    from gream_verl.evaluation.options import read_options
    from gream_verl.evaluation.run import evaluate_run

    line = {
        "modes": (mode,) if mode else None, "name": name, "overwrite": overwrite, "prompts": prompts, "limit": limit,
        "chains": chains, "max_tokens": max_tokens, "beams": beams, "endpoint": endpoint,
        "engine": "server" if endpoint else None, "seed": seed,
    }  # fmt: skip
    options = read_options(config, line)
    console.print(evaluate_run(RunFolder.open(run, dataset), checkpoint, options))


@evaluate_app.command()
def floors(run: Run, config: Config = None, seed: Seed = 0, dataset: Dataset = None) -> None:
    """Measure popularity and co-occurrence, without a model.

    A prepared data set is enough. `gream evaluate` writes the same results beside those of a model.
    """
    from gream_verl.evaluation.options import read_options
    from gream_verl.evaluation.run import floors_of_run

    console.print(floors_of_run(RunFolder.open(run, dataset), read_options(config, {"seed": seed, "overwrite": True})))


@evaluate_app.command()
def compare(
    results: Results,
    baseline: Annotated[str | None, Option(help="Result to compare with. Default: the first model.")] = None,
    seed: Seed = 0,
) -> None:
    """Compare results over the same users.

    The table has intervals and p-values. Results of other users or of another protocol are shown, with a warning, and
    not tested.
    """
    from gream_verl.evaluation import compare as comparing

    found = comparing.read_results(results)
    label = baseline or next((name for name, one in found.items() if not one.is_baseline), next(iter(found)))
    if label not in found:
        raise InputError(f"--baseline {label}: no such result; there are {', '.join(found)}")
    differences = comparing.paired_differences(found, found[label], seed=seed)
    table = comparing.results_table(found, differences, label)
    console.print(Group(table, *comparing.warning_texts(found, label), comparing.protocol_table(found)))


@evaluate_app.command()
def report(run: Run, seed: Seed = 0, dataset: Dataset = None) -> None:
    """Write RUN/report.html and RUN/metrics.json."""
    from gream_verl.evaluation.report import write_report

    folder = RunFolder.open(run, dataset)
    console.print(write_report(folder, seed=seed))
    console.print(f"Report: {folder.report}", style="bold green", soft_wrap=True)


@evaluate_app.command()
def inspect(
    run: Run,
    rollouts: Annotated[Path | None, Option(help="A STEP.jsonl of verl, or its folder: the last step.")] = None,
    result: Annotated[str | None, Option(help="Lists of RUN/evaluation instead, such as srpo-direct.")] = None,
    limit: Annotated[int, Option(min=1, help="Number of the worst, and of the best.")] = 5,
    dataset: Dataset = None,
) -> None:
    """Show the worst and the best rollouts, or recommended lists.

    Titles stand for semantic IDs and ids. The default is RUN/srpo/validation.
    """
    from gream_verl.core.semantic_ids import ItemIndex
    from gream_verl.evaluation.inspection import list_table, read_rollouts, rollout_table
    from gream_verl.evaluation.results import Evaluation

    folder = RunFolder.open(run, dataset)
    titles = folder.data.titles()
    if result:
        console.print(list_table(Evaluation.load(folder.evaluation / f"{result}.json").rows, limit, titles))
        return
    index = ItemIndex.load(folder.data.index)
    console.print(rollout_table(read_rollouts(rollouts or folder.srpo / "validation"), limit, index, titles))
