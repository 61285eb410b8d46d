"""The prompts of test users, from any of three places, and the model that answers them.

From a file of ours (``<D>-test.parquet``), from a file of the authors' (verl's columns, where a row says neither user
nor item nor history), or made of ``<D>.inter.json`` in the very words in which `gream data rl` writes them.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import polars as pl
import torch
from torch import Tensor

from gream_verl.core.errors import InputError
from gream_verl.core.files import require_file
from gream_verl.core.prompts import messages
from gream_verl.core.rsvr import Mode
from gream_verl.core.semantic_ids import SID_TOKEN, ItemIndex, SemanticId, find_sids, parse_sid
from gream_verl.core.split import read_interactions, read_splits

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MODES: tuple[Mode, ...] = ("direct", "reasoning")
REMEDY = "make it with `gream data rl`"
ATTENTION = "full_attention"
_SIDS = re.compile(f"(?:{SID_TOKEN.pattern})+")

Row = TypeVar("Row")


@dataclass(frozen=True)
class Prompt:
    """One user to recommend for.

    Attributes:
        user: User id.
        target: The item that comes next in truth.
        history: All items before the target, in time order; only those shown where the file says no more.
        messages: The conversation so far, as ``{"role", "content"}``.
        truth: The SID of the target, as text.
        whole: Whether the history is all of it, and not only what the messages show.
    """

    user: str
    target: str
    history: tuple[str, ...]
    messages: list[dict[str, str]]
    truth: str
    whole: bool = True


@dataclass(frozen=True)
class Wording:
    """What prompts have in common.

    Attributes:
        history: The most items that a prompt may show; of prompts that were read, the most that one of them shows.
        template: The user's turn, with ``{history}``; where there are several, their number and one of them.
        system: The system's turn, "" for none; likewise.
        between_items: What stands between the SIDs of two items; likewise.
    """

    history: int
    template: str
    system: str
    between_items: str = ""


def read_prompts(
    path: str | os.PathLike[str],
    prompt_type: Mode,
    *,
    index: ItemIndex | None = None,
    limit: int | None = None,
    seed: int = 0,
    skip: bool = False,
) -> tuple[list[Prompt], int]:
    """Read the prompts of one type from a parquet file with verl's columns.

    Rows are of a type by ``extra_info.type``; where no row says ``direct`` or ``reasoning`` there, all rows are taken.
    What a row does not say is found out: the target from the ground truth, a SID alone or in ``<answer>``; the history
    from the SIDs in the last turn of the user; the user is the number of the row, from 0.

    Args:
        path: ``<D>-test.parquet``, ``<D>-val.parquet``, or another such file.
        prompt_type: Which rows: ``direct`` or ``reasoning``.
        index: The items; needed where rows do not name theirs. Targets are checked against it.
        limit: Take a random sample of so many users, in the order of the file; None takes all.
        seed: Seed of the sample. The same seed gives the same users for both types.
        skip: Leave out users whose target is not recommended, instead of refusing the file.

    Returns:
        The prompts, and how many the file holds.

    Raises:
        InputError: When the file is missing, is damaged, has no such row, or has a row that cannot be used.
    """
    table = _read_table(path, "prompt", "reward_model")
    types = _types(table)
    everything = not any(mode in types for mode in MODES)
    chosen = [number for number, kind in enumerate(types) if everything or kind == prompt_type]
    if not chosen:
        raise InputError(f"{path}: no row of type {prompt_type!r}; {REMEDY}")
    items = {sid: item for item, sid in index.sids.items()} if index is not None else None
    prompts = []
    sample = _sample(chosen, limit, seed)
    for number, row in zip(sample, table[sample].iter_rows(named=True), strict=True):
        place = f"{path}: row {number}"
        prompt = _read_row(row, number, items, place)
        if index is None or _is_recommended(prompt.target, index, place, skip):
            prompts.append(prompt)
    _check_users(prompts, f"{path}, rows of type {prompt_type!r}")
    return prompts, len(chosen)


def types_of(path: str | os.PathLike[str]) -> tuple[Mode, ...]:
    """Return the modes that the rows of a parquet file are for: both where the rows do not say.

    Raises:
        InputError: When the file is missing or damaged.
    """
    found = _types(_read_table(path))
    return tuple(mode for mode in MODES if mode in found) or MODES


def make_prompts(
    inter_file: str | os.PathLike[str],
    index: ItemIndex,
    mode: Mode,
    *,
    split: str = "test",
    history: int = 20,
    template: str | None = None,
    system: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    skip: bool = False,
) -> tuple[list[Prompt], int]:
    """Make the prompts for what the split holds out of every user, as `gream data rl` writes them.

    Args:
        inter_file: ``<D>.inter.json``; how it is split is what ``gream_verl.core.split`` says.
        index: The items.
        mode: ``direct`` or ``reasoning``.
        split: ``val`` or ``test``.
        history: Items shown, the most recent ones.
        template: The user's turn, with ``{history}``; None for that of the mode.
        system: The system's turn, "" for none; None for that of the mode.
        limit: Take a random sample of so many users, in the order of the file; None takes all.
        seed: Seed of the sample.
        skip: Leave out users whose target is not recommended, instead of refusing the file.

    Returns:
        The prompts, and how many users have an interaction that is held out.

    Raises:
        InputError: When a file is missing or malformed, no user has such an interaction, or an item has no SID.
    """
    sequences = read_interactions(inter_file)
    held_out = [
        (user, position)
        for user, parts in read_splits(inter_file, sequences).items()
        if (position := parts.test if split == "test" else parts.validation) is not None
    ]
    if not held_out:
        raise InputError(
            f"{inter_file}: no user has an interaction for {split}; bring longer histories, or split otherwise"
        )
    prompts = []
    for user, position in _sample(held_out, limit, seed):
        place = f"{inter_file}: user {user!r}"
        past, target = sequences[user][:position], sequences[user][position]
        if not _is_recommended(target, index, place, skip):
            continue
        unknown = next((item for item in past[-history:] if item not in index.sids), None)
        if unknown is not None:
            raise InputError(f"{place}: item {unknown!r} is not in {index.source}; add it with `gream index add`")
        turns = messages("".join(index.texts(past[-history:])), mode, template, system)
        prompts.append(Prompt(user, target, tuple(past), turns, index.text(target)))
    _check_users(prompts, inter_file)
    return prompts, len(held_out)


def prompts_digest(prompts: Sequence[Prompt]) -> str:
    """Return the SHA-256 of users, targets and messages in their order, in hexadecimal: what a model is asked."""
    digest = hashlib.sha256()
    for prompt in prompts:
        turns = [[turn["role"], turn["content"]] for turn in prompt.messages]
        digest.update(json.dumps([prompt.user, prompt.target, turns]).encode())
    return digest.hexdigest()


def wording(prompts: Sequence[Prompt]) -> Wording:
    """Return what the prompts of a file have in common.

    >>> turn = {"role": "user", "content": "Had <|a_1|><|b_2|>, <|a_3|><|b_1|>. Next?"}
    >>> wording([Prompt("0", "7", (), [turn], "")])
    Wording(history=2, template='Had {history}. Next?', system='', between_items=', ')
    """
    most = 0
    templates: Counter[str] = Counter()
    systems: Counter[str] = Counter()
    between: Counter[str] = Counter()
    for prompt in prompts:
        systems["\n".join(turn["content"] for turn in prompt.messages if turn["role"] == "system")] += 1
        text = _last_question(prompt.messages)
        runs, shown = list(_SIDS.finditer(text)), text.count("<|a_")
        most = max(most, shown)
        if runs:
            between.update(text[left.end() : right.start()] for left, right in pairwise(runs))
            between[""] += shown - len(runs)
            text = f"{text[: runs[0].start()]}{{history}}{text[runs[-1].end() :]}"
        templates[text] += 1
    return Wording(most, _common(templates), _common(systems), _common(+between))


def _common(texts: Counter[str]) -> str:
    """Return the only text, or how many there are and the most frequent."""
    if len(texts) < 2:
        return next(iter(texts), "")
    return f"{len(texts)} different ones, most often {texts.most_common(1)[0][0]!r}"


def _read_table(path: str | os.PathLike[str], *columns: str) -> pl.DataFrame:
    """Read some columns of a parquet file, and ``extra_info`` where it is there."""
    path = require_file(path, REMEDY)
    try:
        there = ["extra_info"] if "extra_info" in pl.read_parquet_schema(path) else []
        return pl.read_parquet(path, columns=[*columns, *there])
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{path}: not a file of test prompts ({error}); {REMEDY}") from error


def _types(table: pl.DataFrame) -> list[Any]:
    """Return ``extra_info.type`` of every row, None where a row has none."""
    kind = table.schema.get("extra_info")
    if isinstance(kind, pl.Struct) and "type" in [field.name for field in kind.fields]:
        return table["extra_info"].struct.field("type").to_list()
    return [None] * table.height


def _read_row(row: Mapping[str, Any], number: int, items: Mapping[SemanticId, str] | None, place: str) -> Prompt:
    """Return the prompt of a row.

    Args:
        row: The row.
        number: Its number, which names the user where the row does not.
        items: SID to item; None when the index was not given.
        place: What messages begin with.
    """
    info = row.get("extra_info") or {}
    try:
        turns = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in row["prompt"]]
        truth = row["reward_model"]["ground_truth"]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{place}: not a row of test prompts ({error!r}); expected prompt [{{role, content}}] and "
            "reward_model.ground_truth, as `gream data rl` writes them"
        ) from error
    sid = parse_sid(_answer(truth)) if isinstance(truth, str) else None
    if sid is None:
        raise InputError(
            f"{place}: reward_model.ground_truth is {truth!r}; expected a SID such as '<|a_1|><|b_7|>', alone or in "
            "<answer></answer>"
        )
    item, history, user = info.get("item"), info.get("history"), info.get("user")
    return Prompt(
        user=str(number if user is None else user),
        target=_item(sid, items, place) if item is None else str(item),
        history=tuple(
            [_item(shown, items, place) for shown in find_sids(_last_question(turns))]
            if history is None
            else map(str, history)
        ),
        messages=turns,
        truth="".join(sid),
        whole=history is not None,
    )


def _answer(truth: str) -> str:
    """Return what stands in the last ``<answer>``, or the whole text where there is none."""
    return truth.rpartition("<answer>")[2].partition("</answer>")[0].strip()


def _last_question(turns: Sequence[Mapping[str, str]]) -> str:
    return next((turn["content"] for turn in reversed(turns) if turn["role"] == "user"), "")


def _item(sid: SemanticId, items: Mapping[SemanticId, str] | None, place: str) -> str:
    if items is None:
        raise InputError(f"{place}: does not name its items; give the item index, too")
    if sid not in items:
        raise InputError(
            f"{place}: {''.join(sid)} is no item of the index; take the index that the file was made with, or make the "
            "file anew with `gream data rl`"
        )
    return items[sid]


def _is_recommended(target: str, index: ItemIndex, place: str, skip: bool) -> bool:
    """Return whether a target can be recommended; where not, refuse it unless such users are to be left out."""
    if target in index.sids:
        return True
    if skip:
        return False
    raise InputError(
        f"{place}: the target {target!r} cannot be recommended: in {index.source} it is not there; add it, or leave "
        "such users out with --skip-missing"
    )


def _check_users(prompts: Sequence[Prompt], source: str | os.PathLike[str]) -> None:
    """Refuse a user with two prompts, and a selection without users."""
    if not prompts:
        raise InputError(f"{source}: no user is left; the index recommends none of the targets: build it anew")
    user, count = Counter(prompt.user for prompt in prompts).most_common(1)[0]
    if count > 1:
        raise InputError(
            f"{source}: user {user!r} stands in {count} rows; give a file with one held-out item a user, such as "
            "<D>-test.parquet"
        )


def _sample(rows: Sequence[Row], limit: int | None, seed: int) -> list[Row]:
    """Draw ``limit`` rows, in their order; all when None."""
    if limit is None or limit >= len(rows):
        return list(rows)
    return [rows[place] for place in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def load_tokenizer(folder: str | os.PathLike[str]) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    """Load what a model's folder says of it, and its tokenizer.

    Raises:
        InputError: When the folder is no Hugging Face model, or one that cannot be evaluated.
    """
    from transformers import AutoConfig, AutoTokenizer

    if not (Path(folder) / "config.json").is_file():
        raise InputError(f"{folder}: no Hugging Face model (config.json is missing); train one or check the path")
    try:
        config, tokenizer = AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: the model cannot be loaded ({error}); copy or train it anew") from error
    _check_attention(config.get_text_config(decoder=True), folder)
    largest = max(tokenizer.get_vocab().values())
    if largest >= config.get_text_config().vocab_size:
        raise InputError(
            f"{folder}: the tokenizer has a token number {largest}, but the model only "
            f"{config.get_text_config().vocab_size} tokens; copy both from the same checkpoint"
        )
    return config, tokenizer


def load_model(folder: str | os.PathLike[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model for evaluation, on an accelerator where there is one, in float32 on a CPU.

    Raises:
        InputError: When the folder is no Hugging Face model, or one that cannot be evaluated.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    _, tokenizer = load_tokenizer(folder)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto" if device == "cuda" else torch.float32, attn_implementation="sdpa"
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder}: the model cannot be loaded ({error}); copy or train it anew") from error
    return model.to(device).eval(), tokenizer


def _check_attention(config: PretrainedConfig, folder: str | os.PathLike[str]) -> None:
    """Refuse a model whose layers do not all see the whole prompt: the mask of the beam search lets them."""
    types = getattr(config, "layer_types", None)
    if types is None:  # what the cache of transformers makes of such a configuration
        window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
        types = [ATTENTION] if window is None else ["sliding_attention"]
    other = sorted(set(types) - {ATTENTION})
    if other:
        raise InputError(
            f"{folder}: the model has layers of {', '.join(other)}, but the beam search needs {ATTENTION} in every "
            "layer, as Qwen3 has it; take such a model"
        )


def encode(prompts: Sequence[Prompt], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the token ids of every prompt, up to where the assistant begins to answer.

    Raises:
        InputError: When the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise InputError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template; copy chat_template.jinja to it"
        )
    texts = [
        tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, tokenize=False) for prompt in prompts
    ]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def check_room(sequences: Sequence[Sequence[int]], config: PretrainedConfig, tokens: int) -> None:
    """Check that ``tokens`` more fit behind every prompt.

    Raises:
        InputError: When the model takes fewer positions.
    """
    longest, positions = max(map(len, sequences)), config.max_position_embeddings
    if longest + tokens > positions:
        raise InputError(
            f"{config.name_or_path}: the longest prompt has {longest} tokens and {tokens} more are needed, but the "
            f"model takes {positions}; make the prompts anew with a shorter history, or allow fewer tokens"
        )


def batches(sequences: Sequence[Sequence[int]], size: int) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Group sequences of like length, the longest first, so that memory runs out at once or never.

    Args:
        sequences: Token ids.
        size: Sequences a batch.

    Yields:
        The places of a batch in ``sequences``, ``input_ids`` and ``attention_mask``, both int64 [size, length] and
        padded on the left.
    """
    order = sorted(range(len(sequences)), key=lambda place: (-len(sequences[place]), place))
    for start in range(0, len(order), size):
        places = order[start : start + size]
        length = len(sequences[places[0]])
        ids = torch.zeros((len(places), length), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, place in enumerate(places):
            sequence = sequences[place]
            ids[row, length - len(sequence) :] = torch.tensor(sequence)
            mask[row, length - len(sequence) :] = 1
        yield places, ids, mask
