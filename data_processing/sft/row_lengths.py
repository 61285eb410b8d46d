"""Lengths of SFT rows in tokens, as the trainer counts them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from gream_verl.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_AT_ONCE = 1024
"""Rows given to a tokenizer at once: what it returns takes a hundred times the memory of the text."""


class Conversation(Protocol):
    """A system turn ("" when there is none), a question and an answer."""

    @property
    def system(self) -> str: ...  # noqa: D102
    @property
    def user(self) -> str: ...  # noqa: D102
    @property
    def assistant(self) -> str: ...  # noqa: D102


def turn_counter(
    tokenizer: PreTrainedTokenizerBase,
) -> Callable[[Sequence[Conversation]], npt.NDArray[np.int32]]:
    """Return a function that counts the tokens of rows: int32, prompt and response of each, ``[rows, 2]``.

    A prompt is what SRPO and the evaluation give the model, by the tokenizer's chat template. A response is the answer
    as it stands, with what the chat template closes it with. LLaMA-Factory encodes the two apart, and so does this.

    Raises:
        InputError: When the tokenizer is not a fast one, or has no chat template.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise InputError(
            f"{tokenizer.name_or_path}: not a fast tokenizer; save it with tokenizer.json, and load that one"
        )
    if not tokenizer.chat_template:
        raise InputError(
            f"{tokenizer.name_or_path}: has no chat template; give a tokenizer that has one, as chat models do"
        )
    marked = [{"role": "user", "content": "."}, {"role": "assistant", "content": "ANSWER"}]
    closing = tokenizer.apply_chat_template(marked, tokenize=False).rpartition("ANSWER")[2]

    def count(texts: list[str]) -> list[int]:
        return [len(encoding) for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def count_turns(rows: Sequence[Conversation]) -> npt.NDArray[np.int32]:
        counts: list[list[int]] = [[], []]
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[start : start + ROWS_AT_ONCE]
            counts[0] += count(render_prompts(tokenizer, part))
            counts[1] += count([row.assistant + closing for row in part])
        return np.array(counts, np.int32).T

    return count_turns


def render_prompts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Conversation]) -> list[str]:
    """Return what the model is given before it answers, by the tokenizer's chat template."""
    turns = [(("system", row.system), ("user", row.user)) for row in rows]
    chats = [[{"role": role, "content": text} for role, text in chat if text] for chat in turns]
    return tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
