"""The commands of ``gream`` that come after a training: evaluate, compare, report, inspect."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from gream_verl.cli.common import DEFAULT_DATA, DataOption, DatasetOption, Mode, SeedOption, console
from gream_verl.core.errors import InputError
from gream_verl.pipeline.quickstart import DEFAULT_DATASET, DEFAULT_RUN

evaluate_app = typer.Typer()


class Split(StrEnum):
    """Prompts to evaluate on: the interactions held out for validation or for the test."""

    val = "val"
    test = "test"


class Engine(StrEnum):
    """What generates chains of thought."""

    vllm = "vllm"
    hf = "hf"
    server = "server"


class Score(StrEnum):
    """What the probability of a SID token is a share of."""

    vocabulary = "vocabulary"
    items = "items"


class Ranking(StrEnum):
    """What is ranked in reasoning mode."""

    beam = "beam"
    answers = "answers"
    reference = "reference"


class Merge(StrEnum):
    """What the score of an item over several chains is."""

    mean = "mean"
    max = "max"


PROMPTS, RANKING, CHAINS = "Prompts", "Ranking", "Chains of thought (reasoning mode)"


@evaluate_app.command()
def evaluate(
    model: Annotated[Path, typer.Option(help="A checkpoint: a Hugging Face folder, or verl's folder of checkpoints.")],
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs") / DEFAULT_RUN / "evaluation",
    name: Annotated[str, typer.Option(help="Name of the results: NAME-direct.json, NAME-val-direct.json.")] = "model",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results there that are of other users or another protocol.")
    ] = False,
    data: DataOption = DEFAULT_DATA,
    dataset: DatasetOption = DEFAULT_DATASET,
    mode: Annotated[
        list[Mode] | None, typer.Option(help="Direct or reasoning; repeat it. Default: both (val: reasoning).")
    ] = None,
    seed: SeedOption = 0,
    split: Annotated[
        Split, typer.Option(rich_help_panel=PROMPTS, help="Which held-out interaction is to be found.")
    ] = Split.test,
    limit: Annotated[
        int | None, typer.Option(min=1, rich_help_panel=PROMPTS, help="Evaluate a seeded sample of this many users.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=PROMPTS,
            help="A parquet file of prompts, ours or the authors'. Default: D-test.parquet (D-val.parquet), "
            "or prompts made of D.inter.json where it is not there.",
        ),
    ] = None,
    history: Annotated[
        int | None,
        typer.Option(min=1, rich_help_panel=PROMPTS, help="Make the prompts, with this many latest items (else 20)."),
    ] = None,
    template: Annotated[
        str | None,
        typer.Option(rich_help_panel=PROMPTS, help="Make the prompts, with this user's turn; {history} in it."),
    ] = None,
    system: Annotated[
        str | None,
        typer.Option(rich_help_panel=PROMPTS, help='Make the prompts, with this system message, "" for none.'),
    ] = None,
    skip_missing: Annotated[
        bool,
        typer.Option(
            "--skip-missing",
            rich_help_panel=PROMPTS,
            help="Leave out users whose target is retired or has no semantic ID; the protocol says how many.",
        ),
    ] = False,
    beams: Annotated[
        int, typer.Option(min=0, rich_help_panel=RANKING, help="Beams of the search; 0: score free answers only.")
    ] = 30,
    score: Annotated[
        Score,
        typer.Option(rich_help_panel=RANKING, help="A token's probability is a share of: the vocabulary, or items."),
    ] = Score.vocabulary,
    drop_history: Annotated[
        bool,
        typer.Option(
            "--drop-history/--keep-history", rich_help_panel=RANKING, help="Never recommend what a user has seen."
        ),
    ] = True,
    cutoffs: Annotated[
        list[str] | None,
        typer.Option(rich_help_panel=RANKING, help="Lengths of lists to measure, beside 1, 5, 10, such as 20,50."),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(min=1, rich_help_panel=RANKING, help="Users computed at once: memory, not results.")
    ] = 64,
    shards: Annotated[
        int,
        typer.Option(
            min=1,
            rich_help_panel=RANKING,
            help="Workers, with Ray when above 1: one a GPU, or a core; RAY_ADDRESS names a running cluster.",
        ),
    ] = 1,
    engine: Annotated[
        Engine, typer.Option(rich_help_panel=CHAINS, help="What samples them; server: what answers at --endpoint.")
    ] = Engine.vllm,
    ranking: Annotated[
        Ranking,
        typer.Option(
            rich_help_panel=CHAINS,
            help="Rank items by a beam search behind each chain; or the sampled answers, by the answer given its chain "
            "(answers) or by the whole response, as the authors do (reference).",
        ),
    ] = Ranking.beam,
    merge: Annotated[
        Merge, typer.Option(rich_help_panel=CHAINS, help="An item's score over chains: mean probability, or the best.")
    ] = Merge.mean,
    constrained: Annotated[
        bool | None,
        typer.Option(
            "--constrained/--free",
            rich_help_panel=CHAINS,
            help="Whether sampled answers may only be real items. Default: with --ranking answers.",
        ),
    ] = None,
    chains: Annotated[int, typer.Option(min=1, rich_help_panel=CHAINS, help="Chains of thought a user.")] = 1,
    max_tokens: Annotated[
        int, typer.Option(min=1, rich_help_panel=CHAINS, help="Longest chain with its answer, in tokens.")
    ] = 256,
    temperature: Annotated[float, typer.Option(rich_help_panel=CHAINS, help="Of sampling, above 0.")] = 0.6,
    top_p: Annotated[float, typer.Option(rich_help_panel=CHAINS, help="Probability that sampling keeps.")] = 0.8,
    endpoint: Annotated[
        str | None,
        typer.Option(rich_help_panel=CHAINS, help="URL of an OpenAI-compatible server, http://127.0.0.1:8000/v1."),
    ] = None,
    served_model: Annotated[
        str | None, typer.Option(rich_help_panel=CHAINS, help="Name of the model there. Default: the only one.")
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, rich_help_panel=CHAINS, help="Requests under way at once there, for each shard.")
    ] = 64,
    timeout: Annotated[
        float, typer.Option(min=1, rich_help_panel=CHAINS, help="Seconds until a request is given up.")
    ] = 600.0,
) -> None:
    """Rank all items for every held-out interaction: Recall, NDCG, MRR, share of valid items, mean RSVR.

    The authors' files and checkpoints do as they are. Floors stand beside, and the protocol below each table.
    """
    from gream_verl.evaluation.prompts import MODES, types_of
    from gream_verl.evaluation.protocol import PromptSource
    from gream_verl.evaluation.run import evaluate_modes

    lengths = [length for text in cutoffs or () for length in text.split(",")]
    if not all(length.strip().isdecimal() and int(length) for length in lengths):
        raise InputError(f"--cutoffs {','.join(lengths)}: expected numbers of items, at least 1, such as 20,50")
    source = PromptSource(data, dataset, split.value, prompts, history, template, system, limit, seed, skip_missing)
    if mode:
        modes = tuple(one for one in MODES if one in mode)
    elif prompts is not None:
        modes = types_of(prompts)
    else:
        modes = ("reasoning",) if split is Split.val else MODES
    if not beams and Mode.direct in modes:
        raise InputError("--beams 0 goes with --mode reasoning only; direct mode is a beam search")
    search = {"beams": beams, "batch_size": batch_size, "score": score.value, "drop_history": drop_history,
              "shards": shards}  # fmt: skip
    sampling = {
        "engine": engine.value, "ranking": ranking.value, "merge": merge.value, "constrained": constrained,
        "chains": chains, "max_tokens": max_tokens, "temperature": temperature, "top_p": top_p,
        "endpoint": endpoint, "served_model": served_model, "concurrency": concurrency, "timeout": timeout,
    }  # fmt: skip
    evaluate_modes(
        model, source, output=output, name=name, modes=modes, search=search, sampling=sampling,
        cutoffs=[int(length) for length in lengths], overwrite=overwrite, console=console,
    )  # fmt: skip


@evaluate_app.command()
def baseline(
    model: Annotated[
        str, typer.Option(help="One of RecBole's sequential models: SASRec, GRU4Rec, BERT4Rec and others.")
    ] = "SASRec",
    output: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs") / DEFAULT_RUN / "evaluation",
    data: DataOption = DEFAULT_DATA,
    dataset: DatasetOption = DEFAULT_DATASET,
    epochs: Annotated[int | None, typer.Option(min=1, help="The most epochs. Default: 200.")] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="Stop training after the epoch in which these are over.")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A parameter of RecBole, such as hidden_size=128; repeat it."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Evaluate a seeded sample of this many users.")] = None,
    drop_history: Annotated[
        bool, typer.Option("--drop-history/--keep-history", help="Never recommend what a user has seen.")
    ] = True,
    skip_missing: Annotated[
        bool,
        typer.Option("--skip-missing", help="Leave out users whose target is retired or has no semantic ID."),
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option(help="A parquet file with the users, as for `gream evaluate`.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace results of other users or another protocol.")
    ] = False,
    python: Annotated[
        Path | None, typer.Option(help="Python of RecBole's environment. Default: that of `make recbole`.")
    ] = None,
    seed: SeedOption = 0,
) -> None:
    """Train SASRec by RecBole on the same split, and rank all items for the same users as `gream evaluate`."""
    from gream_verl.evaluation.protocol import PromptSource
    from gream_verl.evaluation.recbole_baseline import evaluate_baseline, read_parameters

    parameters = read_parameters(set_ or []) | ({} if epochs is None else {"epochs": epochs})
    source = PromptSource(data, dataset, file=prompts, limit=limit, seed=seed, skip_missing=skip_missing)
    evaluate_baseline(
        source, model=model, parameters=parameters, drop_history=drop_history, minutes=minutes, python=python,
        output=output, overwrite=overwrite, console=console,
    )  # fmt: skip


@evaluate_app.command()
def compare(
    results: Annotated[
        list[str],
        typer.Argument(metavar="RUN...", help="Runs, folders of evaluations, or files; NAME=PATH gives one a name."),
    ],
    output: Annotated[Path, typer.Option(help="Folder of compare.json and compare.svg.")] = Path("runs") / "compare",
    baseline: Annotated[
        str | None, typer.Option(help="Label of the result to compare the others with. Default: the first model.")
    ] = None,
    k: Annotated[int, typer.Option("--k", min=1, help="Length of the lists to measure.")] = 10,
    common_users: Annotated[
        bool, typer.Option("--common-users", help="Use only the users that all results have, with the same targets.")
    ] = False,
    seed: SeedOption = 0,
) -> None:
    """Compare runs over the same users: one table, one picture; intervals and p-values.

    Results of other users or of another protocol are shown, with a warning, but not tested against the baseline.
    """
    from gream_verl.evaluation import compare as comparing

    summary = comparing.compare(
        comparing.read_results(results), baseline=baseline, k=k, common_users=common_users, seed=seed
    )
    console.print(comparing.comparison_table(summary))
    comparing.write_comparison(output, summary)
    console.print(f"Kept in {output / 'compare.json'} and compare.svg", soft_wrap=True, highlight=False)


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
    from gream_verl.core.semantic_ids import ItemIndex
    from gream_verl.evaluation.inspection import read_rollouts, read_titles, rollout_table

    titles = read_titles(data / f"{dataset}.item.json")
    index = ItemIndex.load(data / f"{dataset}.index.json")
    console.print(rollout_table(read_rollouts(rollouts, index, titles), limit))
