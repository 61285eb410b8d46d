"""``gream index``: build an item index, look at it, extend it, read those of others."""

from __future__ import annotations

import os
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gream_verl.cli.common import DEFAULT_DATA, DataOption, DatasetOption, SeedOption, console, print_dict
from gream_verl.core.errors import InputError
from gream_verl.pipeline.quickstart import DEFAULT_DATASET

if TYPE_CHECKING:
    from data_processing.indexing.embed import EmbeddingSettings


class Pooling(StrEnum):
    """What makes one vector of a text's tokens."""

    model = "model"
    mean = "mean"
    last = "last"


class Combine(StrEnum):
    """How the fields of an item become one vector."""

    joined = "joined"
    averaged = "averaged"


class EmbeddingEngine(StrEnum):
    """What runs the embedding model."""

    local = "local"
    ray = "ray"


EmbeddingModelOption = Annotated[
    str | None,
    typer.Option("--model", help="Embedding model, sentence-transformers or other; name or folder. Default: MiniLM."),
]
PoolingOption = Annotated[
    Pooling, typer.Option("--pooling", help="One vector of many tokens: as the model does it, mean, or last token.")
]
FieldOption = Annotated[
    list[str] | None,
    typer.Option(
        "--field",
        help="Field to embed: title, categories, description, brand; give it once for each. Default: the first three.",
    ),
]
CombineOption = Annotated[
    Combine, typer.Option("--combine", help="Fields as one text, or the mean of a vector for each field.")
]
MaxTokensOption = Annotated[
    int, typer.Option("--max-tokens", min=8, help="Longest text in tokens; the rest is cut off.")
]
DescriptionOption = Annotated[
    int, typer.Option("--description-characters", min=0, help="How much of a description is read.")
]
NormalizeOption = Annotated[bool, typer.Option("--normalize/--no-normalize", help="Scale each vector to length 1.")]
BatchSizeOption = Annotated[
    int, typer.Option("--batch-size", min=1, help="Texts computed at once by the engine local.")
]
EmbeddingEngineOption = Annotated[
    EmbeddingEngine, typer.Option("--engine", help="This process, or vLLM on a Ray cluster (RAY_ADDRESS).")
]

index_app = typer.Typer(help="The item index: which semantic ID every item has.", no_args_is_help=True)


@index_app.command()
def build(
    data: DataOption = DEFAULT_DATA,
    dataset: DatasetOption = DEFAULT_DATASET,
    levels: Annotated[int | None, typer.Option(min=1, help="Levels of a SID. Default: by catalogue size.")] = None,
    codes: Annotated[int | None, typer.Option(min=2, help="Codes a level. Default: by catalogue size.")] = None,
    unique: Annotated[
        bool, typer.Option("--unique", help="Let the last level keep all items apart: no collision tokens.")
    ] = False,
    collision_tokens: Annotated[
        int | None, typer.Option(min=2, help="Most items on one path. Default: as many as there are codes.")
    ] = None,
    collaborative_weight: Annotated[
        float, typer.Option(min=0.0, help="Weight of co-occurrence beside the text; 0 is text alone.")
    ] = 1.0,
    model: EmbeddingModelOption = None,
    pooling: PoolingOption = Pooling.model,
    field: FieldOption = None,
    combine: CombineOption = Combine.joined,
    max_tokens: MaxTokensOption = 64,
    description_characters: DescriptionOption = 200,
    normalize: NormalizeOption = True,
    batch_size: BatchSizeOption = 64,
    engine: EmbeddingEngineOption = EmbeddingEngine.local,
    seed: SeedOption = 0,
) -> None:
    """Embed the items and give each a semantic ID by residual balanced k-means: D.index.json.

    Replaces the index that is there: models trained on it do not know the new one. `gream index add` extends it.
    """
    # One thread, before any library starts more: the order of summation would change the bytes of the index.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from data_processing.indexing.index_report import render_table
    from data_processing.indexing.residual_index import build_index
    from gream_verl.core.data_folder import DataFolder

    embedding = _embedding_settings(
        model, pooling, field, combine, max_tokens, description_characters, normalize, batch_size
    )
    report = build_index(
        DataFolder(data, dataset), levels=levels, codes=codes, seed=seed, collaborative_weight=collaborative_weight,
        embedding=embedding, engine=engine.value,
        unique=unique, collision_tokens=collision_tokens,
    )  # fmt: skip
    console.print(render_table({"name": dataset, **report}))


@index_app.command()
def embed(
    data: DataOption = DEFAULT_DATA,
    dataset: DatasetOption = DEFAULT_DATASET,
    model: EmbeddingModelOption = None,
    pooling: PoolingOption = Pooling.model,
    field: FieldOption = None,
    combine: CombineOption = Combine.joined,
    max_tokens: MaxTokensOption = 64,
    description_characters: DescriptionOption = 200,
    normalize: NormalizeOption = True,
    batch_size: BatchSizeOption = 64,
    engine: EmbeddingEngineOption = EmbeddingEngine.local,
) -> None:
    """Embed the items' texts: D.text-emb.npz, or with other settings than the default D.text-emb-HASH.npz.

    `gream index build` finds them when it is given the same options. A call after a stop goes on where that one was.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in build
    from data_processing.indexing.embed import cache_path, cached_embeddings, stored_embeddings
    from gream_verl.core.data_folder import DataFolder

    settings = _embedding_settings(
        model, pooling, field, combine, max_tokens, description_characters, normalize, batch_size
    )
    folder = DataFolder(data, dataset)
    items, cache, begin = list(folder.read_items().values()), cache_path(folder, settings), time.perf_counter()
    kept = stored_embeddings(items, cache, settings)
    vectors = cached_embeddings(items, cache, settings, engine.value) if kept is None else kept
    seconds = time.perf_counter() - begin
    speed = {"seconds": seconds, "items a second": len(items) / seconds} if kept is None else {}
    title = "Embeddings" if kept is None else "Embeddings, kept from an earlier call"
    print_dict(title, {"items": len(items), "dimensions": vectors.shape[1], **speed, "file": cache})


def _embedding_settings(
    model: str | None,
    pooling: Pooling,
    fields: list[str] | None,
    combine: Combine,
    max_tokens: int,
    description_characters: int,
    normalize: bool,
    batch_size: int,
) -> EmbeddingSettings:
    from data_processing.indexing.embed import DEFAULT_SETTINGS, EmbeddingSettings

    return EmbeddingSettings(
        model=model, pooling=pooling.value, fields=tuple(fields or DEFAULT_SETTINGS.fields), combine=combine.value,
        max_tokens=max_tokens, description_characters=description_characters, normalize=normalize,
        batch_size=batch_size,
    )  # fmt: skip


@index_app.command()
def report(
    data: DataOption = DEFAULT_DATA,
    dataset: DatasetOption = DEFAULT_DATASET,
    other: Annotated[Path | None, typer.Option(help="Folder of another index. Default: that of --data.")] = None,
    other_dataset: Annotated[str | None, typer.Option(help="Its data set. Default: that of --dataset.")] = None,
    other_index: Annotated[
        Path | None, typer.Option(help="Another index as a file alone, in any form that `gream index check` reads.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="Folder to write to. Default: that of --data.")] = None,
    seed: SeedOption = 0,
) -> None:
    """What the index is worth, alone or beside another: D.index-report.html and D.index-report.json."""
    if other_index is not None and (other is not None or other_dataset is not None):
        raise InputError("--other-index is an index by itself; leave out --other and --other-dataset")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in build
    from data_processing.indexing import index_report
    from gream_verl.core.data_folder import DataFolder

    first, second = index_report.read_index(DataFolder(data, dataset)), None
    if other_index is not None:
        second = index_report.read_index_file(other_index)
    elif other is not None or other_dataset is not None:
        second = index_report.read_index(DataFolder(other or data, other_dataset or dataset))
    found = index_report.make_report(first, second, seed=seed)
    index_report.write_report(output or data, found)
    console.print(index_report.render_table(found))
    for notice in found["notices"]:
        console.print(notice, style="yellow", markup=False, highlight=False)
    console.print(f"{(output or data) / dataset}.index-report.html", markup=False, highlight=False, soft_wrap=True)


ForeignArgument = Annotated[
    Path, typer.Argument(help="An index: of GREAM, LETTER, LC-Rec, MiniOneRec or TIGER.", metavar="FILE")
]


@index_app.command()
def check(
    file: ForeignArgument,
    data: DataOption = DEFAULT_DATA,
    dataset: Annotated[str | None, typer.Option(help="Data set whose items it must have. Default: any items.")] = None,
) -> None:
    """Say what an index file holds, and what is wrong with it if something is: form, levels, codes, collisions."""
    from data_processing.indexing.foreign import read_foreign
    from gream_verl.core.data_folder import DataFolder

    foreign = read_foreign(file)
    if dataset is not None:
        folder = DataFolder(data, dataset)
        foreign = foreign.for_items(folder.read_items(), folder.item)
    print_dict(str(file), foreign.describe())
    foreign.index()


@index_app.command("import")
def import_index(
    file: ForeignArgument,
    data: DataOption = DEFAULT_DATA,
    dataset: DatasetOption = DEFAULT_DATASET,
    resolve: Annotated[
        bool, typer.Option("--resolve", help="Give items that share a SID a token more, all of them.")
    ] = False,
) -> None:
    """Write the index of others in our form, for the items of the data set: D.index.json.

    The order is that of D.item.json; without that file, that of FILE.
    """
    from data_processing.indexing.foreign import read_foreign
    from data_processing.indexing.saved_index import codebooks_file, forget_report
    from gream_verl.core.data_folder import DataFolder
    from gream_verl.core.semantic_ids import retired_file

    folder, foreign = DataFolder(data, dataset), read_foreign(file)
    if folder.item.is_file():
        foreign = foreign.for_items(folder.read_items(), folder.item)
    index = foreign.index(resolve=resolve)
    forget_report(folder)
    for stale in (retired_file(folder.index), codebooks_file(folder)):
        stale.unlink(missing_ok=True)
    index.save(folder.index)
    checked = folder.item if folder.item.is_file() else f"nothing, {folder.item} is not there"
    rows = {"checked against": checked, "resolved now": resolve, "written": folder.index}
    print_dict(str(file), foreign.describe() | rows)
    console.print(
        "Training files and models made with another index must be made anew. `gream index add` needs an index that "
        "`gream index build` made."
    )


@index_app.command()
def add(
    data: DataOption = DEFAULT_DATA,
    dataset: DatasetOption = DEFAULT_DATASET,
    engine: EmbeddingEngineOption = EmbeddingEngine.local,
) -> None:
    """Give new items of D.item.json a semantic ID; those that are there stay as they are, byte for byte.

    The codebooks are frozen and no token is added: a trained model can read and write the new ones. The table tells how
    far the new items are from what the index was built for.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as in build
    from data_processing.indexing.growth import add_items
    from gream_verl.core.data_folder import DataFolder

    made = add_items(DataFolder(data, dataset), engine=engine.value)
    if not made["new"]:
        console.print("every item has a semantic ID already")
        return
    reasons = made["drift"].pop("rebuild")
    print_dict("Items added", made)
    for reason in reasons:
        console.print(f"{reason}: build the index anew with `gream index build`, and train on it", style="yellow")


@index_app.command()
def remove(
    items: Annotated[list[str], typer.Argument(help="Ids of the items.", metavar="ITEM...")],
    data: DataOption = DEFAULT_DATA,
    dataset: DatasetOption = DEFAULT_DATASET,
    undo: Annotated[bool, typer.Option("--undo", help="Bring them back, each with the semantic ID it had.")] = False,
) -> None:
    """Take items out of what is recommended: their semantic IDs are retired (D.retired.json) and given to no other.

    Histories that hold them can still be written.
    """
    from data_processing.indexing.growth import remove_items, restore_items
    from gream_verl.core.data_folder import DataFolder

    (restore_items if undo else remove_items)(DataFolder(data, dataset), items)
    count = len(set(items))
    console.print(f"{count:,} item{'s' * (count > 1)} {'brought back' if undo else 'retired'}")
