"""Loading of Hugging Face models and tokenizers: whole, or refused with one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gream_verl.core.errors import InputError
from gream_verl.core.files import require_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


def resolve_model(path: Path) -> Path:
    """Return the Hugging Face folder of a checkpoint: the path, a step of verl's, or the latest of its steps."""
    if (path / "config.json").is_file():
        return path
    step = path
    if not (path / "actor").is_dir() and not path.name.startswith("global_step_"):
        latest = require_file(path / "latest_checkpointed_iteration.txt", "choose a model or verl's checkpoints")
        step = path / f"global_step_{latest.read_text(encoding='utf-8').strip()}"
    exported = step / "actor" / "huggingface"
    if not list(exported.glob("*.safetensors")):
        remedy = "take a later step, verl keeps few of them, or train with checkpoint.save_contents=[...,hf_model]"
        raise InputError(f"{exported}: no exported model; {remedy}")
    return exported


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """Turn what transformers and peft raise for unusable files into an ``InputError``."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{source}: cannot be loaded ({type(error).__name__}: {reason}); check the path") from error


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, a name or a folder."""
    from transformers import AutoTokenizer

    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise InputError(f"{source}: no Hugging Face model (config.json is missing); check the path")
    with reading(source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        raise InputError(f"{source}: its tokenizer has no tokenizer.json, such as of tekken.json alone; add one")
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # transformers makes an empty one without its files
        raise InputError(f"{source}: no tokenizer there; copy the files of its tokenizer")
    return tokenizer


def load_model(source: str | Path, *, inference: bool = False) -> PreTrainedModel:
    """Load a causal language model, a name or a folder; refuse missing weights, which transformers draws at random.

    Args:
        source: The model.
        inference: Load for generation: in evaluation mode, on an accelerator where there is one, in float32 on a CPU.
            Otherwise on the CPU in its own number format.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    device = "cuda" if inference and torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if inference and device == "cpu" else "auto"
    with reading(source):
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, attn_implementation="sdpa" if inference else None, output_loading_info=True
        )
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"{source}: {len(missing)} weights are missing, such as {missing[0]}; fetch the model again")
    return model.to(device).eval() if inference else model


def load_decoding_config(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Load the configuration of a model that beam search can decode: full attention, a row for every token."""
    from transformers import AutoConfig

    with reading(folder):
        config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config(decoder=True)
    window = getattr(text, "sliding_window", None) or getattr(text, "attention_chunk_size", None)
    types = getattr(text, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
    if others := sorted(set(types) - {"full_attention"}):
        raise InputError(f"{folder}: has layers of {', '.join(others)}; take a model with full attention in each layer")
    if (largest := max(tokenizer.get_vocab().values())) >= text.vocab_size:
        raise InputError(f"{folder}: token {largest} has no row in the model; copy both from the same checkpoint")
    return config
