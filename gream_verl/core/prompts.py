"""What training asks for: which interaction of which user comes next, and in what words.

Shared by the files that `gream data` writes and by the dataset that makes prompts while verl trains.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from gream_verl.core.rsvr import Mode
from gream_verl.core.semantic_ids import SID_TOKEN, ItemIndex

FIRST_REASONING_TARGET = 4
"""Position (from 0) of a user's first interaction with enough before it to reason about: the 5th."""

NO_TARGET = (
    f"no user has {FIRST_REASONING_TARGET + 1} interactions for training, as an RL row needs; bring longer histories"
)
"""What to say of a data set without training targets."""

SYSTEM: Mapping[Mode, str] = {
    "direct": "",
    "reasoning": "Reason first: evidence, preference, intent. Then the items that matter, then the answer.",
}
"""The system's turn of each mode, "" for none."""

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
    "reasoning": ("History: {history} Think, then recommend the next item.",),
}
"""The user's turn; ``{history}`` is the semantic IDs, oldest first. Number 0 is the one of RL and evaluation."""


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


def row(
    source: str,
    number: int,
    user: str,
    past: Sequence[str],
    item: str,
    prompt: list[dict[str, str]],
    mode: Mode,
    index: ItemIndex,
) -> dict[str, Any]:
    """Return a row as verl reads it.

    Args:
        source: Name of the data set.
        number: Number of the row.
        user: User id.
        past: All items before the target, in time order.
        item: The target.
        prompt: The conversation.
        mode: What the prompt asks for.
        index: Semantic IDs of the items.
    """
    return {
        "data_source": source,
        "prompt": prompt,
        "ability": "recommendation",
        "reward_model": {"style": "rule", "ground_truth": index.text(item)},
        "extra_info": {"index": number, "user": user, "item": item, "type": mode, "history": list(past)},
    }


class TrainingTargets:
    """The interactions that RL may ask for, numbered user by user and in time order.

    From a user's 5th interaction to the last that training may see: with leave-one-out, the third last.

    Args:
        lengths: Number of every user's interactions that training may see.
    """

    def __init__(self, lengths: Iterable[int]) -> None:
        counts = np.maximum(np.fromiter(lengths, dtype=np.int64) - FIRST_REASONING_TARGET, 0)
        self._ends = np.cumsum(counts)
        self._starts = self._ends - counts

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the place of the user, and the position of the target in the user's sequence, of every number.

        Args:
            numbers: Numbers from 0 to ``len(self) - 1``, shape [targets].
        """
        users = np.searchsorted(self._ends, numbers, side="right")
        return users, FIRST_REASONING_TARGET + numbers - self._starts[users]


class NextItemRows:
    """Rows for every target that RL may ask for, made when they are asked for.

    Pass after pass over all targets. The order of a pass and the template of each row depend on seed and pass only, so
    a run that goes on in the middle of a pass sees what it would have seen.

    Args:
        source: Name of the data set.
        sequences: What training may see of every user's items, in time order.
        index: Semantic IDs of the items.
        mode: What the prompts ask for.
        history: Items shown, the most recent ones.
        templates: Wordings of the user's turn; None for those of the mode.
        system: The system's turn, "" for none; None for that of the mode.
        passes: Number of passes.
        seed: Draws orders and templates.
        limit: Targets to draw; all when None.
    """

    def __init__(
        self,
        source: str,
        sequences: Mapping[str, Sequence[str]],
        index: ItemIndex,
        *,
        mode: Mode = "reasoning",
        history: int = 20,
        templates: Sequence[str] | None = None,
        system: str | None = None,
        passes: int = 1,
        seed: int = 0,
        limit: int | None = None,
    ) -> None:
        self._source = source
        self._users = list(sequences)
        self._sequences = list(sequences.values())
        self.index = index
        self._mode: Mode = mode
        self._history = history
        self._templates = templates or TEMPLATES[mode]
        self._system = system
        self._passes = passes
        self._seed = seed
        self._targets = TrainingTargets(map(len, self._sequences))
        self._chosen = np.random.default_rng(seed).permutation(len(self._targets))[:limit]
        self._pass: tuple[int, np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._chosen) * self._passes

    def __getitem__(self, number: int) -> dict[str, Any]:
        which, place = divmod(range(len(self))[number], len(self._chosen))
        targets, templates = self._order(which)
        users, positions = self._targets.locate(targets[place : place + 1])
        user, position = int(users[0]), int(positions[0])
        past, item = self._sequences[user][:position], self._sequences[user][position]
        shown = "".join(self.index.texts(past[-self._history :]))
        prompt = messages(shown, self._mode, self._templates[templates[place]], self._system)
        return row(self._source, number, self._users[user], past, item, prompt, self._mode, self.index)

    def shortest(self) -> list[list[dict[str, str]]]:
        """Return the prompt with one item, the longest there is, for every template."""
        item = max(self.index.sids.values(), key=len)
        return [messages("".join(item), self._mode, template, self._system) for template in self._templates]

    def _order(self, which: int) -> tuple[np.ndarray, np.ndarray]:
        """Return target and template of every row of a pass."""
        if self._pass is None or self._pass[0] != which:
            generator = np.random.default_rng([self._seed, which])
            targets = generator.permutation(self._chosen)
            self._pass = (which, targets, generator.integers(len(self._templates), size=len(targets)))
        return self._pass[1:]


def drop_oldest(text: str, count: int) -> str:
    """Return ``text`` without its first ``count`` semantic IDs and what stands between them; the last one always stays.

    >>> drop_oldest("Had <|a_1|><|b_2|>, <|a_3|><|b_1|>. Next?", 1)
    'Had <|a_3|><|b_1|>. Next?'
    """
    starts = [match.start() for match in SID_TOKEN.finditer(text) if match[1] == "a"]
    count = min(count, len(starts) - 1)
    return text[: starts[0]] + text[starts[count] :] if count > 0 else text
