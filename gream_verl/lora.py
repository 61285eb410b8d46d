"""LoRA for models that know semantic IDs: low-rank updates of the linear layers, rows of SID tokens trained in full.

LLaMA-Factory 0.9.5 can train a new LoRA adapter's rows only with ``additional_target`` (peft's ``modules_to_save``,
llamafactory/model/adapter.py:241). That trains a copy of the whole embedding, text rows too, and where the output head
is tied, as in Qwen3-4B, the head stays untrained: the two come apart, and loaders that tie them anyway get another
model than was trained. peft's ``trainable_token_indices`` trains chosen rows and keeps them tied, but no argument of
LLaMA-Factory reaches it. So an untrained adapter is written here, which LLaMA-Factory takes up as one to go on with:
``finetuning_type: lora``, ``adapter_name_or_path: FOLDER`` (adapter.py:200). Rank, alpha and targets are the adapter's
own; ``lora_rank`` and its like in the config are not read. Not for DeepSpeed ZeRO-3: a forward pass reads the whole
embedding weight, which ZeRO-3 has in parts.
"""

from __future__ import annotations

from pathlib import Path

from gream_verl.files import InputError, read_json, require_file, write_json
from gream_verl.semantic_ids import ItemIndex
from gream_verl.vocabulary import RECORD, new_folder, refuse_foreign, save_checkpoint, sid_token_ids

ADAPTER_CONFIG = "adapter_config.json"


def write_adapter(
    model: Path, index_file: Path, output: Path, *, rank: int, alpha: int, dropout: float = 0.0, seed: int = 0
) -> dict[str, int]:
    """Write an adapter that changes nothing yet, for LLaMA-Factory to train.

    Args:
        model: A checkpoint that knows the SIDs.
        index_file: The item index.
        output: Folder of the adapter.
        rank: Rank of the update of every linear layer but the output head.
        alpha: Updates are scaled by ``alpha / rank``.
        dropout: Share of an update's inputs that training drops.
        seed: Seed of the first factor of every update; the second is 0.

    Returns:
        ``token_rows`` and ``parameters`` that will be trained.
    """
    import torch
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = read_json(model / RECORD, "make it with `gream model extend`")
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = sid_token_ids(tokenizer, ItemIndex.load(index_file), str(model)).values()
    rows = sorted([*ids, *tokenizer.convert_tokens_to_ids(record["reasoning_tokens"])])
    base = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    names = {module: name.rpartition(".")[2] for name, module in base.named_modules()}
    linear = {name for module, name in names.items() if isinstance(module, torch.nn.Linear) and module is not head}
    own_head = head.weight is not embedding.weight
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=sorted(linear),
        # A tied head follows the embedding by itself; one of its own has to be named.
        trainable_token_indices={names[module]: rows for module in ([embedding, head] if own_head else [embedding])},
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        adapted = get_peft_model(base, config)
    with new_folder(output) as folder:
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
        saved = read_json(folder / ADAPTER_CONFIG)
        saved["target_modules"].sort()  # peft keeps a set, whose order changes from run to run
        write_json(folder / ADAPTER_CONFIG, saved, indent=2)
    return {"token_rows": len(rows), "parameters": adapted.get_nb_trainable_parameters()[0]}


def merge_adapter(adapter: Path, output: Path, model: Path | None = None) -> None:
    """Merge a trained adapter into the checkpoint it was trained on.

    ``llamafactory-cli export`` merges the same weights, but leaves the record behind and turns the tokenizer's padding
    to the left.

    Args:
        adapter: What LLaMA-Factory trained: its output folder, or a checkpoint in it.
        output: Folder of the merged checkpoint, an ordinary one.
        model: The checkpoint below; default: the one that the adapter names.

    Raises:
        InputError: When the adapter or its model is not there or they do not fit, or the output cannot be replaced.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trained = "train one by LLaMA-Factory with finetuning_type=lora, from what `gream model adapter` writes"
    for name in (ADAPTER_CONFIG, "adapter_model.safetensors"):
        require_file(adapter / name, trained)
    model = model or Path(read_json(adapter / ADAPTER_CONFIG)["base_model_name_or_path"])
    record = read_json(model / RECORD, "name the checkpoint of `gream model extend` with --model")
    refuse_foreign(output)
    base = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    try:
        merged = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    except RuntimeError as error:
        raise InputError(f"{adapter}: does not fit {model} ({error}); name its model with --model") from error
    save_checkpoint(merged, AutoTokenizer.from_pretrained(model), output, record)
