"""Lengths of SFT rows in tokens; histories short enough that the trainer cuts no row, which would cost its answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from data_processing.sft.tasks import LENGTH, Corpus, SftRow, Specs
from gream_verl.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_AT_ONCE = 1024
"""Rows given to a tokenizer, whose output takes a hundred times the memory of the text."""


@dataclass(frozen=True)
class LengthLimit:
    """A function that counts the tokens of whole rows, and the most of them in a row: the trainer's ``cutoff_len``."""

    count_tokens: Callable[[Sequence[SftRow]], Sequence[int]]
    longest: int

    def fit(self, corpus: Corpus, task: str, specs: Specs) -> npt.NDArray[np.int32]:
        """Shorten histories of one task, item by item from the oldest, until rows fit or one item is left.

        Changes ``specs`` in place and returns the tokens of every row, ``[rows]``. The history for which a language
        model wrote a chain stays whole.
        """
        tokens = np.array(self.count_tokens([corpus.row(task, *spec) for spec in specs.tolist()]), np.int32)
        while len(long := np.flatnonzero((tokens > self.longest) & (specs[:, LENGTH] > 1))):
            if corpus.has_chains(task):
                break
            specs[long, LENGTH] -= 1
            tokens[long] = self.count_tokens([corpus.row(task, *spec) for spec in specs[long].tolist()])
        return tokens


def token_counter(tokenizer: PreTrainedTokenizerBase) -> Callable[[Sequence[SftRow]], list[int]]:
    """Return a function that counts the tokens of rows.

    A prompt is that of SRPO and the evaluation, by the tokenizer's chat template. A response is the answer with the
    text by which the chat template closes it. LLaMA-Factory, too, encodes the two apart.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not tokenizer.chat_template:
        raise InputError(f"{tokenizer.name_or_path}: not a fast tokenizer with a chat template; give a chat model's")
    marked = [{"role": "user", "content": "."}, {"role": "assistant", "content": "ANSWER"}]
    closing = tokenizer.apply_chat_template(marked, tokenize=False).rpartition("ANSWER")[2]

    def count(rows: Sequence[SftRow]) -> list[int]:
        counts: list[int] = []
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = rows[start : start + ROWS_AT_ONCE]
            texts = [*render_prompts(tokenizer, part), *(row.assistant + closing for row in part)]
            sizes = [len(encoding) for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
            counts += map(sum, zip(sizes[: len(part)], sizes[len(part) :], strict=True))
        return counts

    return count


def render_prompts(tokenizer: PreTrainedTokenizerBase, rows: Sequence[SftRow]) -> list[str]:
    """Return the text that the model is given before it answers, by the tokenizer's chat template."""
    turns = [(("system", row.system), ("user", row.user)) for row in rows]
    chats = [[{"role": role, "content": text} for role, text in chat if text] for chat in turns]
    return tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
