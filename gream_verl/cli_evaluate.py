"""The commands of ``gream`` that come after a training: evaluate, compare, report, inspect."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gream_verl.cli_common import DEFAULT_DATA, DataOption, DatasetOption, Mode, SeedOption, console
from gream_verl.files import InputError
from gream_verl.quickstart import DEFAULT_DATASET, DEFAULT_RUN

evaluate_app = typer.Typer()


class Split(StrEnum):
    """Prompts to evaluate on: the interactions held out for validation or for the test."""

    val = "val"
    test = "test"


class Engine(StrEnum):
    """What generates chains of thought."""

    vllm = "vllm"
    hf = "hf"


@evaluate_app.command()
def evaluate(
    model: Annotated[Path, typer.Option(help="A checkpoint: a Hugging Face folder, or verl's folder of checkpoints.")],
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs") / DEFAULT_RUN / "evaluation",
    name: Annotated[str, typer.Option(help="Name of the results: NAME-direct.json and so on.")] = "model",
    data: DataOption = DEFAULT_DATA,
    dataset: DatasetOption = DEFAULT_DATASET,
    mode: Annotated[
        list[Mode] | None, typer.Option(help="Direct or reasoning; repeat it. Default: both (val: reasoning).")
    ] = None,
    split: Annotated[Split, typer.Option(help="Which held-out interaction is to be found.")] = Split.test,
    engine: Annotated[Engine, typer.Option(help="What generates the chains of thought.")] = Engine.vllm,
    beams: Annotated[int, typer.Option(min=0, help="Beams of the search; 0: score free answers only.")] = 30,
    chains: Annotated[int, typer.Option(min=1, help="Chains of thought a user.")] = 1,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest chain with its answer, in tokens.")] = 256,
    limit: Annotated[int | None, typer.Option(min=1, help="Evaluate a seeded sample of this many users.")] = None,
    seed: SeedOption = 0,
) -> None:
    """Rank all items for every held-out interaction: Recall, NDCG, MRR, share of valid items, mean RSVR."""
    from gream_verl.evaluation.run import evaluate_modes

    everything = [Mode.reasoning] if split is Split.val else list(Mode)
    modes = [chosen.value for chosen in mode or everything]
    if not beams and Mode.direct.value in modes:
        raise InputError("--beams 0 goes with --mode reasoning only; direct mode is a beam search")
    evaluate_modes(
        model, data=data, dataset=dataset, output=output, name=name, modes=modes, split=split.value,
        engine=engine.value, beams=beams, chains=chains, max_tokens=max_tokens, limit=limit, seed=seed, console=console,
    )  # fmt: skip


@evaluate_app.command()
def report(
    run: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs") / DEFAULT_RUN,
    dataset: DatasetOption = DEFAULT_DATASET,
) -> None:
    """Write report.html and metrics.json of a run."""
    from gream_verl.evaluation.run import report_run

    report_run(run, dataset)


@evaluate_app.command()
def inspect(
    rollouts: Annotated[
        Path, typer.Option(help="A <step>.jsonl of verl, or the folder of them: its last step.")
    ] = Path("runs") / DEFAULT_RUN / "srpo" / "validation",
    data: DataOption = DEFAULT_DATA,
    dataset: DatasetOption = DEFAULT_DATASET,
    limit: Annotated[int, typer.Option(min=1, help="How many of the worst, and of the best.")] = 5,
) -> None:
    """Show rollouts with their rewards, titles instead of semantic IDs: the worst first, then the best."""
    from gream_verl.evaluation.inspection import read_rollouts, read_titles, rollout_table
    from gream_verl.semantic_ids import ItemIndex

    titles = read_titles(data / f"{dataset}.item.json")
    index = ItemIndex.load(data / f"{dataset}.index.json")
    console.print(rollout_table(read_rollouts(rollouts, index, titles), limit))


@evaluate_app.command()
def learning(
    run: Annotated[Path, typer.Option(help="A finished quickstart.")] = Path("runs") / DEFAULT_RUN,
    dataset: DatasetOption = DEFAULT_DATASET,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds of SRPO, from 0.")] = 3,
) -> None:
    """Does SRPO improve on SFT? Mean RSVR of held-out validation prompts, several seeds, bootstrap intervals."""
    from gream_verl.learning import compare

    compare(run, dataset, seeds=seeds, console=console)
