"""The questions of RL and evaluation: their targets, and their wording."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from gream_verl.core.rsvr import Mode
from gream_verl.core.semantic_ids import SID_TOKEN

FIRST_REASONING_TARGET = 4
"""Position (from 0) of a user's first interaction with enough before it to reason about: the 5th."""

NO_TARGET = f"no user has {FIRST_REASONING_TARGET + 1} interactions for training; bring longer histories"

SYSTEM: Mapping[Mode, str] = {
    "direct": "",
    "reasoning": "Reason first: evidence, preference, intent. Then the items that matter, then the answer.",
}
"""The system's turn in each mode, "" for none."""

TEMPLATES: Mapping[Mode, tuple[str, ...]] = {
    "direct": (
        "History: {history} Next item?",
        "A user chose, in this order: {history} What comes next?",
        "{history} Continue this sequence with one item.",
        "After {history} which item will the user take?",
        "Given the past items {history} name the next one.",
        "The user has had {history} Recommend one item.",
        "Past: {history} Predict the next interaction.",
        "Items so far: {history} The following item is?",
        "Which item fits best after {history}?",
        "Look at {history} and give the item that follows.",
        "Here is what a user went through: {history} Guess the next pick.",
        "With {history} behind them, what will this user want now?",
        "Log: {history} Next entry?",
        "Someone enjoyed {history} Suggest what to have next.",
        "Ordered history: {history} Output the next item only.",
        "Extend {history} by one step.",
        "From {history} infer the coming choice.",
    ),
    "reasoning": (
        "History: {history} Think, then recommend the next item.",
        "A user chose, in this order: {history} Reason first, then say what comes next.",
        "{history} Think about this sequence, then continue it with one item.",
        "Past: {history} Explain the taste, then predict the next interaction.",
        "The user has had {history} Weigh what fits, then recommend one item.",
        "Items so far: {history} Give your reasons and the item that follows.",
        "Given {history} think step by step and name the next one.",
        "Look at {history} First the thought, then the next pick.",
    ),
}
"""The user's turn; ``{history}`` is the semantic IDs, oldest first. Training draws one; the evaluation has number 0."""


def messages(history: str, mode: Mode, template: str | None = None, system: str | None = None) -> list[dict[str, str]]:
    """Return the conversation that asks for the next item.

    Args:
        history: Semantic IDs, oldest first.
        mode: ``direct`` or ``reasoning``.
        template: The user's turn, with ``{history}``; None for number 0 of the mode.
        system: The system's turn, "" for none; None for that of the mode.
    """
    system = SYSTEM[mode] if system is None else system
    user = {"role": "user", "content": (template or TEMPLATES[mode][0]).replace("{history}", history)}
    return [{"role": "system", "content": system}, user] if system else [user]


class TrainingTargets:
    """The targets of RL, numbered user by user and in time order.

    They are the interactions of a user from the 5th to the last one for training; with leave-one-out, the third last.

    Args:
        lengths: Number of training interactions of every user.
    """

    def __init__(self, lengths: Iterable[int]) -> None:
        counts = np.maximum(np.fromiter(lengths, dtype=np.int64) - FIRST_REASONING_TARGET, 0)
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def draw(self, count: int | None, generator: np.random.Generator) -> np.ndarray:
        """Return the numbers of ``count`` targets, all when None, in random order; int64 [targets].

        They are the last one of every user, then the second last ones, and so on: what is held out comes after them.
        """
        numbers = np.arange(len(self))
        age = self._ends[self.locate(numbers)[0]] - numbers
        return generator.permutation(np.lexsort((generator.permutation(numbers), age))[:count])

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the number of the user, and the position in the user's sequence, of targets; int64 [targets]."""
        users = np.searchsorted(self._ends, numbers, side="right")
        return users, FIRST_REASONING_TARGET + numbers - self._starts[users]


def drop_oldest(text: str, count: int) -> str:
    """Return ``text`` without its first ``count`` semantic IDs and the text between them; the last one always stays.

    >>> drop_oldest("Had <|a_1|><|b_2|>, <|a_3|><|b_1|>. Next?", 1)
    'Had <|a_3|><|b_1|>. Next?'
    """
    starts = [match.start() for match in SID_TOKEN.finditer(text) if match[1] == "a"]
    count = min(count, len(starts) - 1)
    return text[: starts[0]] + text[starts[count] :] if count > 0 else text
