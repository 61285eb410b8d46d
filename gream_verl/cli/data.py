"""`gream data prepare|stats|rl`: raw data to the files of a run, and the prompts of SRPO."""

from __future__ import annotations

from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Option, Typer

from gream_verl.cli.common import Dataset, DryRun, History, Run, Seed, console, pairs, print_dict
from gream_verl.core.errors import InputError
from gream_verl.core.files import atomic_path
from gream_verl.core.rsvr import Mode
from gream_verl.core.run_folder import RunFolder

if TYPE_CHECKING:
    from data_processing.interactions import TimeSplit
    from data_processing.sources.common import SourceTables

data_app = Typer(help="Turn raw data into training text.", no_args_is_help=True)

Source = Literal["movielens", "recbole", "amazon2014", "amazon2018", "amazon2023", "layout", "sequences", "table"]
Split = Literal["leave-one-out", "temporal"]
SOURCES = "movielens (fetched), amazon2014, amazon2018, amazon2023, recbole, layout (GREAM's own), sequences or table."
INTERACTIONS = (
    "Amazon: reviews (JSON lines) or ratings (.csv). RecBole: .inter. Layout: D.inter.json. Sequences: lines of ids. "
    "Table: any table."
)
ITEMS = "Amazon: metadata. RecBole: .item. Layout, sequences: D.item.json. Table: .parquet, .csv or .tsv."
MOVIELENS = "ml-100k"


@data_app.command()
def prepare(
    run: Run,
    source: Annotated[Source, Option(metavar="FORMAT", help=f"Format of the raw data: {SOURCES}")],
    interactions: Annotated[Path | None, Option(metavar="FILE", help=INTERACTIONS)] = None,
    items: Annotated[Path | None, Option(metavar="FILE", help=ITEMS)] = None,
    column: Annotated[list[str] | None, Option(metavar="A=B", help="Table: read A from column B; repeatable.")] = None,
    core: Annotated[int, Option(min=1, metavar="N", help="Least interactions of items, and of users (3 or more).")] = 5,
    split: Annotated[
        Split, Option(metavar="SPLIT", help="leave-one-out, or temporal: the latest of all.")
    ] = "leave-one-out",
    held_out: Annotated[
        str | None, Option(metavar="V,T", help="Temporal: shares for validation and test, or the first day of each.")
    ] = None,
    least_rating: Annotated[float | None, Option(metavar="X", help="Leave out lower ratings. Default: any.")] = None,
    review_texts: Annotated[int, Option(min=0, metavar="N", help="Amazon: reviews of an item for `enrich`.")] = 0,
    bad_rows: Annotated[float, Option(min=0, max=1, metavar="SHARE", help="Largest share of unusable rows.")] = 0.05,
    dry_run: DryRun = False,
    dataset: Annotated[str | None, Option(help="Name of the data set, D in file names. Default: RUN's own.")] = None,
) -> None:
    """Turn raw data into D.inter.json and D.item.json.

    Users and items of the k-core stay, in order of time. D.report.json counts the rows read, dropped and kept.
    D.rejects.jsonl lists the rows that could not be used.
    """
    from data_processing.interactions import prepare as prepare_tables
    from data_processing.sources.amazon import holds_ratings
    from data_processing.sources.reviews import read_review_texts

    files = [path for path in (interactions, items) if path]
    if source == "movielens" and files:
        raise InputError("--source movielens takes no --interactions, --items")
    if source != "movielens" and not (interactions and (items or source == "sequences")):
        raise InputError(f"--source {source} needs --interactions, --items")
    if column and source != "table":
        raise InputError("--column goes with --source table")
    if review_texts and not source.startswith("amazon"):
        raise InputError("--review-texts goes with the Amazon sources")
    if review_texts and interactions and holds_ratings(interactions):
        raise InputError(f"{interactions}: a file of ratings holds no texts; give the file of reviews")
    if held_out and split != "temporal":
        raise InputError("--held-out goes with --split temporal")
    if source in ("layout", "sequences") and (split == "temporal" or least_rating is not None):
        raise InputError(f"--source {source}: no --split temporal or --least-rating; it holds no times or ratings")
    folder = RunFolder.create(run, dataset or (MOVIELENS if source == "movielens" else None)).data
    for path in files:
        if path.resolve() in (folder.inter.resolve(), folder.item.resolve()):
            raise InputError(f"{path}: would be overwritten; choose another RUN")
    parts = _parts(held_out or "0.1,0.1") if split == "temporal" else None
    tables = _read_source(source, files, run / "raw", pairs(column, "--column"), bad_rows, least_rating)
    print_dict("Data", prepare_tables(tables, folder, core=core, split=parts, dry_run=dry_run))
    for older in (folder.index, folder.enriched):
        if older.is_file() and not dry_run:
            console.print(f"{older}: of the data before, may know what is held out now; make it again", style="yellow")
    if review_texts and not dry_run:
        year, training = int(source.removeprefix("amazon")), folder.read_training()
        texts = read_review_texts(year, files[0], training, per_item=review_texts, bad_rows=bad_rows)
        with atomic_path(folder.reviews) as path:
            texts.write_parquet(path)
        console.print(f"{len(texts):,} reviews of {texts['item'].n_unique():,} items kept for the teacher")


def _parts(given: str) -> TimeSplit:
    """Read the parts of a temporal split."""
    from data_processing.interactions import TimeSplit

    def part(text: str) -> float | date:
        return float(text) if text.replace(".", "", 1).isdecimal() else date.fromisoformat(text)

    try:
        validation, test = map(part, given.split(","))
    except ValueError:
        raise InputError(f"--held-out {given}: expected two shares, 0.1,0.1, or days such as 2018-01-31") from None
    return TimeSplit(validation, test)


def _read_source(
    source: Source, files: list[Path], cache: Path, columns: dict[str, str], bad_rows: float, least_rating: float | None
) -> SourceTables:
    """Read interactions and items, or fetch MovieLens to the folder ``cache``."""
    from data_processing.sources.amazon import read_amazon
    from data_processing.sources.columns import read_table
    from data_processing.sources.layout_files import read_layout, read_sequences
    from data_processing.sources.movielens import read_movielens
    from data_processing.sources.recbole import read_recbole

    if source == "movielens":
        return read_movielens(cache, least_rating=least_rating)
    if source == "layout":
        return read_layout(*files)
    if source == "sequences":
        return read_sequences(files[0], files[1] if len(files) > 1 else None)
    if source == "recbole":
        return read_recbole(*files, bad_rows=bad_rows, least_rating=least_rating)
    if source == "table":
        return read_table(files[0], files[1], columns, bad_rows=bad_rows, least_rating=least_rating)
    return read_amazon(int(source.removeprefix("amazon")), *files, bad_rows=bad_rows, least_rating=least_rating)


@data_app.command()
def stats(run: Run, dataset: Dataset = None) -> None:
    """Print users, items, interactions, sparsity and lengths."""
    from data_processing.interactions import statistics

    folder = RunFolder.open(run, dataset).data
    print_dict(folder.name, statistics(folder.read_inter()))


@data_app.command()
def rl(
    run: Run,
    rl_rows: Annotated[
        int | None, Option(min=1, help="RL prompts, the latest of every user first. Default: all.")
    ] = None,
    mode: Annotated[Mode, Option(help="Mode of the prompts of SRPO.")] = "reasoning",
    history: History = 20,
    seed: Seed = 0,
    dataset: Dataset = None,
) -> None:
    """Write the prompts of SRPO and of the evaluation.

    D-rl.parquet is for SRPO (D-rl-direct.parquet in direct mode), D-val.parquet for its validation, D-test.parquet for
    the evaluation.
    """
    from data_processing.rl import write_prompts

    folder = RunFolder.open(run, dataset).data
    print_dict("Prompts", write_prompts(folder, seed=seed, mode=mode, history=history, rl_rows=rl_rows))
