"""The SFT tasks: the question and the answer of every row (arXiv 2510.20815, section 3.2; LC-Rec's tasks).

A task is a list of templates, a question and its answer each. Its rows are drawn as *specs*, four integers each, and
rendered one by one, so that a large mix is in memory as specs only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt
import yaml

from data_processing.leaks import find_leak
from data_processing.sft.rules import RuleTeacher, Wording
from gream_verl.core.data_folder import Item, has_texts
from gream_verl.core.faithfulness import ClaimReader
from gream_verl.core.prompts import FIRST_REASONING_TARGET, SYSTEM, TEMPLATES
from gream_verl.core.semantic_ids import ItemIndex

REASONING, CONTINUATION, WINDOW = "reasoning", "continuation", "window"
FULL_SHARE, CANONICAL_SHARE = 0.5, 0.5
"""Share of rows with the longest history there is, and of seqrec rows with the prompt of the evaluation."""
LONGEST_CONTINUATION, THINNING = 50, 0.25
"""Most items of an answer of a continuation row; share of the items that a window of a later pass leaves out."""
TITLES_SHOWN = 8
"""Longest history in titles, which cost more tokens than semantic IDs."""
DESCRIPTION_WORDS, DESCRIPTION_LETTERS = 40, 320
TELLING_WORDS = 8
"""A description of at least so many words can stand for an item without its title."""

Specs = npt.NDArray[np.int32]
"""``[rows, 4]``, the columns below."""
TARGET, LENGTH, TEMPLATE = 0, 1, 2
"""Number of the target interaction, or of the item; length of the history, 0 for items; number of the template. The
last is the seed by which the history is thinned, 0 for the whole of it."""


class SftRow(NamedTuple):
    """One training example: the user's turn, the answer, the task, and the system's turn ("" for none)."""

    user: str
    assistant: str
    task: str
    system: str = ""


class TeacherTexts(NamedTuple):
    """Texts of a language-model teacher: preferences by user, searches for the user's last item, chains by target."""

    preferences: Mapping[str, Sequence[str]] = {}
    queries: Mapping[str, Sequence[str]] = {}
    chains: Mapping[tuple[str, int], Sequence[str]] = {}


class Corpus:
    """The source of rows: users' sequences, whose interactions are numbered user by user, and items.

    Args:
        sequences: The items of every user that rows may show, in time order.
        history: Longest history of a row, in items.
        texts: Texts of a language-model teacher, used where there are some.
        last_only: Only the last interaction of every user is a target, as in held-out rows.

    Attributes:
        choices: By the number of its target, the number of a row's chain where it is not the first.
    """

    def __init__(
        self,
        sequences: Mapping[str, Sequence[str]],
        items: Mapping[str, Item],
        index: ItemIndex,
        history: int = 20,
        texts: TeacherTexts | None = None,
        wording: Wording = "notes",
        last_only: bool = False,
    ) -> None:
        self.users, self.sequences, self._history = list(sequences), list(sequences.values()), history
        self._longest = {WINDOW: history, CONTINUATION: LONGEST_CONTINUATION}
        self.keys, self.items, self.index, self.texts = list(items), items, index, texts or TeacherTexts()
        self.sids = dict(zip(self.keys, index.texts(self.keys), strict=True))
        self.has_texts = has_texts(items)
        self.teacher, self.claims = RuleTeacher(items, self.sids, wording), ClaimReader(items, index)
        self.choices: dict[int, int] = {}
        lengths = np.fromiter(map(len, self.sequences), np.int64, len(sequences))
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self._positions = np.arange(self.starts[-1]) - np.repeat(self.starts[:-1], lengths)
        self._targets = self.starts[1:][lengths > 0] - 1 if last_only else np.arange(self.starts[-1])
        starts = dict(zip(self.users, self.starts.tolist(), strict=False))
        self._chained = np.array(sorted(starts[user] + position for user, position in self.texts.chains), np.int64)

    def has_chains(self, task: str) -> bool:
        """Return whether a language model wrote the answers, which speak of one history each."""
        return task == REASONING and bool(self.texts.chains)

    def exist(self, task: str) -> int:
        """Return the number of rows of a task that can be drawn; of windows, those of one pass."""
        if task in WINDOW_TASKS:
            return self._cut(task).shape[1]
        if task in ITEM_TASKS:
            return len(self.keys) * len(TASKS[task]) if self.has_texts else 0
        return len(self._targets_of(task))

    def _targets_of(self, task: str) -> npt.NDArray[np.int64]:
        if self.has_chains(task):
            return self._chained
        if not self.has_texts and task not in ("seqrec", *WINDOW_TASKS):
            return self._targets[:0]
        first = FIRST_REASONING_TARGET if task == REASONING else 1
        return self._targets[self._positions[self._targets] >= first]

    def draw(self, task: str, count: int | None, seed: int) -> Specs:
        """Draw ``count`` specs of a task in random order: all when None, or fewer when fewer exist."""
        generator = np.random.default_rng([seed, crc32(task.encode())])
        if task in ITEM_TASKS:  # every item once before any comes again, at most once per template on average
            items, exist = len(self.keys), self.exist(task)
            count = exist if count is None else min(count, exist)
            passes = [generator.permutation(items)[: count - start] for start in range(0, count, items)]
            targets = np.concatenate([np.zeros(0, np.int64), *passes])
            lengths = np.zeros_like(targets)
        elif task in WINDOW_TASKS:  # every target once before any comes again; later passes cut at other places
            exist, phase, passes = self.exist(task), np.zeros(len(self.users), np.int64), [np.zeros((2, 0), np.int64)]
            count = exist if count is None else count
            for _ in range(-(-count // max(exist, 1))):
                passes.append(generator.permutation(self._cut(task, phase), axis=1))
                phase = generator.integers(self._longest[task], size=len(self.users))
            targets, lengths = np.concatenate(passes, axis=1)[:, :count]
        else:
            targets = self._targets_of(task)
            targets = targets[generator.permutation(len(targets))[:count]]
            most = lengths = np.minimum(self._positions[targets], self._history)
            if task == "historyreconstruction":
                most = np.minimum(most, TITLES_SHOWN)
            if not self.has_chains(task):
                full = generator.random(len(targets)) < (1 if task == REASONING else FULL_SHARE)
                lengths = np.where(full, most, generator.integers(1, most + 1))
        numbers = generator.integers(len(TASKS[task]), size=len(targets))
        if task in ("seqrec", WINDOW):
            numbers[generator.random(len(targets)) < CANONICAL_SHARE] = 0
        thinned = np.zeros_like(targets)
        if task == WINDOW:
            thinned[exist:] = generator.integers(1, 1 << 31, size=len(thinned[exist:]))
        return np.stack([targets, lengths, numbers, thinned], axis=1, dtype=np.int32, casting="same_kind")

    def _cut(self, task: str, phase: int | npt.NDArray[np.int64] = 0) -> npt.NDArray[np.int64]:
        """Return windows that together ask for every target once: their last targets and lengths, ``[2, windows]``.

        ``phase``, one or ``[users]``, moves the cuts between the windows of a user.
        """
        targets, longest = self._targets_of(task), self._longest[task]
        users = np.searchsorted(self.starts, targets, side="right") - 1
        places = self._positions[targets] + np.broadcast_to(phase, len(self.users))[users]
        ends = (places % longest == 0) | np.isin(targets + 1, self.starts)
        lengths = np.minimum(self._positions[targets], (places - 1) % longest + 1)
        return np.stack([targets, lengths])[:, ends]

    def row(self, task: str, *spec: int) -> SftRow:
        """Return the row of a spec."""
        question, answer = TASKS[task][spec[TEMPLATE]]
        fields = ItemFields(self, self.keys[spec[TARGET]]) if task in ITEM_TASKS else Window(self, *spec)
        system = SYSTEM["reasoning"] if task == REASONING else ""
        return SftRow(question.format_map(fields), answer.format_map(fields), task, system)


class ItemFields:
    """The fields of templates about one item; a text is made when a template names it."""

    def __init__(self, corpus: Corpus, item: str) -> None:
        self._corpus, self.target = corpus, item

    def __getitem__(self, name: str) -> str:
        corpus = self._corpus
        return corpus.sids[self.target] if name == "sid" else ITEM_TEXTS[name](corpus.items[self.target])


class Window(ItemFields):
    """A target, the history before it that a row shows, and the fields of templates about them."""

    def __init__(self, corpus: Corpus, target: int, length: int, template: int = 0, thinned: int = 0) -> None:
        number = int(np.searchsorted(corpus.starts, target, side="right")) - 1
        sequence, position = corpus.sequences[number], target - int(corpus.starts[number])
        super().__init__(corpus, sequence[position])
        self._template, self._user, self._position = template, corpus.users[number], position
        self._number = target
        self._last = position == len(sequence) - 1
        self.history = sequence[position - length : position]
        if thinned:
            kept = np.random.default_rng(thinned).random(length) >= THINNING
            self.history = [item for item, keep in zip(self.history, kept, strict=True) if keep] or self.history[-1:]

    def __getitem__(self, name: str) -> str:
        corpus, texts = self._corpus, self._corpus.texts
        match name:
            case "history":
                return "".join([corpus.sids[item] for item in self.history])
            case "first":
                return corpus.sids[self.history[0]]
            case "following":
                return "".join([corpus.sids[item] for item in (*self.history[1:], self.target)])
            case "titles":
                return "; ".join([corpus.teacher.titles[item] for item in self.history[-TITLES_SHOWN:]])
            case "preference":
                return corpus.teacher.preference(self.history)
            case "taste":
                return self._written(texts.preferences) or self["preference"]
            case "query":
                return (self._last and self._written(texts.queries)) or self["text"]
            case "chain":
                return next(islice(self.chains(), corpus.choices.get(self._number, 0), None))
        return super().__getitem__(name)

    def chains(self) -> Iterator[str]:
        """Yield the chains that the row can have, those of a language model where it wrote some."""
        written = self._corpus.texts.chains.get((self._user, self._position))
        return iter(written) if written else self._corpus.teacher.chains(self.history, self.target)

    def leaks(self, chain: str) -> bool:
        """Return whether a chain names the target before the answer."""
        corpus, sids = self._corpus, self._corpus.index.sids
        titles, shown = [corpus.teacher.titles[item] for item in self.history], {sids[item] for item in self.history}
        title, sid = corpus.items[self.target].title, sids[self.target]
        return find_leak(chain, title=title, sid=sid, history_titles=titles, history_sids=shown) is not None

    def is_true(self, chain: str) -> bool:
        """Return whether all that a chain says about the history is true."""
        return all(map(all, self._corpus.claims.read(chain, self.history).values()))

    def _written(self, texts: Mapping[str, Sequence[str]]) -> str:
        """Return the text of this user that goes with the template, "" when there is none."""
        written = texts.get(self._user)
        return written[self._template % len(written)] if written else ""


def description(item: Item) -> str:
    """Return description and categories, cut to a few dozen words; the title when there are neither."""
    words = " ".join(item.description.split()[:DESCRIPTION_WORDS])
    if len(words) > DESCRIPTION_LETTERS:  # a language without spaces, say
        words = words[: DESCRIPTION_LETTERS + 1].rpartition(" ")[0] or words[:DESCRIPTION_LETTERS]
    return _sentences(words, ", ".join(item.categories)) or item.title


def title_and_description(item: Item) -> str:
    """Return title and description; a description that begins with the title stands alone."""
    text = description(item)
    return text if text.startswith(item.title) else _sentences(item.title, text)


def telling_text(item: Item) -> str:
    """Return the description where it can stand for the item, else title and description."""
    return description(item) if len(item.description.split()) >= TELLING_WORDS else title_and_description(item)


def features(item: Item) -> str:
    """Return categories and brand; the title when there are neither."""
    return ", ".join(filter(None, (*item.categories, item.brand))) or item.title


def _sentences(*parts: str) -> str:
    """Join the parts that are not empty, with a full stop after each but the last that has none."""
    *ended, last = [part for part in parts if part] or [""]
    return " ".join([*(part if part[-1] in ".!?" else f"{part}." for part in ended), last])


ITEM_TEXTS: Mapping[str, Callable[[Item], str]] = {
    "title": lambda item: item.title,
    "description": description,
    "title_and_description": title_and_description,
    "telling_text": telling_text,
    "text": features,
}


def _answered(groups: Mapping[str, Sequence[str]]) -> list[tuple[str, str]]:
    """Return the questions of all groups, each with the answer that names its group: ``{sid}`` for "sid"."""
    return [(question, f"{{{answer}}}") for answer, questions in groups.items() for question in questions]


WINDOW_TASKS = (WINDOW, CONTINUATION)
"""Tasks whose rows are windows of a user's history: every item but the first is a target."""
ITEM_TASKS = ("item2index", "index2item", "itemfeatureobtain")
_TEMPLATES = yaml.safe_load(Path(__file__).with_name("templates.yaml").read_text(encoding="utf-8"))
TASKS: dict[str, list[tuple[str, str]]] = {
    "seqrec": _answered({"sid": TEMPLATES["direct"]}),
    **{task: _answered(groups) for task, groups in _TEMPLATES.items()},
    WINDOW: _answered({"sid": TEMPLATES["direct"]}),
    REASONING: _answered({"chain": TEMPLATES["reasoning"]}),
}
"""Questions and answers of each task. The curriculum places ``reasoning``; the others are alignment."""
