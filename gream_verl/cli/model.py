"""`gream model tiny|extend|adapter|merge`: checkpoints that know the semantic IDs, and LoRA adapters for them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option, Typer

from gream_verl.cli.common import Dataset, Run, Seed, console, print_dict
from gream_verl.core.run_folder import RunFolder

model_app = Typer(help="Make models that know the semantic IDs.", no_args_is_help=True)
Overwrite = Annotated[bool, Option("--overwrite", help="Replace an earlier output of this command.")]


@model_app.command()
def tiny(
    run: Run,
    hidden_size: Annotated[int, Option(min=8, help="Width of the model.")] = 128,
    layers: Annotated[int, Option(min=1, help="Number of layers.")] = 3,
    seed: Seed = 0,
    dataset: Dataset = None,
) -> None:
    """Make RUN/model: a tiny untrained Qwen3, for tests.

    Its tokenizer is trained on the SFT rows and has the semantic IDs.
    """
    from gream_verl.core.semantic_ids import ItemIndex
    from gream_verl.model.tiny_model import make_tiny_model, read_sft_texts

    folder = RunFolder.open(run, dataset)
    texts, index = read_sft_texts(folder.data.mix), ItemIndex.load(folder.data.index)
    sizes = {"hidden_size": hidden_size, "layers": layers}
    print_dict("Tiny model", make_tiny_model(texts, index, folder.model, seed=seed, **sizes))


@model_app.command()
def extend(
    run: Run,
    base: Annotated[str, Option(help="Base model, name or folder, such as Qwen/Qwen3-4B-Instruct-2507.")],
    grow: Annotated[bool, Option("--grow", help="The base has an earlier index: add only the missing tokens.")] = False,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    dataset: Dataset = None,
) -> None:
    """Make RUN/model: a pretrained model with semantic-ID tokens.

    RUN/model/semantic_ids.json records the change.
    """
    from gream_verl.model.vocabulary import extend_checkpoint

    folder = RunFolder.open(run, dataset)
    done = extend_checkpoint(base, folder.data.index, folder.model, seed=seed, grow=grow, overwrite=overwrite)
    print_dict(str(folder.model), done)


@model_app.command()
def adapter(
    run: Run,
    model: Annotated[Path | None, Option(help="Checkpoint to adapt. Default: RUN/model.")] = None,
    rank: Annotated[int, Option(min=1, help="Rank of the update of every linear layer.")] = 64,
    alpha: Annotated[int, Option(min=1, help="The update is scaled by alpha / rank.")] = 128,
    dropout: Annotated[float, Option(min=0, max=1, help="Share of the inputs of an update to drop.")] = 0.0,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    dataset: Dataset = None,
) -> None:
    """Make RUN/adapter: LoRA for a model with semantic IDs.

    It is untrained: low-rank updates of every linear layer, rows of semantic-ID tokens in full. LLaMA-Factory trains it
    with finetuning_type: lora and adapter_name_or_path: RUN/adapter.
    """
    from gream_verl.model.lora import write_adapter

    folder = RunFolder.open(run, dataset)
    made = write_adapter(
        model or folder.model, folder.data.index, run / "adapter",
        rank=rank, alpha=alpha, dropout=dropout, seed=seed, overwrite=overwrite,
    )  # fmt: skip
    print_dict("Adapter", made)


@model_app.command()
def merge(
    run: Run,
    adapter: Annotated[Path | None, Option(help="Trained adapter. Default: RUN/sft-lora.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make RUN/sft: a trained adapter merged into its model."""
    from gream_verl.model.lora import merge_adapter

    merge_adapter(adapter or run / "sft-lora", run / "sft", overwrite=overwrite)
    console.print(f"{run / 'sft'}: written", soft_wrap=True, markup=False)
