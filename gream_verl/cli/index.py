"""``gream index``: build an item index, look at it, extend it, read those of other projects."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

from typer import Argument, Option, Typer

from gream_verl.cli.common import Config, Dataset, Run, Seed, console, print_dict
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.files import require_file
from gream_verl.core.options import file_options
from gream_verl.core.run_folder import RunFolder

index_app = Typer(help="Build and extend the index of semantic IDs.", no_args_is_help=True)
Without = Annotated[Path | None, Option(help="File of item ids to leave out, one per line.", metavar="FILE")]


@index_app.callback()
def use_one_thread() -> None:
    """Start one thread only in libraries that are loaded later: the order of summation changes bytes of the index."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@index_app.command()
def build(
    run: Run,
    levels: Annotated[int | None, Option(min=1, help="Levels of a SID. Default: by catalogue size.")] = None,
    codes: Annotated[int | None, Option(min=2, help="Codes per level. Default: by catalogue size.")] = None,
    unique: Annotated[bool, Option("--unique", help="Keep all items apart: no collision tokens.")] = False,
    collaborative_weight: Annotated[
        float, Option(min=0, help="Weight of co-occurrence next to text, 0 for none.")
    ] = 1.0,
    without: Without = None,
    model: Annotated[str | None, Option(help="Embedding model, name or folder. Default: MiniLM, in a package.")] = None,
    config: Config = None,
    seed: Seed = 0,
    dataset: Dataset = None,
) -> None:
    """Give each item a semantic ID: D.index.json.

    The items are embedded and clustered by residual balanced k-means. The YAML holds settings of the embedding, see
    docs/index.md. An earlier index is replaced, and its models do not know the new one: `gream index add` extends it.
    """
    from data_processing.indexing.embed import EmbeddingSettings
    from data_processing.indexing.residual_index import IndexSettings, build_index

    embedding = file_options(EmbeddingSettings, config, {"model": model}, "gream index build")
    settings = IndexSettings(levels, codes, seed, collaborative_weight, unique, embedding)
    folder = RunFolder.open(run, dataset).data
    build_index(folder, settings, _read_ids(without))
    _report(folder, seed)


@index_app.command()
def report(run: Run, seed: Seed = 0, dataset: Dataset = None) -> None:
    """Measure the index: D.index-report.json.

    It shows how evenly codes are used, collisions, the variance left by each level, and shared codes of neighbours.
    """
    _report(RunFolder.open(run, dataset).data, seed)


@index_app.command()
def add(
    run: Run,
    items: Annotated[Path | None, Option(metavar="FILE", help="New items, as in D.item.json, to put there.")] = None,
    without: Without = None,
    dataset: Dataset = None,
) -> None:
    """Give new items of D.item.json a semantic ID.

    The others stay as they are, byte for byte. The codebooks are frozen and no token is added: a trained model can read
    and write the new ones. The table shows the distance of the new items from those that the index was built for.
    """
    from data_processing.indexing.growth import add_items
    from data_processing.interactions import take_items

    folder = RunFolder.open(run, dataset).data
    if items:
        take_items(folder, items)
    made = add_items(folder, _read_ids(without))
    reasons = made.pop("rebuild", [])
    print_dict("Items added", made)
    for reason in reasons:
        console.print(f"{reason}: build the index again with `gream index build`, and train on it", style="yellow")
    _report(folder)


@index_app.command()
def check(
    path: Annotated[
        Path, Argument(metavar="RUN|FILE", help="A run, or an index of GREAM, LETTER, MiniOneRec or TIGER.")
    ],
    dataset: Dataset = None,
) -> None:
    """Check an index: form, levels, codes, collisions.

    That of a run must have all items of its data set.
    """
    from data_processing.indexing.import_index import read_other_index

    folder = RunFolder.open(path, dataset).data if path.is_dir() else None
    other = read_other_index(folder.index if folder else path)
    if folder:
        other = other.for_items(folder.read_items(), folder.item)
    print_dict(str(path), other.describe())
    other.to_index()


@index_app.command("import")
def import_index(
    run: Run,
    file: Annotated[Path, Argument(metavar="FILE", help="An index of GREAM, LETTER, TIGER, OneRec or the like.")],
    resolve: Annotated[bool, Option("--resolve", help="Give items that share a SID one more token each.")] = False,
    dataset: Dataset = None,
) -> None:
    """Write an index of another project as D.index.json.

    It must have the items of RUN. Models trained on an earlier index do not know it. `gream index add` needs an index
    that `gream index build` made.
    """
    from data_processing.indexing.import_index import read_other_index

    folder = RunFolder.open(run, dataset).data
    other = read_other_index(file).for_items(folder.read_items(), folder.item)
    index = other.to_index(resolve=resolve)
    folder.codebooks.unlink(missing_ok=True)
    index.save(folder.index)
    print_dict(str(file), other.describe() | {"written": folder.index})
    _report(folder)


@index_app.command("import-rows")
def import_rows(
    file: Annotated[Path, Argument(metavar="FILE", help="Parquet rows of another project, with SIDs such as <a_0>.")],
    output: Annotated[Path, Argument(metavar="OUTPUT", help="The same rows with ours, <|a_1|>.")],
) -> None:
    """Write rows of another project with our semantic IDs.

    They fit an index that `gream index import` wrote.
    """
    from data_processing.indexing import import_index as importing

    print_dict(str(file), importing.import_rows(file, output))


def _read_ids(file: Path | None) -> Collection[str]:
    if file is None:
        return ()
    lines = require_file(file, "check the path").read_text(encoding="utf-8-sig").splitlines()
    if not (ids := {line.strip() for line in lines} - {""}):
        raise InputError(f"{file}: holds no item id; give one per line")
    return ids


def _report(folder: DataFolder, seed: int = 0) -> None:
    from data_processing.indexing.diagnostics import report_index, report_table

    console.print(report_table(folder.name, report_index(folder, seed=seed)))
