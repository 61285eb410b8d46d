"""``gream index``: build an item index, look at it, extend it, read those of others."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from gream_verl.cli_common import DEFAULT_DATA, DataOption, DatasetOption, SeedOption, print_dict
from gream_verl.quickstart import DEFAULT_DATASET

index_app = typer.Typer(help="The item index: which semantic ID every item has.", no_args_is_help=True)


@index_app.command()
def build(
    data: DataOption = DEFAULT_DATA,
    dataset: DatasetOption = DEFAULT_DATASET,
    levels: Annotated[int | None, typer.Option(min=1, help="Levels of a SID. Default: by catalogue size.")] = None,
    codes: Annotated[int | None, typer.Option(min=2, help="Codes a level. Default: by catalogue size.")] = None,
    collaborative_weight: Annotated[
        float, typer.Option(min=0.0, help="Weight of co-occurrence beside the text; 0 is text alone.")
    ] = 1.0,
    model: Annotated[str | None, typer.Option(help="Embedding model, a name or folder. Default: MiniLM.")] = None,
    seed: SeedOption = 0,
) -> None:
    """Embed the items and give each a semantic ID by residual balanced k-means: D.index.json."""
    # One thread, before any library starts more: the order of summation would change the bytes of the index.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from data_processing.indexing.residual_index import build_index
    from data_processing.layout import DataFolder

    report = build_index(
        DataFolder(data, dataset), levels=levels, codes=codes, seed=seed,
        collaborative_weight=collaborative_weight, model=model,
    )  # fmt: skip
    print_dict("Item index", {key: value for key, value in report.items() if key != "balance"})
