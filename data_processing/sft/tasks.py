"""The SFT tasks: what each row asks and answers (arXiv 2510.20815, section 3.2; LC-Rec's tasks, in our own words).

A task draws *specs*, small rows of integers, and its templates turn many specs to text at once. Drawing is vectorised
and cheap, so that a mix of any size is planned in memory and written in chunks. Tasks over users see the training part
of a sequence only: what the split holds out for validation and test is in no row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from data_processing.sft import prompts
from data_processing.sft.corpus import Corpus
from data_processing.sft.fields import TEMPLATE, TITLES_SHOWN, ItemFields, Specs, WindowFields
from data_processing.sft.rules import DOMINANT, KEPT, WORDINGS
from data_processing.sft.texts import Filled, Ints, Templates, render, string_array
from gream_verl.core.prompts import FIRST_REASONING_TARGET, SYSTEM, TEMPLATES

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


Draw = Callable[[Corpus, int, np.random.Generator], Specs]
"""Draws that many specs, or fewer when fewer exist."""


@dataclass(frozen=True)
class Task:
    """One kind of row.

    Attributes:
        draw: Draws specs, in random order.
        exist: Returns how many there are.
        fields: What the templates are filled in with.
        user: Templates of the user's turn.
        assistant: Templates of the answer.
        form: The field that numbers the template of the answer: ``template`` when it goes with that of the user's turn.
        system: The system's turn, "" when there is none.
    """

    draw: Draw
    exist: Callable[[Corpus], int]
    fields: type[ItemFields] | type[WindowFields]
    user: Sequence[str]
    assistant: Sequence[str]
    form: str = "template"
    system: str = ""


class Renderer:
    """Turns specs of all tasks to text.

    Args:
        corpus: Where the texts are.
        tasks: Names of tasks that are to be rendered; the places here are the numbers of *kinds*.

    Attributes:
        tasks: The same.
        systems: The system's turn of each.
        history_fixed: Whether the histories of each must stay as they are, because given chains speak of them.
    """

    def __init__(self, corpus: Corpus, tasks: Sequence[str]) -> None:
        self.tasks = list(tasks)
        self._corpus = corpus
        self._tasks = [TASKS[task] for task in tasks]
        self.systems = [task.system for task in self._tasks]
        self.history_fixed = np.array([task == REASONING and len(corpus.chains[0]) > 0 for task in tasks])
        self._templates = [(Templates(task.user), Templates(task.assistant)) for task in self._tasks]

    def turns(self, kinds: Ints, specs: Specs) -> tuple[np.ndarray, Ints]:
        """Return the turns of rows, user's and assistant's in turn.

        Args:
            kinds: Number of the task of every row, ``[rows]``.
            specs: The rows.

        Returns:
            UTF-8 text, and where each turn begins, ``[2 * rows + 1]``.
        """
        parts: list[tuple[Filled, Ints]] = []
        for kind, (task, (user, assistant)) in enumerate(zip(self._tasks, self._templates, strict=True)):
            rows = np.flatnonzero(kinds == kind)
            if len(rows):
                fields = task.fields(self._corpus, specs[rows])
                parts.append((user.fill(fields.template, fields), 2 * rows))
                parts.append((assistant.fill(getattr(fields, task.form), fields), 2 * rows + 1))
        return render(self._corpus.arena.characters, parts)

    def rows(self, kinds: Ints, specs: Specs) -> list[Row]:
        """Return rows as Python objects; see :meth:`turns`."""
        turns = string_array(*self.turns(kinds, specs)).to_pylist()
        rows = zip(turns[::2], turns[1::2], kinds.tolist(), strict=True)
        return [Row(user, assistant, self.tasks[kind], self.systems[kind]) for user, assistant, kind in rows]


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
    possible = np.flatnonzero(corpus.positions >= first)
    targets = possible[generator.permutation(len(possible))[:count]]
    most = np.minimum(corpus.positions[targets], longest or corpus.history)
    full = generator.random(len(targets)) < full_share
    lengths = np.where(full, most, generator.integers(1, most + 1))
    return _specs(targets, lengths, generator.integers(templates, size=len(targets)))


def _specs(targets: Ints, lengths: Ints, templates: Ints) -> Specs:
    return np.stack([targets, lengths, templates], axis=1, dtype=np.int32, casting="same_kind")


def draw_items(corpus: Corpus, count: int, generator: np.random.Generator, *, templates: int) -> Specs:
    """Draw items evenly: every item once before any comes again; at most once per item and template on average."""
    count = min(count, len(corpus.items) * templates)
    specs = np.zeros((count, 3), dtype=np.int32)
    for start in range(0, count, len(corpus.items)):
        specs[start : start + len(corpus.items), 0] = generator.permutation(len(corpus.items))[: count - start]
    specs[:, TEMPLATE] = generator.integers(templates, size=count)
    return specs


def _draw_seqrec(corpus: Corpus, count: int, generator: np.random.Generator) -> Specs:
    specs = draw_windows(corpus, count, generator, templates=len(TEMPLATES["direct"]))
    specs[generator.random(len(specs)) < CANONICAL_SHARE, TEMPLATE] = 0
    return specs


def _draw_reasoning(corpus: Corpus, count: int, generator: np.random.Generator) -> Specs:
    """Draw targets that a language model has thought about; any target when it has about none."""
    written, _ = corpus.chains
    if not len(written):
        return draw_windows(corpus, count, generator, templates=1, first=FIRST_REASONING_TARGET, full_share=1.0)
    targets = generator.permutation(written)[:count]
    return _specs(targets, np.minimum(corpus.positions[targets], corpus.history), np.zeros_like(targets))


def _targets(corpus: Corpus, first: int = 1) -> int:
    return int((corpus.positions >= first).sum())


def _reasoning_targets(corpus: Corpus) -> int:
    return len(corpus.chains[0]) or _targets(corpus, FIRST_REASONING_TARGET)


# Templates


def _pairs(groups: Mapping[str, Sequence[str]], answers: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return the templates of all groups, and with each the answer of its group."""
    pairs = [(template, answers[kind]) for kind, templates in groups.items() for template in templates]
    return [user for user, _ in pairs], [assistant for _, assistant in pairs]


def _over_users(
    user: Sequence[str], assistant: Sequence[str], *, form: str = "template", longest: int | None = None
) -> Task:
    def draw(corpus: Corpus, count: int, generator: np.random.Generator) -> Specs:
        most = min(longest or corpus.history, corpus.history)
        return draw_windows(corpus, count, generator, templates=len(user), longest=most)

    return Task(draw, _targets, WindowFields, user, assistant, form)


def _over_items(user: Sequence[str], assistant: Sequence[str]) -> Task:
    def draw(corpus: Corpus, count: int, generator: np.random.Generator) -> Specs:
        return draw_items(corpus, count, generator, templates=len(user))

    return Task(draw, lambda corpus: len(user) * len(corpus.items), ItemFields, user, assistant)


def chain_templates() -> list[str]:
    """Return the forms of :meth:`RuleTeacher.chain`: for each wording, two for each number of dominant traits.

    The first of two is for a target without a trait; the last of all is the response of a language model.
    """
    kept = "".join(f"{{kept[{number}]}}" for number in range(KEPT))
    made = []
    for wording, traits, intent in product(WORDINGS.values(), range(DOMINANT + 1), (None, "{intent}")):
        named = [(f"{{dominant[{number}]}}", f"{{counts[{number}]}}") for number in range(traits)]
        thought = wording.thought(named, "{length}", "{last}", intent)
        made.append(f"<think>{thought}</think>{kept}<answer>{{sid}}</answer>")
    return [*made, "{chain}"]


LIKED = "{liked}" + "".join(f"{{commas[{number}]}}{{dominant[{number}]}}" for number in range(1, DOMINANT))
"""The most frequent traits of a history."""

REASONING = "reasoning"
TASKS: dict[str, Task] = {
    "seqrec": Task(_draw_seqrec, _targets, WindowFields, TEMPLATES["direct"], ["{sid}"] * len(TEMPLATES["direct"])),
    "item2index": _over_items(
        [
            template.replace("{text}", ("{title}", "{both}", "{telling}")[number % 3])
            for number, template in enumerate(prompts.ITEM_TO_INDEX)
        ],
        ["{sid}"] * len(prompts.ITEM_TO_INDEX),
    ),
    "index2item": _over_items(*_pairs(prompts.INDEX_TO_ITEM, {"title": "{title}", "description": "{description}"})),
    "fusionseqrec": _over_users(
        *_pairs(prompts.FUSION, {"title": "{title}", "description": "{description}", "sid": "{sid}"})
    ),
    "itemsearch": _over_users(
        [
            template.replace("{preference}", LIKED)
            for templates in prompts.ITEM_SEARCH.values()
            for template in templates
        ],
        ["{sid}"] * sum(map(len, prompts.ITEM_SEARCH.values())),
    ),
    "preferenceobtain": _over_users(prompts.PREFERENCE, [LIKED, "{sentence}"], form="taste_form"),
    "itemfeatureobtain": _over_items(*_pairs(prompts.FEATURES, {"features": "{text}", "sid": "{sid}"})),
    "historyreconstruction": _over_users(
        *_pairs(prompts.RECONSTRUCTION, {"titles": "{titles}", "sids": "{history}"}), longest=TITLES_SHOWN
    ),
    REASONING: Task(
        _draw_reasoning,
        _reasoning_targets,
        WindowFields,
        TEMPLATES["reasoning"],
        chain_templates(),
        "chain_form",
        SYSTEM["reasoning"],
    ),
}
"""All tasks by name; ``reasoning`` is placed by the curriculum, the others are alignment."""
