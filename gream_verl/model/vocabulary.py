"""Semantic-ID (SID) tokens for a tokenizer and its model, before SFT.

SID tokens are ordinary added tokens: special ones vanish from decoded text. Their rows are drawn here, because resizing
leaves the padding rows of a base as they are, and new tokens of a Qwen3 stand in those. The rest of the base stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, write_json
from gream_verl.core.origin import KEY, mark
from gream_verl.core.semantic_ids import ItemIndex, parse_token
from gream_verl.core.token_text import TokenText
from gream_verl.model.loading import load_model, load_tokenizer
from gream_verl.model.saving import new_folder, save_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Rows = Literal["distribution", "mean"]
REASONING_TOKENS = ("<think>", "</think>")
ANSWER_TAGS = "<answer></answer>"
NOISE = 0.1
RECORD = "semantic_ids.json"
"""File of a checkpoint that says what was added to its base."""


def require_sid_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], model: str) -> None:
    """Refuse a tokenizer unless each of ``tokens`` is one ordinary token of it; ``model`` begins the error."""
    TokenText(tokenizer).check(tokens, model)
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    if found := special.intersection(tokens):
        raise InputError(f"{model}: {min(found)} is a special token, which decoding drops; run `gream model extend`")


def require_dialogue(tokenizer: PreTrainedTokenizerBase, model: str) -> None:
    """Refuse a tokenizer that cannot ask as SRPO and evaluation do, or cannot write an answer."""
    if not tokenizer.chat_template:
        raise InputError(f"{model}: has no chat template; take the instruct variant, or add its chat_template.jinja")
    ids = tokenizer.encode(ANSWER_TAGS, add_special_tokens=False)
    if (read := TokenText(tokenizer).read(ids).strip()) != ANSWER_TAGS:
        raise InputError(f"{model}: its tokenizer reads {ANSWER_TAGS} as {read!r}; take a base that can spell it")


def reasoning_tokens(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the reasoning tags that the pretrained model did not know, by its record or as far as they are added."""
    added = tokenizer.get_added_vocab()
    return read_record(folder).get("reasoning_tokens") or [token for token in REASONING_TOKENS if token in added]


def add_sid_tokens(tokenizer: PreTrainedTokenizerBase, index: ItemIndex) -> list[str]:
    """Add the reasoning tags and SID tokens that a tokenizer lacks, as ordinary tokens, and return them."""
    from transformers import AddedToken

    vocabulary = tokenizer.get_vocab()
    new = [token for token in (*REASONING_TOKENS, *index.tokens) if token not in vocabulary]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in new])
    return new


def padding_multiple(rows: int) -> int:
    """Return the largest power of two up to 128 that divides ``rows``, or 64 where it is below 8, which is chance.

    >>> padding_multiple(151_936), padding_multiple(32_008), padding_multiple(50_257)
    (128, 8, 64)
    """
    multiple = min(rows & -rows, 128)
    return multiple if multiple >= 8 else 64


def draw_rows(weight: torch.Tensor, trained: int, first: int, seed: int, kind: Rows) -> None:
    """Draw the rows of ``weight`` [vocabulary, hidden] from ``first`` on, in place.

    m, s and S are mean, standard deviation and covariance of the first ``trained`` rows, z is standard normal:

    1. ``distribution``: m + S^(1/2) z, rows that could be the base's own, as transformers' ``mean_resizing`` draws them
       (https://nlp.stanford.edu/~johnhew/vocab-expansion.html), whose S is too small for bfloat16 by 1e-9.
    2. ``mean``: m + 0.1 s z, for a base that is itself untrained.
    """
    import torch

    rows = weight[:trained].float()
    std, mean = torch.std_mean(rows, dim=0)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(weight) - first, weight.shape[1], generator=generator).to(weight.device)
    if kind == "mean":
        drawn = mean + NOISE * std * noise
    else:
        values, vectors = torch.linalg.eigh(torch.cov(rows.T, correction=0))
        drawn = mean + (noise * values.clamp(min=0).sqrt()) @ vectors.T
    weight[first:] = drawn.to(weight.dtype)


def extend_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    index: ItemIndex,
    *,
    rows: Rows = "distribution",
    seed: int = 0,
) -> dict[str, Any]:
    """Add the SID tokens of ``index`` and the missing reasoning tags to a model, in place.

    SID tokens that are there keep their rows. Every row after the base's tokens is drawn, padding included.

    Returns:
        The record of the change.
    """
    vocabulary = tokenizer.get_vocab()
    base, before = max(vocabulary.values()) + 1, model.get_input_embeddings().num_embeddings
    if base > before:
        raise InputError(f"the tokenizer has {base:,} tokens, the model {before:,} rows; they are not of one model")
    # SID rows of an earlier extension say nothing about the rows of text
    trained = min((number for token, number in vocabulary.items() if parse_token(token)), default=base)
    added = add_sid_tokens(tokenizer, index)
    if not added:
        raise InputError(f"{index.source}: the model knows each of its tokens already; use the model as it is")
    ids = tokenizer.convert_tokens_to_ids(added)
    multiple = padding_multiple(before)
    size = -(-max(before, max(ids) + 1) // multiple) * multiple
    model.resize_token_embeddings(size, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    setattr(model.config, KEY, mark(Path(index.source)))
    tied = head is None or head.weight is embedding.weight
    for offset, module in enumerate([embedding] if tied else [embedding, head]):
        draw_rows(module.weight.data, trained, base, seed + offset, rows)
    return {
        "levels": max(len(sid) for sid in index.sids.values()),
        "sid_tokens": len(index.tokens),
        "added": len(added),
        "reasoning_tokens": [token for token in added if token in REASONING_TOKENS],
        "first_id": min(ids),
        "last_id": max(ids),
        "rows_before": before,
        "rows_after": size,
        "multiple": multiple,
        "tied": tied,
        "rows": rows,
        "seed": seed,
    }


def extend_checkpoint(
    base: str, index_file: Path, output: Path, *, seed: int = 0, grow: bool = False, overwrite: bool = False
) -> dict[str, Any]:
    """Extend a base model, a name or a folder, and save it to ``output`` with a record of the change.

    With ``grow``, the base has SID tokens of an earlier state of the index: add the missing ones, keep every row.
    """
    import transformers

    index = ItemIndex.load(index_file)
    with new_folder(output, "extend", [base], replace=overwrite) as folder:
        tokenizer, earlier = load_tokenizer(base), read_record(base)
        known = [token for token in tokenizer.get_vocab() if parse_token(token)]
        if known and not grow:
            raise InputError(f"{base}: holds {len(known):,} SID tokens; add those of a grown index with --grow")
        require_sid_tokens(tokenizer, known, base)
        require_dialogue(tokenizer, base)
        tags = reasoning_tokens(base, tokenizer) if known else []
        model = load_model(base)
        done = extend_model(model, tokenizer, index, seed=seed)
        # tags of an earlier extension are as new to the pretrained model as ours
        done["reasoning_tokens"] = [*tags, *done["reasoning_tokens"]]
        record = {"base": base, **done, "transformers": transformers.__version__}
        if earlier:
            record["earlier"] = earlier
        save_model(model, tokenizer, folder, base)
        write_json(folder / RECORD, record, indent=1)
    return record


def read_record(folder: str | Path) -> dict[str, Any]:
    """Return the record of a checkpoint, empty where it has none."""
    file = Path(folder) / RECORD
    return dict(read_json(file)) if file.is_file() else {}
