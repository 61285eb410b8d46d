"""LoRA for models that know semantic IDs: low-rank updates of the linear layers, rows of SID tokens trained in full.

LLaMA-Factory 0.9.5 trains rows only as a copy of the whole embedding, which comes apart from a tied output head. No
argument of it reaches peft's ``trainable_token_indices``. So an untrained adapter is written here for it to go on with
(``adapter_name_or_path``). DeepSpeed ZeRO-3, which has the embedding in parts, cannot train it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, require_file, write_json
from gream_verl.core.semantic_ids import ItemIndex, parse_token
from gream_verl.model.loading import load_model, load_tokenizer, reading
from gream_verl.model.saving import new_folder, save_model
from gream_verl.model.vocabulary import RECORD, read_record, reasoning_tokens, require_sid_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADAPTER_CONFIG = "adapter_config.json"


def write_adapter(
    model: Path,
    index_file: Path,
    output: Path,
    *,
    rank: int,
    alpha: int,
    dropout: float = 0.0,
    seed: int = 0,
    overwrite: bool = False,
) -> dict[str, int]:
    """Write an adapter that changes nothing yet, for LLaMA-Factory to train.

    Every linear layer but the output head gets a low-rank update of rank ``rank``, scaled by ``alpha / rank``; training
    drops a share ``dropout`` of its inputs. ``seed`` draws its first factor; the second is 0.

    Returns:
        ``token_rows`` and ``parameters`` that training changes.
    """
    import torch
    from peft import LoraConfig, TaskType, get_peft_model

    with new_folder(output, "adapter", [model], replace=overwrite) as folder:
        tokenizer = load_tokenizer(model)
        require_sid_tokens(tokenizer, ItemIndex.load(index_file).tokens, str(model))
        tags = tokenizer.convert_tokens_to_ids(reasoning_tokens(model, tokenizer))
        rows = sorted(_sid_rows(tokenizer).union(tags))
        base = load_model(model)
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        names = {module: name.rpartition(".")[2] for name, module in base.named_modules()}
        linear = {name for module, name in names.items() if isinstance(module, torch.nn.Linear) and module is not head}
        # a tied head follows the embedding by itself
        trained = [embedding] if head.weight is embedding.weight else [embedding, head]
        config = LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=rank,
            lora_alpha=alpha,
            lora_dropout=dropout,
            target_modules=sorted(linear),
            trainable_token_indices={names[module]: rows for module in trained},
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            adapted = get_peft_model(base, config)
        adapted.save_pretrained(str(folder), save_embedding_layers=False)
        saved = read_json(folder / ADAPTER_CONFIG)
        saved["target_modules"].sort()  # peft keeps a set, whose order changes from run to run
        write_json(folder / ADAPTER_CONFIG, saved, indent=2)
    return {"token_rows": len(rows), "parameters": adapted.get_nb_trainable_parameters()[0]}


def _sid_rows(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return {number for token, number in tokenizer.get_vocab().items() if parse_token(token)}


def merge_adapter(adapter: Path, output: Path, *, overwrite: bool = False) -> None:
    """Merge the trained ``adapter``, an output folder of LLaMA-Factory, into the checkpoint that it names.

    ``llamafactory-cli export`` merges the same weights, but loses the record and turns the padding to the left.
    """
    from peft import PeftModel

    remedy = "train one by LLaMA-Factory with finetuning_type=lora, from what `gream model adapter` writes"
    require_file(adapter / "adapter_model.safetensors", remedy)
    config = read_json(adapter / ADAPTER_CONFIG, remedy)
    trained = config.get("trainable_token_indices") if isinstance(config, dict) else None
    if not isinstance(trained, dict) or not trained:
        raise InputError(f"{adapter}: trains no rows of SID tokens; {remedy}")
    model = config.get("base_model_name_or_path") or ""
    with new_folder(output, "merge", [adapter, model], replace=overwrite) as folder:
        tokenizer = load_tokenizer(model)
        sids = _sid_rows(tokenizer)
        if not sids or not all(sids.issubset(rows) for rows in trained.values()):
            raise InputError(f"{adapter}: does not train the SID tokens of {model}; {remedy}")
        with reading(f"{adapter} on {model}"):
            merged = PeftModel.from_pretrained(load_model(model), adapter).merge_and_unload()
        save_model(merged, tokenizer, folder, model)
        if record := read_record(model):
            write_json(folder / RECORD, {**record, "merged": str(adapter)}, indent=1)
