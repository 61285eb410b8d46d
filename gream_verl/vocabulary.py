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
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gream_verl.embedding_rows import NOISE, Rows, add_texts, draw_rows, read_item_texts, text_shares
from gream_verl.files import InputError, read_json, write_json
from gream_verl.semantic_ids import ItemIndex, parse_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REASONING_TOKENS = ("<think>", "</think>")
LARGEST_MULTIPLE, LEAST_MULTIPLE, DEFAULT_MULTIPLE = 128, 8, 64
MODEL_FILES = (".json", ".safetensors", ".bin", ".model", ".jinja")
"""Endings of the files that make a model."""
RECORD = "semantic_ids.json"
"""In a checkpoint: what was added to its base."""
MANIFEST = ".gream.json"
"""In a checkpoint: the files we wrote, with their sizes. A folder that holds anything else is not ours to replace."""


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
        InputError: When the tokenizer has more tokens than the model has rows, or ``texts`` has none of the items.
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
        "levels": max(len(sid) for sid in index.readable.values()),
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
        items: ``<D>.item.json``; default: beside the index. Read only for the rows ``texts``.
        rows: How new rows are drawn, see ``embedding_rows``.
        seed: Seed of the rows.
        grow: The base has SID tokens of an earlier state of the index: add what is missing, keep every row there is.
        overwrite: Replace an output of other inputs, when it is a folder that we wrote and nobody added to.

    Returns:
        The record, and whether the checkpoint was made now: one of the same inputs is kept.

    Raises:
        InputError: When the base cannot be loaded or has SID tokens, or the output cannot be replaced.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gream_verl import __version__
    from gream_verl.evaluation.protocol import fingerprint

    if output.resolve() == Path(base).resolve():
        raise InputError(f"{output}: is the base itself; choose another folder")
    index = ItemIndex.load(index_file)
    items = items or index_file.with_name(index_file.name.removesuffix(".json").removesuffix(".index") + ".item.json")
    texts = read_item_texts(items) if rows == "texts" else None
    inputs = {
        "base": base,
        "base_fingerprint": base_fingerprint(base),
        "index": index_file.name,
        "index_sha256": fingerprint(index_file),
        "items_sha256": fingerprint(items) if texts else None,
        "rows": rows,
        "seed": seed,
    }
    if is_ours(output):
        record = read_json(output / RECORD) if (output / RECORD).is_file() else {}
        if all(record.get(name) == value for name, value in inputs.items() if name != "base"):
            return record, False
        if not overwrite:
            raise InputError(f"{output}: made of other inputs; replace it with --overwrite, or choose another folder")
    refuse_foreign(output)
    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
        if not grow:
            _refuse_sid_tokens(base, tokenizer)
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{base}: cannot be loaded as a causal language model ({error})") from error
    done = extend_model(model, tokenizer, index, rows=rows, texts=texts, seed=seed)
    versions = {"gream_verl": __version__, "transformers": transformers.__version__, "torch": torch.__version__}
    earlier = _read_record(base)
    record = {**inputs, **done, "versions": versions}
    if earlier:  # the base was extended before: its reasoning tags are as new to the pretrained model as ours
        tags = [*earlier["reasoning_tokens"], *done["reasoning_tokens"]]
        record |= {"reasoning_tokens": tags, "earlier": earlier}
    save_checkpoint(model, tokenizer, output, record)
    return record, True


def base_fingerprint(base: str) -> str:
    """Return what tells one base model from another: its revision on the hub, or a hash of the files of its folder."""
    if not Path(base).is_dir():
        from transformers import AutoConfig

        try:
            return f"revision {AutoConfig.from_pretrained(base)._commit_hash}"
        except (OSError, ValueError) as error:
            raise InputError(f"{base}: cannot be loaded as a causal language model ({error})") from error
    from gream_verl.evaluation.protocol import fingerprint

    files = sorted(file for file in Path(base).iterdir() if file.suffix in MODEL_FILES and file.name[0] != ".")
    lines = "".join(f"{file.name} {fingerprint(file)}\n" for file in files)
    return f"sha256 {hashlib.sha256(lines.encode()).hexdigest()}"


def _refuse_sid_tokens(base: str, tokenizer: PreTrainedTokenizerBase) -> None:
    there = [token for token in tokenizer.get_vocab() if parse_token(token)]
    if not there:
        return
    when = ""
    if record := _read_record(base):
        date = time.strftime("%Y-%m-%d", time.localtime((Path(base) / RECORD).stat().st_mtime))
        when = f", {record['added']:,} tokens of {record['index']} added to {record['base']} on {date}"
    raise InputError(
        f"{base}: holds {len(there):,} SID tokens already{when}; extend the model it was made from, "
        "or give --grow to add only what a grown index has more"
    )


def _read_record(base: str) -> dict[str, Any]:
    file = Path(base) / RECORD
    return read_json(file) if file.is_file() else {}


def is_ours(folder: Path) -> bool:
    """Return whether ``folder`` holds what :func:`save_checkpoint` wrote there, whole, and nothing else."""
    if not (folder / MANIFEST).is_file():
        return False
    files = read_json(folder / MANIFEST)
    there = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != MANIFEST and path.is_file()}
    return there == files and not any(path.is_dir() for path in folder.iterdir())


def refuse_foreign(folder: Path) -> None:
    """Raise InputError when ``folder`` is not free to be written: it holds something that is not ours alone."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not is_ours(folder)):
        raise InputError(
            f"{folder}: exists, and holds what this command did not write; delete it or choose another folder"
        )


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    output: str | Path,
    record: Mapping[str, Any] | None = None,
) -> None:
    """Save model, tokenizer and record to a folder that appears only when all are complete.

    An earlier checkpoint is replaced when we wrote it and nobody added to it.

    Raises:
        InputError: When there is something else at ``output``.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    with new_folder(Path(output)) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if record:
            write_json(folder / RECORD, record, indent=1)


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``output``, with a manifest, when the block ends without an error.

    Raises:
        InputError: When ``output`` is there and is not ours to replace.
    """
    refuse_foreign(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as temporary:
        folder = Path(temporary) / "new"
        folder.mkdir()
        yield folder
        write_json(folder / MANIFEST, {path.name: path.stat().st_size for path in sorted(folder.iterdir())}, indent=1)
        if output.exists():
            output.rename(Path(temporary) / "previous")
        folder.rename(output)
