"""Adds semantic-ID tokens to a tokenizer and its model, before SFT.

Two decisions, both learnt from what goes wrong elsewhere. SID tokens are ordinary added tokens, not special ones:
special tokens vanish from every decode that skips them, and some engines stop at them. And their embedding rows are
drawn here, on purpose: bases such as Qwen3 have padding rows behind their vocabulary, which resizing helpers hand out
untouched.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gream_verl.files import InputError
from gream_verl.semantic_ids import ItemIndex

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REASONING_TOKENS = ("<think>", "</think>")
VOCABULARY_MULTIPLE = 64
NOISE = 0.1


def sid_token_ids(tokenizer: PreTrainedTokenizerBase, index: ItemIndex, model: str = "the model") -> dict[str, int]:
    """Return the token id of every SID token of ``index``.

    Raises:
        InputError: When a SID token is not exactly one token of ``tokenizer``.
    """
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    missing = [token for token in index.tokens if token not in vocabulary]
    if missing:
        raise InputError(
            f"{model}: {len(missing)} of {len(index.tokens)} SID tokens, {missing[0]} among them, are not in the "
            "tokenizer; add them with `gream model extend`"
        )
    return {token: vocabulary[token] for token in index.tokens}


def add_sid_tokens(tokenizer: PreTrainedTokenizerBase, index: ItemIndex) -> int:
    """Add the reasoning tags and every SID token of ``index`` that ``tokenizer`` lacks, as ordinary tokens.

    Returns:
        The number of tokens added.
    """
    from transformers import AddedToken

    vocabulary = tokenizer.get_vocab()
    new = [token for token in (*REASONING_TOKENS, *index.tokens) if token not in vocabulary]
    return tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in new])


def extend_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, index: ItemIndex, *, seed: int = 0
) -> list[int]:
    """Add the SID tokens of ``index`` to ``tokenizer`` and ``model``, in place.

    Every new row of the input embedding (and of the output head, where it is not tied) is the mean of the base
    vocabulary's rows plus a tenth of their standard deviation in noise: close to no opinion, yet all different. Rows of
    the base vocabulary keep their values; all rows behind it, padding included, are drawn; rows are a multiple of 64.

    Returns:
        The ids of the new tokens.
    """
    base = len(tokenizer)
    added = add_sid_tokens(tokenizer, index)
    if not added:
        return []
    size = max(len(tokenizer), model.config.vocab_size)
    size = -(-size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    model.resize_token_embeddings(size, mean_resizing=False)
    weights = [model.get_input_embeddings().weight]
    head = model.get_output_embeddings()
    if head is not None and head.weight is not weights[0]:
        weights.append(head.weight)
    for offset, weight in enumerate(weights):
        _draw_rows(weight.data, base, seed + offset)
    return list(range(base, base + added))


def _draw_rows(weight: torch.Tensor, base: int, seed: int) -> None:
    """Fill the rows of ``weight`` [vocabulary, hidden] from ``base`` on by the mean and spread of those before."""
    import torch

    trained = weight[:base].float()
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(weight) - base, weight.shape[1], generator=generator).to(weight.device)
    weight[base:] = (trained.mean(0) + NOISE * trained.std(0) * noise).to(weight.dtype)


def extend_checkpoint(base: str, index_file: str | Path, output: str | Path, *, seed: int = 0) -> int:
    """Load ``base`` (a name or a folder), add the SID tokens of ``index_file``, and save to ``output``.

    Returns:
        The number of tokens added.

    Raises:
        InputError: When the base cannot be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    index = ItemIndex.load(index_file)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    except (OSError, ValueError) as error:
        raise InputError(f"{base}: cannot be loaded as a causal language model ({error})") from error
    added = extend_model(model, tokenizer, index, seed=seed)
    save_checkpoint(model, tokenizer, output)
    return len(added)


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: str | Path) -> None:
    """Save model and tokenizer to a folder that appears only when both are complete."""
    import tempfile

    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        folder = Path(temporary) / "checkpoint"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if output.exists():
            output.rename(Path(temporary) / "previous")
        folder.rename(output)
