"""The SFT tasks: what each row asks and answers (arXiv 2510.20815, section 3.2; LC-Rec's tasks, in our own words).

A task draws *specs*, small rows of integers, and renders a spec to text. Drawing is vectorised and cheap, so that a mix
of any size is planned in memory and written in chunks. Tasks over users draw from the training part of a sequence only:
the last two interactions of a user, which validation and test hold out, are in no row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data_processing.layout import Item, training_part
from data_processing.sft import prompts
from data_processing.teacher.rules import RuleTeacher, short_title
from gream_verl.next_item import FIRST_REASONING_TARGET, SYSTEM, TEMPLATES
from gream_verl.semantic_ids import ItemIndex

Specs = npt.NDArray[np.int64]
"""``[rows, 4]``: user or item number, position of the target (0 for items), history length, template number."""

TITLES_SHOWN = 8
"""A history written in titles is at most so long: titles cost more tokens than semantic IDs."""
DESCRIPTION_WORDS = 40
TELLING_WORDS = 8
"""A description of at least so many words can stand for an item without its title."""
CANONICAL_SHARE = 0.5
"""Share of seqrec rows with the prompt of evaluation; the rest spreads over the other templates."""


class Row(NamedTuple):
    """One training example.

    Attributes:
        user: The user's turn.
        assistant: The answer.
        task: Name of the task.
        system: The system's turn, "" when there is none.
    """

    user: str
    assistant: str
    task: str
    system: str = ""


@dataclass(frozen=True)
class Corpus:
    """What tasks draw from.

    Attributes:
        sequences: Every user's items in time order, held-out ones too; tasks see only :attr:`training`.
        items: All items.
        index: Their semantic IDs.
        history: Longest history of a row, in items.
    """

    sequences: Mapping[str, Sequence[str]]
    items: Mapping[str, Item]
    index: ItemIndex
    history: int = 20

    @cached_property
    def training(self) -> list[Sequence[str]]:
        """The training part of every user, in the order of :attr:`sequences`."""
        return [training_part(sequence) for sequence in self.sequences.values()]

    @cached_property
    def keys(self) -> list[str]:
        """Item ids by item number."""
        return list(self.items)

    @cached_property
    def teacher(self) -> RuleTeacher:
        """The rule-based teacher over these items."""
        return RuleTeacher(self.items, self.index)

    def window(self, spec: Sequence[int]) -> tuple[Sequence[str], str]:
        """Return the history and the target of a spec over users."""
        user, position, length, _ = spec
        sequence = self.training[user]
        return sequence[position - length : position], sequence[position]

    def sids(self, items: Sequence[str]) -> str:
        """Return semantic IDs one after another; the first level marks where one begins."""
        return "".join(self.index.texts(items))

    def titles(self, items: Sequence[str]) -> str:
        """Return short titles with semicolons between."""
        return "; ".join(short_title(self.items[item].title) for item in items)

    def description(self, item: str) -> str:
        """Return description and categories, cut to a few dozen words; the title when there are neither."""
        fields = self.items[item]
        words = " ".join(fields.description.split()[:DESCRIPTION_WORDS])
        return _sentences(words, ", ".join(fields.categories)) or fields.title

    def features(self, item: str) -> str:
        """Return categories and brand; the title when there are neither."""
        fields = self.items[item]
        return ", ".join(filter(None, (*fields.categories, fields.brand))) or fields.title

    def preference(self, items: Sequence[str]) -> str:
        """Return the traits that are most frequent in ``items``; the last title when there are none."""
        counts = Counter(name for item in items for name in self.teacher.traits[item])
        return ", ".join(name for name, _ in counts.most_common(3)) or short_title(self.items[items[-1]].title)


Render = Callable[[Corpus, Sequence[int]], Row]
"""Turns one spec into a row."""


@dataclass(frozen=True)
class Task:
    """One kind of row.

    Attributes:
        draw: Draws that many specs, or fewer when fewer exist.
        render: Turns one spec into a row.
    """

    draw: Callable[[Corpus, int, np.random.Generator], Specs]
    render: Render


# Drawing


def draw_windows(
    corpus: Corpus,
    count: int,
    generator: np.random.Generator,
    *,
    templates: int,
    longest: int | None = None,
    first: int = 1,
    full_share: float = 0.5,
) -> Specs:
    """Draw targets without replacement, each with a history before it.

    Args:
        corpus: Where to draw from.
        count: Number of specs; clamped to the number of targets.
        generator: Source of randomness.
        templates: Number of templates to draw from.
        longest: Longest history; the corpus' own when None.
        first: First position that may be a target.
        full_share: Share of rows with the longest history there is; the rest draws a length evenly.

    Returns:
        Specs, in random order.
    """
    counts = np.array([max(len(sequence) - first, 0) for sequence in corpus.training], dtype=np.int64)
    ends = np.cumsum(counts)
    total = int(counts.sum())
    flat = generator.permutation(total)[:count]
    users = np.searchsorted(ends, flat, side="right")
    positions = first + flat - (ends - counts)[users]
    most = np.minimum(positions, longest or corpus.history)
    full = generator.random(len(flat)) < full_share
    lengths = np.where(full, most, generator.integers(1, most + 1))
    return np.stack([users, positions, lengths, generator.integers(templates, size=len(flat))], axis=1)


def draw_items(corpus: Corpus, count: int, generator: np.random.Generator, *, templates: int) -> Specs:
    """Draw items evenly: every item once before any comes again; at most once per item and template on average."""
    count = min(count, len(corpus.items) * templates)
    specs = np.zeros((count, 4), dtype=np.int64)
    for start in range(0, count, len(corpus.items)):
        specs[start : start + len(corpus.items), 0] = generator.permutation(len(corpus.items))[: count - start]
    specs[:, 3] = generator.integers(templates, size=count)
    return specs


def _over_users(render: Render, templates: int, longest: int | None = None) -> Task:
    def draw(corpus: Corpus, count: int, generator: np.random.Generator) -> Specs:
        most = min(longest or corpus.history, corpus.history)
        return draw_windows(corpus, count, generator, templates=templates, longest=most)

    return Task(draw, render)


def _over_items(render: Render, templates: int) -> Task:
    def draw(corpus: Corpus, count: int, generator: np.random.Generator) -> Specs:
        return draw_items(corpus, count, generator, templates=templates)

    return Task(draw, render)


def _draw_seqrec(corpus: Corpus, count: int, generator: np.random.Generator) -> Specs:
    specs = draw_windows(corpus, count, generator, templates=len(TEMPLATES["direct"]))
    specs[generator.random(len(specs)) < CANONICAL_SHARE, 3] = 0
    return specs


def _draw_reasoning(corpus: Corpus, count: int, generator: np.random.Generator) -> Specs:
    return draw_windows(corpus, count, generator, templates=1, first=FIRST_REASONING_TARGET, full_share=1.0)


# Rendering


def _sentences(*parts: str) -> str:
    """Join the parts that are not empty, with a full stop after each that has none before another begins."""
    *ended, last = [part for part in parts if part] or [""]
    return " ".join([*(part if part[-1] in ".!?" else f"{part}." for part in ended), last])


def _pick(groups: Mapping[str, Sequence[str]], number: int) -> tuple[str, str]:
    """Return kind and text of template ``number`` of all groups in a row."""
    for kind, templates in groups.items():
        if number < len(templates):
            return kind, templates[number]
        number -= len(templates)
    raise IndexError(number)


def _size(groups: Mapping[str, Sequence[str]]) -> int:
    return sum(map(len, groups.values()))


def _seqrec(corpus: Corpus, spec: Sequence[int]) -> Row:
    history, target = corpus.window(spec)
    return Row(TEMPLATES["direct"][spec[3]].format(history=corpus.sids(history)), corpus.index.text(target), "seqrec")


def _item_to_index(corpus: Corpus, spec: Sequence[int]) -> Row:
    key = corpus.keys[spec[0]]
    title, description = corpus.items[key].title, corpus.description(key)
    both = description if description.startswith(title) else _sentences(title, description)
    telling = len(corpus.items[key].description.split()) >= TELLING_WORDS
    text = (title, both, description if telling else both)[spec[3] % 3]
    return Row(prompts.ITEM_TO_INDEX[spec[3]].format(text=text), corpus.index.text(key), "item2index")


def _index_to_item(corpus: Corpus, spec: Sequence[int]) -> Row:
    key = corpus.keys[spec[0]]
    kind, template = _pick(prompts.INDEX_TO_ITEM, spec[3])
    answer = corpus.items[key].title if kind == "title" else corpus.description(key)
    return Row(template.format(sid=corpus.index.text(key)), answer, "index2item")


def _fusion(corpus: Corpus, spec: Sequence[int]) -> Row:
    history, target = corpus.window(spec)
    kind, template = _pick(prompts.FUSION, spec[3])
    answers = {"title": corpus.items[target].title, "description": corpus.description(target)}
    user = template.format(history=corpus.sids(history), titles=corpus.titles(history[-TITLES_SHOWN:]))
    return Row(user, answers.get(kind, corpus.index.text(target)), "fusionseqrec")


def _item_search(corpus: Corpus, spec: Sequence[int]) -> Row:
    history, target = corpus.window(spec)
    _, template = _pick(prompts.ITEM_SEARCH, spec[3])
    user = template.format(
        history=corpus.sids(history), query=corpus.features(target), preference=corpus.preference(history)
    )
    return Row(user, corpus.index.text(target), "itemsearch")


def _preference(corpus: Corpus, spec: Sequence[int]) -> Row:
    history, _ = corpus.window(spec)
    user = prompts.PREFERENCE[spec[3]].format(history=corpus.sids(history))
    return Row(user, corpus.preference(history), "preferenceobtain")


def _features(corpus: Corpus, spec: Sequence[int]) -> Row:
    key = corpus.keys[spec[0]]
    kind, template = _pick(prompts.FEATURES, spec[3])
    sid, text = corpus.index.text(key), corpus.features(key)
    return Row(template.format(sid=sid, text=text), text if kind == "features" else sid, "itemfeatureobtain")


def _reconstruction(corpus: Corpus, spec: Sequence[int]) -> Row:
    history, _ = corpus.window(spec)
    kind, template = _pick(prompts.RECONSTRUCTION, spec[3])
    sids, titles = corpus.sids(history), corpus.titles(history)
    return Row(
        template.format(history=sids, titles=titles), titles if kind == "titles" else sids, "historyreconstruction"
    )


def _reasoning(corpus: Corpus, spec: Sequence[int]) -> Row:
    history, target = corpus.window(spec)
    user = TEMPLATES["reasoning"][0].format(history=corpus.sids(history))
    return Row(user, corpus.teacher.chain(history, target), "reasoning", SYSTEM["reasoning"])


REASONING = "reasoning"
TASKS: dict[str, Task] = {
    "seqrec": Task(_draw_seqrec, _seqrec),
    "item2index": _over_items(_item_to_index, len(prompts.ITEM_TO_INDEX)),
    "index2item": _over_items(_index_to_item, _size(prompts.INDEX_TO_ITEM)),
    "fusionseqrec": _over_users(_fusion, _size(prompts.FUSION)),
    "itemsearch": _over_users(_item_search, _size(prompts.ITEM_SEARCH)),
    "preferenceobtain": _over_users(_preference, len(prompts.PREFERENCE)),
    "itemfeatureobtain": _over_items(_features, _size(prompts.FEATURES)),
    "historyreconstruction": _over_users(_reconstruction, _size(prompts.RECONSTRUCTION), TITLES_SHOWN),
    REASONING: Task(_draw_reasoning, _reasoning),
}
"""All tasks by name; ``reasoning`` is placed by the curriculum, the others are alignment."""
