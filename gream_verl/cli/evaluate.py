"""The commands of ``gream`` that follow a training: evaluate, compare, report, inspect."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Group

from gream_verl.cli.common import DatasetOption, RunArgument, SeedOption, console
from gream_verl.core.errors import InputError
from gream_verl.core.rsvr import Mode
from gream_verl.core.run_folder import RunFolder

evaluate_app = typer.Typer()


@evaluate_app.command()
def evaluate(
    run: RunArgument,
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            metavar="[CHECKPOINT]",
            help="A Hugging Face folder, or verl's folder of checkpoints. Default: RUN/srpo, else RUN/sft.",
        ),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file with any of the options, see docs/evaluation.md.")
    ] = None,
    dataset: DatasetOption = None,
    mode: Annotated[Mode | None, typer.Option(help="One mode only. Default: both.")] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the results, NAME-MODE.json. Default: the checkpoint's folder.")
    ] = None,
    overwrite: Annotated[
        bool | None, typer.Option("--overwrite", help="Replace results of other users or another protocol.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Parquet file of prompts, ours or the authors'. Default: those of RUN.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Evaluate a seeded sample of this many users.")] = None,
    chains: Annotated[int | None, typer.Option(help="Chains of thought per user. Default: 1.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest response, in tokens. Default: 256.")] = None,
    beams: Annotated[int | None, typer.Option(help="Beams, and length of the lists. Default: 30.")] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="Sample chains by an OpenAI-compatible server, http://127.0.0.1:8000/v1.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random. Default: 0.")] = None,
) -> None:
    """Rank all items for every held-out interaction.

    It reports Recall, NDCG, MRR, the share of valid items and the mean RSVR. The authors' files and checkpoints work unchanged. Popularity and co-occurrence stand next to every result.
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
def compare(
    results: Annotated[
        list[str],
        typer.Argument(metavar="RESULT...", help="Runs, folders of results, or files; NAME=PATH gives one a name."),
    ],
    baseline: Annotated[
        str | None, typer.Option(help="Label of the result to compare the others with. Default: the first model.")
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Compare results over the same users.

    The table has intervals and p-values. Results of other users or of another protocol are shown, with a warning, and not tested.
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
def report(run: RunArgument, dataset: DatasetOption = None, seed: SeedOption = 0) -> None:
    """Write RUN/report.html and RUN/metrics.json."""
    from gream_verl.evaluation.report import write_report

    folder = RunFolder.open(run, dataset)
    console.print(write_report(folder, seed=seed))
    console.print(f"Report: {folder.report}", style="bold green", soft_wrap=True)


@evaluate_app.command()
def inspect(
    run: RunArgument,
    rollouts: Annotated[
        Path | None,
        typer.Option(help="A <step>.jsonl of verl, or its folder: the last step. Default: RUN/srpo/validation."),
    ] = None,
    dataset: DatasetOption = None,
    limit: Annotated[int, typer.Option(min=1, help="Number of the worst, and of the best.")] = 5,
) -> None:
    """Show the worst and the best rollouts and their rewards.

    Titles stand for semantic IDs.
    """
    from gream_verl.core.semantic_ids import ItemIndex
    from gream_verl.evaluation.inspection import read_rollouts, rollout_table

    folder = RunFolder.open(run, dataset)
    index = ItemIndex.load(folder.data.index)
    found = read_rollouts(rollouts or folder.srpo / "validation")
    console.print(rollout_table(found, limit, index, folder.data.titles()))
