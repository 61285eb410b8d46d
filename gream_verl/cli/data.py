"""`gream data prepare|stats|rl`: raw data to the files of a run, and the prompts of SRPO."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gream_verl.cli.common import (
    DatasetOption,
    HistoryOption,
    RunArgument,
    SeedOption,
    console,
    pairs,
    print_dict,
)
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.rsvr import Mode
from gream_verl.core.run_folder import RunFolder

if TYPE_CHECKING:
    from data_processing.sources.common import SourceTables

data_app = typer.Typer(help="Raw data to training text.", no_args_is_help=True)

Source = Literal["movielens", "recbole", "amazon2014", "amazon2018", "amazon2023", "layout", "table"]
OPTIONS: dict[str, tuple[str, ...]] = {
    "movielens": (),
    "recbole": ("--inter", "--item"),
    "amazon": ("--reviews", "--metadata"),
    "layout": ("--inter", "--item"),
    "table": ("--inter", "--item"),
}
"""Files that each source needs; no other file goes with it."""
MOVIELENS = "ml-100k"

Column = Annotated[
    list[str] | None,
    typer.Option("--column", help="Table: a column of another name, such as user=customer; repeat it."),
]
BadRows = Annotated[
    float, typer.Option(min=0, max=1, help="Largest share of rows that cannot be used before the run stops.")
]


@data_app.command()
def prepare(
    run: RunArgument,
    source: Annotated[Source, typer.Option(help="Format of the raw data.")],
    reviews: Annotated[Path | None, typer.Option(help="Amazon: reviews (JSON lines), or ratings (.csv).")] = None,
    metadata: Annotated[Path | None, typer.Option(help="Amazon: metadata of the items.")] = None,
    inter: Annotated[
        Path | None, typer.Option(help="RecBole: the .inter file. Layout: D.inter.json. Table: .parquet, .csv or .tsv.")
    ] = None,
    item: Annotated[
        Path | None, typer.Option(help="RecBole: the .item file. Layout: D.item.json. Table: .parquet, .csv or .tsv.")
    ] = None,
    column: Column = None,
    core: Annotated[int, typer.Option(min=1, help="Least interactions of every user and item.")] = 5,
    split: Annotated[
        Literal["leave-one-out", "temporal"],
        typer.Option(help="Hold out the last two of every user, or the interactions after two moments."),
    ] = "leave-one-out",
    validation_share: Annotated[float, typer.Option(help="Share of the interactions, for --split temporal.")] = 0.1,
    test_share: Annotated[float, typer.Option(help="Share of the latest ones, for --split temporal.")] = 0.1,
    review_texts: Annotated[
        int, typer.Option(min=0, help="Amazon: reviews of every item to keep for `gream data enrich`.")
    ] = 0,
    bad_rows: BadRows = 0.05,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and count, and write nothing.")] = False,
    dataset: Annotated[
        str | None, typer.Option(help="Name of the data set, D in file names; RUN's own name by default.")
    ] = None,
) -> None:
    """Read raw data, keep the k-core, put every user's items in time order: D.inter.json and D.item.json.

    D.report.json counts the rows read, dropped and kept, D.rejects.jsonl lists the rows that could not be used.
    """
    from data_processing.interactions import TimeSplit
    from data_processing.interactions import prepare as prepare_tables

    folder = RunFolder.create(run, dataset or (MOVIELENS if source == "movielens" else None)).data
    given = {"--reviews": reviews, "--metadata": metadata, "--inter": inter, "--item": item}
    files = _files_of(source, given, folder)
    if column and source != "table":
        raise InputError("--column goes with --source table")
    if review_texts and not source.startswith("amazon"):
        raise InputError("--review-texts goes with the Amazon sources")
    if split == "temporal" and source == "layout":
        raise InputError("--split temporal does not go with --source layout, whose files hold no times")
    parts = TimeSplit(validation_share, test_share) if split == "temporal" else None
    tables = _read_source(source, files, run / "raw", pairs(column, "--column"), bad_rows)
    print_dict("Data", prepare_tables(tables, folder, core=core, split=parts, dry_run=dry_run))
    if review_texts and not dry_run:
        _keep_reviews(source, files[0], folder, review_texts, bad_rows)


def _files_of(source: Source, given: dict[str, Path | None], folder: DataFolder) -> list[Path]:
    """Return the files that a source needs, in the order of :data:`OPTIONS`; no other file may be given."""
    needed = OPTIONS["amazon" if source.startswith("amazon") else source]
    for option, path in given.items():
        if (path is None) == (option in needed):
            raise InputError(f"--source {source} {'needs' if option in needed else 'does not take'} {option} FILE")
        if path is not None and path.resolve() in (folder.inter.resolve(), folder.item.resolve()):
            raise InputError(f"{path}: would be overwritten; choose another RUN")
    return [path for path in given.values() if path is not None]


def _keep_reviews(source: Source, reviews: Path, folder: DataFolder, per_item: int, bad_rows: float) -> None:
    from data_processing.sources.reviews import read_review_texts
    from gream_verl.core.files import atomic_path

    year = int(source.removeprefix("amazon"))
    texts = read_review_texts(year, reviews, folder.read_training(), per_item=per_item, bad_rows=bad_rows)
    with atomic_path(folder.reviews) as path:
        texts.write_parquet(path)
    console.print(f"{len(texts):,} reviews of {texts['item'].n_unique():,} items kept for the teacher")


def _read_source(
    source: Source, files: list[Path], cache: Path, columns: dict[str, str], bad_rows: float
) -> SourceTables:
    """Read the files of a source, in the order of :data:`OPTIONS`."""
    from data_processing.sources.amazon import read_amazon
    from data_processing.sources.columns import read_table
    from data_processing.sources.layout_files import read_layout
    from data_processing.sources.movielens import read_movielens
    from data_processing.sources.recbole import read_recbole

    if source == "movielens":
        return read_movielens(cache)
    if source == "layout":
        return read_layout(*files)
    if source == "recbole":
        return read_recbole(*files, bad_rows=bad_rows)
    if source == "table":
        return read_table(files[0], files[1], columns, bad_rows=bad_rows)
    return read_amazon(int(source.removeprefix("amazon")), *files, bad_rows=bad_rows)


@data_app.command()
def stats(run: RunArgument, dataset: DatasetOption = None) -> None:
    """Print the numbers by which data sets are compared: users, items, interactions, sparsity, lengths."""
    from data_processing.interactions import statistics

    folder = RunFolder.open(run, dataset).data
    print_dict(folder.name, statistics(folder.read_inter()))


@data_app.command()
def rl(
    run: RunArgument,
    rl_rows: Annotated[int | None, typer.Option(min=1, help="RL prompts to draw; all by default.")] = None,
    mode: Annotated[
        Mode, typer.Option(help="Mode of the prompts; direct ones go to D-rl-direct.parquet.")
    ] = "reasoning",
    history: HistoryOption = 20,
    seed: SeedOption = 0,
    dataset: DatasetOption = None,
) -> None:
    """Write the prompts of SRPO, of its validation and of the evaluation: D-rl, D-val and D-test.parquet."""
    from data_processing.rl import write_prompts

    folder = RunFolder.open(run, dataset).data
    print_dict("Prompts", write_prompts(folder, seed=seed, mode=mode, history=history, rl_rows=rl_rows))
