"""The `gream` command: parse, call, print. What it calls is imported only when it is called."""

from __future__ import annotations

import errno
import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from gream_verl.cli.common import DEFAULT_DATA, DataOption, DatasetOption, Mode, SeedOption, console, print_dict
from gream_verl.cli.evaluate import evaluate_app
from gream_verl.cli.index import index_app
from gream_verl.cli.model import model_app
from gream_verl.cli.sft import sft_app
from gream_verl.core.errors import InputError
from gream_verl.pipeline.quickstart import DEFAULT_DATASET, QuickstartOptions

STOPPED = 130
UNUSABLE_PLACE = (errno.ENOSPC, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EDQUOT)
app = typer.Typer(
    help="Generative reasoning recommendation (GREAM) on stock verl, vLLM and LLaMA-Factory.\n\n"
    "`gream quickstart` runs the whole pipeline on a machine without a GPU and prints every command it runs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
data_app = typer.Typer(help="Raw data to training text.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(index_app, name="index")
app.add_typer(model_app, name="model")
app.add_typer(sft_app, name="sft")
app.add_typer(evaluate_app)

HistoryOption = Annotated[int, typer.Option("--history", min=1, help="Longest history in a prompt, in items.")]


class Source(StrEnum):
    """Raw formats that can be read."""

    movielens = "movielens"
    recbole = "recbole"
    amazon2014 = "amazon2014"
    amazon2018 = "amazon2018"
    amazon2023 = "amazon2023"
    layout = "layout"
    table = "table"


AMAZON_OPTIONS, FILE_OPTIONS = ("--reviews", "--metadata", "--review-texts"), ("--inter", "--item")
SOURCE_OPTIONS = {
    Source.movielens: (),
    Source.recbole: FILE_OPTIONS,
    Source.amazon2014: AMAZON_OPTIONS,
    Source.amazon2018: AMAZON_OPTIONS,
    Source.amazon2023: AMAZON_OPTIONS,
    Source.layout: FILE_OPTIONS,
    Source.table: (*FILE_OPTIONS, "--column"),
}
"""Which options go with a source."""


class Holdout(StrEnum):
    """Ways to hold out validation and test."""

    leave_one_out = "leave-one-out"
    temporal = "temporal"


class Written(StrEnum):
    """What a teacher can write."""

    items = "items"
    users = "users"
    chains = "chains"


class Chains(StrEnum):
    """Wordings of the chains that rules write."""

    notes = "notes"
    sentences = "sentences"


class Structure(StrEnum):
    """How a server is told the form of an answer."""

    json_schema = "json_schema"
    json_object = "json_object"
    none = "none"


class Trained(StrEnum):
    """What the quickstart trains."""

    tiny = "tiny"
    smollm2 = "smollm2"


class Rollout(StrEnum):
    """What generates SRPO's rollouts."""

    vllm = "vllm"
    hf_cpu = "hf_cpu"


def main() -> None:
    """Run the command; what the user can mend is one sentence, not a traceback."""
    try:
        app()
    except InputError as error:
        _fail(str(error))
    except ModuleNotFoundError as error:
        _fail(f"{error.name} is not installed; pip install 'gream-verl[pipeline,cpu]', or run `make env` in a clone")
    except OSError as error:
        if error.errno not in UNUSABLE_PLACE:
            raise
        _fail(f"{error.filename or 'the output folder'}: {error.strerror}; free some space or choose another folder")
    except SystemExit as error:
        if error.code == STOPPED:  # what typer makes of Ctrl-C
            Console(stderr=True).print("gream: stopped; call it again to go on", style="red")
        raise


def _fail(sentence: str) -> NoReturn:
    Console(stderr=True).print(f"gream: {sentence}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(1)


@app.command()
def quickstart(
    model: Annotated[
        Trained, typer.Option(help="A tiny model, or SmolLM2-135M-Instruct, pretrained (an hour).")
    ] = Trained.tiny,
    name: Annotated[
        str | None, typer.Option(help="The run: everything is kept in runs/NAME. Default: quickstart or pretrained.")
    ] = None,
    source: Annotated[Source, typer.Option(help="Where the data come from.")] = Source.movielens,
    reviews: Annotated[Path | None, typer.Option(help="Amazon: reviews (JSON lines), or ratings (.csv).")] = None,
    metadata: Annotated[Path | None, typer.Option(help="Amazon: metadata of the items.")] = None,
    rollout: Annotated[Rollout, typer.Option(help="Engine of SRPO's rollouts; hf_cpu is lighter.")] = Rollout.vllm,
    seed: SeedOption = 0,
) -> None:
    """The whole pipeline: data, item index, SFT, SRPO, evaluation, report.

    Finished steps are kept: call it again after a stop, and it goes on.
    """
    from gream_verl.pipeline.quickstart import steps
    from gream_verl.pipeline.steps import Pipeline

    options = QuickstartOptions(model.value, name, source.value, reviews, metadata, rollout.value, seed)
    results = Pipeline(options.folder, console).run(steps(options))
    _print_result(options.folder)
    seconds = sum(result.seconds for result in results.values() if not result.reused)
    memory = max(result.memory for result in results.values())
    console.print(f"\n{seconds / 60:.1f} minutes of work, {memory / 2**30:.1f} GiB of memory at most")
    console.print(f"Report: {options.folder / 'report.html'}", style="bold green", soft_wrap=True)


@app.command()
def doctor() -> None:
    """Say what is installed, what verl has loaded and whether a GPU is seen; fail with a remedy for what is missing."""
    from gream_verl.cli.doctor import examine

    findings = examine()
    table = Table("", "subject", "found", title="gream doctor")
    for finding in findings:
        table.add_row("[green]ok" if finding.ok else "[red]missing", finding.subject, finding.detail)
    console.print(table)
    faults = [finding for finding in findings if not finding.ok]
    if faults:
        raise InputError("\n".join(f"{fault.subject}: {fault.detail}; {fault.remedy}" for fault in faults))


@data_app.command()
def prepare(
    source: Annotated[Source, typer.Option(help="Raw format.")] = Source.movielens,
    reviews: Annotated[Path | None, typer.Option(help="Amazon: reviews (JSON lines), or ratings (.csv).")] = None,
    metadata: Annotated[Path | None, typer.Option(help="Amazon: metadata of the items.")] = None,
    inter: Annotated[
        Path | None, typer.Option(help="RecBole: the .inter file. Layout: D.inter.json. Table: .parquet, .csv or .tsv.")
    ] = None,
    item: Annotated[
        Path | None, typer.Option(help="RecBole: the .item file. Layout: D.item.json. Table: .parquet, .csv or .tsv.")
    ] = None,
    column: Annotated[
        list[str] | None, typer.Option(help="Table: a column of another name, such as user=customer; repeat it.")
    ] = None,
    core: Annotated[int, typer.Option(min=1, help="Least interactions of every user and item.")] = 5,
    split: Annotated[
        Holdout, typer.Option(help="Hold out the last two of every user, or what comes after two moments for all.")
    ] = Holdout.leave_one_out,
    validation_share: Annotated[float, typer.Option(help="Of the interactions, with --split temporal.")] = 0.1,
    test_share: Annotated[float, typer.Option(help="The latest interactions, with --split temporal.")] = 0.1,
    review_texts: Annotated[
        int, typer.Option(min=0, help="Amazon: reviews to keep of every item, for `gream data enrich items`.")
    ] = 0,
    bad_rows: Annotated[
        float, typer.Option(min=0, max=1, help="Share of rows that cannot be used above which the run stops.")
    ] = 0.05,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and count, and write nothing.")] = False,
    data: DataOption = DEFAULT_DATA,
    dataset: DatasetOption = DEFAULT_DATASET,
) -> None:
    """Read raw data, keep the k-core, put every user's items in time order: D.inter.json and D.item.json.

    D.report.json says what was read, dropped and kept, D.rejects.jsonl shows the rows that could not be used.
    """
    from data_processing.interactions import TimeSplit
    from data_processing.interactions import prepare as prepare_tables
    from gream_verl.core.data_folder import DataFolder

    folder = DataFolder(data, dataset)
    given = {
        "--reviews": reviews,
        "--metadata": metadata,
        "--inter": inter,
        "--item": item,
        "--column": column,
        "--review-texts": review_texts,
    }
    for option, value in given.items():
        if value and option not in SOURCE_OPTIONS[source]:
            raise InputError(f"{option}: does not go with --source {source.value}")
    for path in (reviews, metadata, inter, item):
        if path is not None and path.resolve() in (folder.inter.resolve(), folder.item.resolve()):
            raise InputError(f"{path}: would be overwritten; choose another folder with --data")
    parts = TimeSplit(validation_share, test_share) if split is Holdout.temporal else None
    if parts and source is Source.layout:
        raise InputError("--split temporal does not go with --source layout, whose files hold no times")
    tables = _read_source(source, reviews, metadata, inter, item, column, data, bad_rows)
    print_dict("Data", prepare_tables(tables, folder, core=core, split=parts, dry_run=dry_run))
    if review_texts and reviews and not dry_run:
        _keep_reviews(source, reviews, folder, review_texts, bad_rows)


def _keep_reviews(source: Source, reviews: Path, folder: Any, per_item: int, bad_rows: float) -> None:
    from data_processing.interactions import training_pairs
    from data_processing.sources.reviews import read_review_texts
    from gream_verl.core.files import atomic_path

    year = int(source.value.removeprefix("amazon"))
    texts = read_review_texts(year, reviews, training_pairs(folder), per_item=per_item, bad_rows=bad_rows)
    with atomic_path(folder.reviews) as path:
        texts.write_parquet(path)
    console.print(f"{len(texts):,} reviews of {texts['item'].n_unique():,} items kept for the teacher")


def _read_source(
    source: Source,
    reviews: Path | None,
    metadata: Path | None,
    inter: Path | None,
    item: Path | None,
    columns: list[str] | None,
    data: Path,
    bad_rows: float,
) -> Any:
    if source is Source.movielens:
        from data_processing.sources.movielens import read_movielens

        return read_movielens(data.parent / "raw")
    if source.value.startswith("amazon"):
        from data_processing.sources.amazon import read_amazon

        year = int(source.value.removeprefix("amazon"))
        files = _needed(reviews, source, "--reviews"), _needed(metadata, source, "--metadata")
        return read_amazon(year, *files, bad_rows=bad_rows)
    files = _needed(inter, source, "--inter"), _needed(item, source, "--item")
    if source is Source.table:
        from data_processing.sources.table import read_table

        return read_table(*files, _pairs(columns, "--column"), bad_rows=bad_rows)
    if source is Source.layout:
        from data_processing.sources.layout_files import read_layout

        return read_layout(*files)
    from data_processing.sources.recbole import read_recbole

    return read_recbole(*files, bad_rows=bad_rows)


def _pairs(given: list[str] | None, option: str) -> dict[str, str]:
    """Return what ``NAME=VALUE`` options say."""
    pairs = [one.partition("=") for one in given or []]
    if wrong := [name for name, equals, value in pairs if not (name and equals and value)]:
        raise InputError(f"{option} {wrong[0]!r}: expected NAME=VALUE")
    return {name: value for name, _, value in pairs}


def _needed(path: Path | None, source: Source, option: str) -> Path:
    if path is None:
        raise InputError(f"--source {source.value} needs {option} FILE")
    return path


@data_app.command()
def stats(data: DataOption = DEFAULT_DATA, dataset: DatasetOption = DEFAULT_DATASET) -> None:
    """Print the numbers by which data sets are compared: users, items, interactions, sparsity, lengths."""
    from data_processing.interactions import statistics
    from gream_verl.core.data_folder import DataFolder

    folder = DataFolder(data, dataset)
    print_dict(dataset, statistics(folder.read_inter(folder.read_items())))


@data_app.command()
def enrich(
    what: Annotated[
        Written,
        typer.Argument(
            help="Descriptions of items, tastes and searches of users, or chains of thought.", metavar="WHAT"
        ),
    ],
    model: Annotated[str, typer.Option(help="The teacher: a model, as the server calls it.")],
    endpoint: Annotated[
        list[str], typer.Option(help="Base URL of a server that speaks the OpenAI API; repeat it for several.")
    ],
    data: DataOption = DEFAULT_DATA,
    dataset: DatasetOption = DEFAULT_DATASET,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Ask about a seeded sample of so many. Default: all.")
    ] = None,
    history: HistoryOption = 20,
    prompts: Annotated[
        Path | None, typer.Option(help="Folder of your own prompts, see `gream data prompts`. Default: ours.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the estimate and ask nothing.")] = False,
    budget_tokens: Annotated[
        int | None, typer.Option(min=1, help="Most tokens, prompts and answers, all runs of this data set together.")
    ] = None,
    budget_money: Annotated[
        float | None, typer.Option(min=0, help="Most money, all runs of this data set together; needs --price.")
    ] = None,
    price: Annotated[
        str, typer.Option(help="Money for a million tokens of prompt and of answer, as 0.15/0.60.")
    ] = "0/0",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests under way at once, over all endpoints.")] = 32,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds until an attempt is given up.")] = 120.0,
    attempts: Annotated[int, typer.Option(min=1, help="Attempts for a request that a server fails to answer.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Times a question is asked until an answer can be used.")] = 3,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="Of the teacher's sampling.")] = 0.7,
    structure: Annotated[
        Structure, typer.Option(help="How the server is told the form of an answer; none: by the prompt alone.")
    ] = Structure.json_schema,
    extra: Annotated[
        str | None,
        typer.Option(
            help='More fields of a request, as JSON: \'{"chat_template_kwargs": {"enable_thinking": false}}\'.'
        ),
    ] = None,
    key_variable: Annotated[str, typer.Option(help="Environment variable that holds the API key.")] = "OPENAI_API_KEY",
    seed: SeedOption = 0,
) -> None:
    """Let a language model write: D.enriched.json (items), D.user.json (users) or D-chains.parquet (chains).

    Later steps use what is there; without it, rules write. Every answer is kept in D.teacher.jsonl: call it again after
    a stop, and only what is missing is asked.
    """
    from data_processing.teacher.asking import Settings, read_extra
    from data_processing.teacher.budget import Budget, Price
    from data_processing.teacher.client import Connection
    from data_processing.teacher.enrich import Enricher, describe
    from gream_verl.core.data_folder import DataFolder

    settings = Settings(model, max_tokens, temperature, structure.value, rounds, read_extra(extra))
    key = os.environ.get(key_variable, "").strip()
    connection = Connection(tuple(endpoint), key_variable, key, concurrency, timeout, attempts)
    budget = Budget(budget_tokens, budget_money, Price.parse(price))
    enricher = Enricher(DataFolder(data, dataset), what.value, settings, prompts, limit, history, seed)
    print_dict("To ask, before any answer has to be asked again", vars(enricher.estimate(budget)))
    if dry_run:
        return
    made = enricher.run(connection, budget, console)
    print_dict(f"The teacher's {what.value}", describe(made, budget))
    if made.asked.budget_spent:
        console.print("The budget is spent; call it again with a larger one, and it goes on.", style="yellow")


@data_app.command()
def prompts(folder: Annotated[Path, typer.Argument(help="Where to write them; files that are there stay.")]) -> None:
    """Write the teacher's prompts to a folder, to be edited and given to `gream data enrich --prompts`."""
    from data_processing.teacher.templates import write_prompts

    for path in write_prompts(folder):
        console.print(str(path), soft_wrap=True, highlight=False)


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
    for task, value in _pairs(rows, "--rows").items():
        number = value.removesuffix("%")
        try:
            counts[task] = float(number) / 100 if value != number else int(value) if value.isdigit() else float(value)
        except ValueError:
            raise InputError(
                f"--rows {task}={value}: expected TASK=COUNT or TASK=SHARE%, such as seqrec=10000 or seqrec=40%"
            ) from None
    return counts


@data_app.command()
def rl(
    data: DataOption = DEFAULT_DATA,
    dataset: DatasetOption = DEFAULT_DATASET,
    rl_rows: Annotated[int | None, typer.Option(min=1, help="Keep a seeded sample of the RL prompts.")] = None,
    mode: Annotated[Mode, typer.Option(help="What SRPO asks for; direct goes to D-rl-direct.parquet.")] = (
        Mode.reasoning
    ),
    history: HistoryOption = 20,
    seed: SeedOption = 0,
) -> None:
    """Write the prompts of SRPO, of its validation and of the evaluation: D-rl, D-val and D-test.parquet."""
    from data_processing.rl import write_prompts
    from gream_verl.core.data_folder import DataFolder

    made = write_prompts(DataFolder(data, dataset), seed=seed, mode=mode.value, history=history, rl_rows=rl_rows)
    print_dict("Prompts", made)


def _print_result(folder: Path) -> None:
    from gream_verl.core.files import read_json
    from gream_verl.evaluation.report import render_table

    console.print(render_table(read_json(folder / "metrics.json")))


if __name__ == "__main__":
    main()
