"""`gream data prepare|stats|rl`: raw data to the files of a run, and the prompts of SRPO."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from gream_verl.cli.common import (
    DEFAULT_DATA,
    DataOption,
    DatasetOption,
    HistoryOption,
    Mode,
    SeedOption,
    console,
    pairs,
    print_dict,
)
from gream_verl.core.errors import InputError
from gream_verl.pipeline.quickstart import DEFAULT_DATASET

data_app = typer.Typer(help="Raw data to training text.", no_args_is_help=True)


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

        return read_table(*files, pairs(columns, "--column"), bad_rows=bad_rows)
    if source is Source.layout:
        from data_processing.sources.layout_files import read_layout

        return read_layout(*files)
    from data_processing.sources.recbole import read_recbole

    return read_recbole(*files, bad_rows=bad_rows)


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
