"""Adds semantic-ID tokens to a tokenizer and its model, before SFT.

Two decisions, both learnt from what goes wrong elsewhere. SID tokens are ordinary added tokens, not special ones:
special tokens vanish from every decode that skips them, and some engines stop at them. And their embedding rows are
drawn here, on purpose (``embedding_rows``): bases such as Qwen3 have padding rows behind their vocabulary, which
resizing helpers hand out untouched.

What the base has stays: its tokens and their rows, special tokens, chat template, generation config, number format,
tied or untied head, and the multiple to which its embedding is padded.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, write_json
from gream_verl.core.semantic_ids import ItemIndex, parse_token
from gream_verl.model.embedding_rows import NOISE, Rows, add_texts, draw_rows, read_item_texts, text_shares
from gream_verl.model.folder import check_output, load_model, load_tokenizer, new_folder, reading, save_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REASONING_TOKENS = ("<think>", "</think>")
LARGEST_MULTIPLE, LEAST_MULTIPLE, DEFAULT_MULTIPLE = 128, 8, 64
MODEL_FILES = (".json", ".safetensors", ".bin", ".model", ".jinja")
"""Endings of the files that make a model."""
RECORD = "semantic_ids.json"
"""In a checkpoint: what was added to its base."""


def sid_token_ids(
    tokenizer: PreTrainedTokenizerBase, index: ItemIndex, model: str = "the model", rows: int | None = None
) -> dict[str, int]:
    """Return the token id of every SID token of ``index``, as :func:`token_ids` does."""
    return token_ids(tokenizer, index.tokens, model, rows)


def token_ids(
    tokenizer: PreTrainedTokenizerBase,
    tokens: Iterable[str],
    model: str = "the model",
    rows: int | None = None,
    allow_special: bool = False,
) -> dict[str, int]:
    """Return the token id of every one of ``tokens``, SID tokens.

    Args:
        tokenizer: The tokenizer.
        tokens: The tokens.
        model: Name or folder of the model, for messages.
        rows: Rows of its embedding, where they are known.
        allow_special: Take special tokens, too, as the authors' checkpoints have them.

    Raises:
        InputError: When one is not exactly one ordinary token of ``tokenizer``, or has no row.
    """
    vocabulary: Mapping[str, int] = tokenizer.get_vocab()
    tokens = list(tokens)
    if missing := [token for token in tokens if token not in vocabulary]:
        raise InputError(
            f"{model}: {len(missing)} of {len(tokens)} SID tokens, {missing[0]} among them, are not in the "
            "tokenizer; add them with `gream model extend`"
        )
    ids = {token: vocabulary[token] for token in tokens}
    special = {n for n, token in tokenizer.added_tokens_decoder.items() if token.special and not allow_special}
    encoded = tokenizer(tokens, add_special_tokens=False)["input_ids"] if tokens else []
    for wrong, what in (
        ([token for token in tokens if ids[token] in special], "special tokens, which vanish from decoded text"),
        ([token for token, own in zip(tokens, encoded, strict=True) if own != [ids[token]]], "not read as one token"),
        (
            [token for token in tokens if rows is not None and ids[token] >= rows],
            f"beyond the {rows} rows of the model",
        ),
    ):
        if wrong:
            raise InputError(
                f"{model}: {len(wrong)} SID tokens, {wrong[0]} among them, are {what}; make the model anew with "
                "`gream model extend`"
            )
    return ids


def reasoning_tokens(folder: str | Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return the reasoning tags that the pretrained model did not know.

    Without a record of what was added, as in what SFT wrote, these are all that are added tokens.
    """
    added = tokenizer.get_added_vocab()
    return read_record(folder).get("reasoning_tokens") or [token for token in REASONING_TOKENS if token in added]


def add_sid_tokens(tokenizer: PreTrainedTokenizerBase, index: ItemIndex) -> list[str]:
    """Add the reasoning tags and every SID token of ``index`` that ``tokenizer`` lacks, as ordinary tokens.

    Returns:
        The tokens added.
    """
    from transformers import AddedToken

    vocabulary = tokenizer.get_vocab()
    new = [token for token in (*REASONING_TOKENS, *index.tokens) if token not in vocabulary]
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in new])
    return new


def padding_multiple(rows: int) -> int:
    """Return the multiple to which an embedding of ``rows`` rows is padded.

    It is the largest power of two up to 128 that divides them. Less than 8 is chance, not padding: such a base gets 64,
    which suits the matrix units of every GPU.

    >>> padding_multiple(151_936), padding_multiple(32_008), padding_multiple(50_257)
    (128, 8, 64)
    """
    multiple = min(rows & -rows, LARGEST_MULTIPLE)
    return multiple if multiple >= LEAST_MULTIPLE else DEFAULT_MULTIPLE


def extend_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    index: ItemIndex,
    *,
    rows: Rows = "mean",
    texts: Mapping[str, str] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Add the SID tokens of ``index``, and the reasoning tags where they are no tokens, to a model, in place.

    Every row behind the base's tokens is drawn, also those that only fill the embedding up. SID tokens that are there
    keep their rows and ids.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        index: The item index.
        rows: How new rows are drawn, see ``embedding_rows``.
        texts: Item to its text; only for ``texts``.
        seed: Seed of the rows.

    Returns:
        What was done, as the record holds it.

    Raises:
        InputError: When the tokenizer has more tokens than the model has rows, or there is nothing to add.
    """
    vocabulary = tokenizer.get_vocab()
    base, before = max(vocabulary.values()) + 1, model.get_input_embeddings().num_embeddings
    if base > before:
        raise InputError(f"the tokenizer has {base:,} tokens, the model {before:,} rows; they are not of one model")
    trained = min((number for token, number in vocabulary.items() if parse_token(token)), default=base)
    added = add_sid_tokens(tokenizer, index)
    if not added:
        raise InputError(f"{index.source}: the model knows each of its tokens already; use the model as it is")
    ids = tokenizer.convert_tokens_to_ids(added)
    multiple = padding_multiple(before)
    size = -(-max(before, max(ids) + 1) // multiple) * multiple
    model.resize_token_embeddings(size, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or head.weight is embedding.weight
    weights = [embedding.weight.data] if tied else [embedding.weight.data, head.weight.data]
    for offset, weight in enumerate(weights):
        draw_rows(weight, trained, base, seed + offset, matched=rows == "distribution")
    if rows == "texts":
        levels = [level for level, _ in filter(None, map(parse_token, index.tokens))]
        shares = text_shares(tokenizer, index, texts or {}, size)
        for weight in weights:
            add_texts(weight, trained, base, tokenizer.convert_tokens_to_ids(index.tokens), levels, shares)
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
        "noise": NOISE,
        "seed": seed,
    }


def extend_checkpoint(
    base: str,
    index_file: Path,
    output: Path,
    *,
    items: Path | None = None,
    rows: Rows = "distribution",
    seed: int = 0,
    grow: bool = False,
    overwrite: bool = False,
) -> tuple[dict[str, Any], bool]:
    """Load a base model, add the SID tokens of an index, and save it with a record of what was done.

    Args:
        base: The base model, a name or a folder.
        index_file: The item index, ``<D>.index.json``.
        output: Folder of the new checkpoint.
        items: ``<D>.item.json``, for the rows ``texts``; default: beside the index.
        rows: How new rows are drawn, see ``embedding_rows``.
        seed: Seed of the rows.
        grow: The base has SID tokens of an earlier state of the index: add what is missing, keep every row there is.
        overwrite: Replace an output of other inputs, see ``model_folder``.

    Returns:
        The record, and whether the checkpoint was made now: one of the same inputs is kept.

    Raises:
        InputError: When the base cannot be loaded or has SID tokens, or the output cannot be replaced.
    """
    import torch
    import transformers

    from gream_verl import __version__

    if items and rows != "texts":
        raise InputError(f"--items {items}: only --rows texts reads it; leave it out, or give --rows texts")
    index = ItemIndex.load(index_file)
    texts = None
    if rows == "texts":
        name = index_file.name.removesuffix(".json").removesuffix(".index")
        items = items or index_file.with_name(f"{name}.item.json")
        texts = read_item_texts(items)
        if not any(texts.get(item, "").strip() for item in index.sids):
            raise InputError(f"{items}: has no text of any item of {index_file}; name its item file with --items")
    command, output = "extend", output.resolve()
    check_output(output, command, [base], replace=True)
    inputs = {
        "base": base,
        "base_fingerprint": base_fingerprint(base),
        "index": index_file.name,
        "tokens_sha256": _sha256(index.tokens),
        # texts go by the items under a code
        "texts_sha256": texts and _sha256(f"{index.text(item)} {texts.get(item)}" for item in index.sids),
        "rows": rows,
        "seed": seed,
    }
    record = read_record(output)
    if record and all(record.get(name) == value for name, value in inputs.items() if name not in ("base", "index")):
        return record, False
    with new_folder(output, command, [base], replace=overwrite) as folder:
        tokenizer = load_tokenizer(base)
        known = [token for token in tokenizer.get_vocab() if parse_token(token)]
        earlier = read_record(base)
        if known and not grow:
            when = f", {earlier['added']:,} tokens added to {earlier['base']}" if "base" in earlier else ""
            raise InputError(
                f"{base}: holds {len(known):,} SID tokens already{when}; extend the model it was made from, "
                "or give --grow to add only what a grown index has more"
            )
        token_ids(tokenizer, known, base)
        tags = reasoning_tokens(base, tokenizer) if known else []
        model = load_model(base)
        done = extend_model(model, tokenizer, index, rows=rows, texts=texts, seed=seed)
        # Tags that an earlier extension added are as new to the pretrained model as ours.
        done["reasoning_tokens"] = [*tags, *done["reasoning_tokens"]]
        versions = {"gream_verl": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
        record = {**inputs, **done, "versions": versions, **({"earlier": earlier} if earlier else {})}
        save_model(model, tokenizer, folder, base)
        write_json(folder / RECORD, record, indent=1)
    return record, True


def base_fingerprint(base: str) -> str:
    """Return what tells one base model from another: its revision on the hub, or a hash of the files of its folder."""
    if not Path(base).is_dir():
        from transformers import AutoConfig

        with reading(base):
            return f"revision {AutoConfig.from_pretrained(base)._commit_hash}"
    from gream_verl.core.files import fingerprint

    files = sorted(file for file in Path(base).iterdir() if file.suffix in MODEL_FILES and file.name[0] != ".")
    return f"sha256 {_sha256(f'{file.name} {fingerprint(file)}' for file in files)}"


def read_record(folder: str | Path) -> dict[str, Any]:
    """Return the record of a checkpoint, empty when there is none.

    Raises:
        InputError: When the file is no record.
    """
    file = Path(folder) / RECORD
    record = read_json(file) if file.is_file() else {}
    if not isinstance(record, dict):
        raise InputError(f"{file}: not a record of `gream model extend`; delete it")
    return record


def _sha256(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
