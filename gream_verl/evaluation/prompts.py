"""The prompts of test users, and the model that answers them."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl
import torch
from torch import Tensor

from gream_verl.files import InputError, require_file
from gream_verl.rsvr import Mode

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prompt:
    """One user to recommend for.

    Attributes:
        user: User id.
        target: The item that comes next in truth.
        history: All items before the target, in time order.
        messages: The conversation so far, as ``{"role", "content"}``.
        truth: The SID of the target, as text.
    """

    user: str
    target: str
    history: tuple[str, ...]
    messages: list[dict[str, str]]
    truth: str


def read_prompts(
    path: str | os.PathLike[str], prompt_type: Mode, *, limit: int | None = None, seed: int = 0
) -> tuple[list[Prompt], int]:
    """Read the prompts of one type from ``<D>-test.parquet`` or ``<D>-val.parquet``.

    Args:
        path: The parquet file.
        prompt_type: Which rows: ``direct`` or ``reasoning``.
        limit: Take a random sample of so many users, in the order of the file; None takes all.
        seed: Seed of the sample. The same seed gives the same users for both types.

    Returns:
        The prompts, and how many the file holds.

    Raises:
        InputError: When the file is missing, is damaged, or has no such row.
    """
    path = require_file(path, "make it with `gream data rl`")
    try:
        table = pl.read_parquet(path, columns=["prompt", "reward_model", "extra_info"])
        rows = [row for row in table.iter_rows(named=True) if row["extra_info"]["type"] == prompt_type]
        prompts = [
            Prompt(
                user=row["extra_info"]["user"],
                target=row["extra_info"]["item"],
                history=tuple(row["extra_info"]["history"]),
                messages=row["prompt"],
                truth=row["reward_model"]["ground_truth"],
            )
            for row in rows
        ]
    except (pl.exceptions.PolarsError, KeyError, TypeError) as error:
        raise InputError(
            f"{path}: not a file of test prompts ({error!r}); make it anew with `gream data rl`"
        ) from error
    if not prompts:
        raise InputError(f"{path}: no row of type {prompt_type!r}; make the file anew with `gream data rl`")
    total = len(prompts)
    if limit is not None and limit < total:
        prompts = [prompts[place] for place in sorted(random.Random(seed).sample(range(total), limit))]
    return prompts, total


def load_model(folder: str | os.PathLike[str]) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model for evaluation, on an accelerator where there is one, in float32 on a CPU.

    Raises:
        InputError: When the folder is no Hugging Face model.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if not (Path(folder) / "config.json").is_file():
        raise InputError(f"{folder}: no Hugging Face model (config.json is missing); train one or check the path")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype="auto" if device == "cuda" else torch.float32, attn_implementation="sdpa"
        )
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: the model cannot be loaded ({error}); copy or train it anew") from error
    return model.to(device).eval(), tokenizer


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


def check_room(sequences: Sequence[Sequence[int]], model: PreTrainedModel, tokens: int) -> None:
    """Check that ``tokens`` more fit behind every prompt.

    Raises:
        InputError: When the model takes fewer positions.
    """
    longest, positions = max(map(len, sequences)), model.config.max_position_embeddings
    if longest + tokens > positions:
        raise InputError(
            f"{model.name_or_path}: the longest prompt has {longest} tokens and {tokens} more are needed, but the "
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
