"""The fields of templates, for many rows at once: ``{history}``, ``{sid}``, ``{title}``, ... as slices of an arena.

What a window of a user's items says, the traits in front and the items that speak for them, is counted in a compiled
loop, with the rules and ties of :class:`data_processing.sft.rules.RuleTeacher`.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
import numpy.typing as npt

from data_processing.compiled import compiled
from data_processing.sft.corpus import BETWEEN_TITLES, EMPTY, Corpus
from data_processing.sft.rules import DOMINANT, KEPT, WORDINGS
from data_processing.sft.texts import Ints, Slices

Specs = npt.NDArray[np.int32]
"""``[rows, 3]``: what a row is made from, in the columns below."""
TARGET, LENGTH, TEMPLATE = 0, 1, 2
"""Target in the corpus' sequence, or number of the item; length of the history, 0 for items; number of the template."""

TITLES_SHOWN = 8
"""A history written in titles is at most so long: titles cost more tokens than semantic IDs."""
NONE = -1


class ItemFields:
    """Fields of rows about one item.

    Args:
        corpus: Where the texts are.
        specs: The rows.
    """

    def __init__(self, corpus: Corpus, specs: Specs) -> None:
        item = specs[:, TARGET]
        self.template = specs[:, TEMPLATE]
        self.sid = corpus.sids[item]
        self.title = corpus.titles[item]
        self.description = corpus.descriptions[item]
        self.both = corpus.boths[item]
        self.telling = corpus.tellings[item]
        self.text = corpus.features[item]


class WindowFields:
    """Fields of rows about a target and the history before it.

    Args:
        corpus: Where the texts are.
        specs: The rows.
    """

    def __init__(self, corpus: Corpus, specs: Specs) -> None:
        self._corpus = corpus
        self._target = specs[:, TARGET].astype(np.int64)
        self._start = self._target - specs[:, LENGTH]
        self._item = corpus.sequence[self._target]
        self.template = specs[:, TEMPLATE]

    @property
    def history(self) -> Slices:
        """The history in semantic IDs."""
        offsets = self._corpus.sid_offsets
        return np.stack([offsets[self._start], offsets[self._target]], axis=1, dtype=np.int64)

    @property
    def titles(self) -> Slices:
        """The end of the history in titles."""
        start = np.maximum(self._start, self._target - TITLES_SHOWN)
        offsets = self._corpus.title_offsets
        return np.stack([offsets[start], offsets[self._target] - len(BETWEEN_TITLES)], axis=1, dtype=np.int64)

    @cached_property
    def last(self) -> Slices:
        """Short title of the last item of the history."""
        return self._corpus.short_titles[self._corpus.sequence[self._target - 1]]

    @property
    def sid(self) -> Slices:
        """Semantic ID of the target."""
        return self._corpus.sids[self._item]

    @property
    def title(self) -> Slices:
        """Title of the target."""
        return self._corpus.titles[self._item]

    @property
    def description(self) -> Slices:
        """Description of the target."""
        return self._corpus.descriptions[self._item]

    @property
    def query(self) -> Slices:
        """What the target is looked for with: a query that a language model wrote for this user, else its features."""
        written, slices = self._of_user(self._corpus.queries)
        next_user = np.searchsorted(self._corpus.starts, self._target, side="right")
        last = self._target == self._corpus.starts[next_user] - 1
        return np.where((written & last)[:, None], slices, self._corpus.features[self._item])

    @property
    def sentence(self) -> Slices:
        """A sentence that a language model wrote about the taste of this user."""
        return self._of_user(self._corpus.preferences)[1]

    @property
    def taste_form(self) -> Ints:
        """1 where there is a :attr:`sentence`, else 0."""
        return self._of_user(self._corpus.preferences)[0].astype(np.int64)

    def _of_user(self, texts: tuple[Ints, Slices]) -> tuple[npt.NDArray[np.bool_], Slices]:
        """Return which rows' users have texts, and the slice of the one that goes with the number of the template."""
        starts, slices = texts
        if len(slices) == len(EMPTY):  # nobody has
            return np.zeros(len(self._target), np.bool_), np.broadcast_to(EMPTY, (len(self._target), 2))
        user = np.searchsorted(self._corpus.starts, self._target, side="right") - 1
        counts = starts[user + 1] - starts[user]
        chosen = starts[user] + self.template % np.maximum(counts, 1)
        return counts > 0, slices[np.where(counts > 0, chosen, NONE)]

    @property
    def chain(self) -> Slices:
        """The response of a language model for this target."""
        targets, slices = self._corpus.chains
        return slices[np.searchsorted(targets, self._target)]

    @cached_property
    def counted(self) -> tuple[Ints, Ints, Ints, Ints]:
        """What :func:`_count_traits` finds."""
        corpus = self._corpus
        return _count_traits(
            corpus.sequence, self._start, self._target, *corpus.traits, len(corpus.trait_names), DOMINANT, KEPT
        )

    @property
    def chain_form(self) -> Ints:
        """Which form of a chain, of :func:`data_processing.sft.tasks.chain_templates`."""
        of_a_wording = 2 * (DOMINANT + 1)
        if len(self._corpus.chains[0]):
            return np.full(len(self._target), of_a_wording * len(WORDINGS))
        dominant, _, intent, _ = self.counted
        first = of_a_wording * list(WORDINGS).index(self._corpus.wording)
        return first + 2 * (dominant != NONE).sum(axis=1) + (intent != NONE)

    @property
    def intent(self) -> Slices:
        """The trait of the target that the history has most."""
        return self._corpus.trait_texts[self.counted[2]]

    @cached_property
    def dominant(self) -> Slices:
        """The most frequent traits of the history, ``[DOMINANT, rows, 2]``."""
        return self._corpus.trait_texts[self.counted[0].T]

    @cached_property
    def counts(self) -> Slices:
        """How many items have them, in digits, ``[DOMINANT, rows, 2]``."""
        return self._corpus.numbers[self.counted[1].T]

    @cached_property
    def commas(self) -> Slices:
        """A comma where there is a dominant trait, ``[DOMINANT, rows, 2]``."""
        return np.where((self.counted[0].T != NONE)[..., None], self._corpus.comma, EMPTY[0])

    @property
    def liked(self) -> Slices:
        """The most frequent trait of the history, the last title when there is none."""
        return np.where((self.counted[0][:, :1] != NONE), self.dominant[0], self.last)

    @cached_property
    def kept(self) -> Slices:
        """Semantic IDs of the denoised history, ``[KEPT, rows, 2]``."""
        return self._corpus.sids[self.counted[3].T]

    @property
    def length(self) -> Slices:
        """Length of the history in digits."""
        return self._corpus.numbers[self._target - self._start]


@compiled
def _count_traits(sequence, starts, targets, traits, offsets, names, most, longest):  # type: ignore[no-untyped-def]
    """Count traits in windows.

    Args:
        sequence: Item numbers.
        starts: Where each window begins in ``sequence``, ``[rows]``.
        targets: The place behind each window, that of its target.
        traits: Trait numbers of item after item.
        offsets: Where the traits of each item begin, ``[items + 1]``.
        names: Number of different traits.
        most: Traits wanted.
        longest: Items wanted.

    Returns:
        The most frequent traits, those seen first before others, and their counts, ``[rows, most]``; the target's most
        frequent trait, ``[rows]``; the last items that have it or one of the first two, else the last items,
        ``[rows, longest]``. NONE where there is none.
    """
    rows = len(targets)
    dominant, tops = np.full((rows, most), NONE), np.zeros((rows, most), np.int64)
    intents, kept = np.full(rows, NONE), np.full((rows, longest), NONE)
    counts, seen = np.zeros(names, np.int64), np.zeros(names, np.int64)
    for row in range(rows):
        different = 0
        for place in range(starts[row], targets[row]):
            item = sequence[place]
            for trait in traits[offsets[item] : offsets[item + 1]]:
                if counts[trait] == 0:
                    seen[different] = trait
                    different += 1
                counts[trait] += 1
        for rank in range(min(most, different)):
            best = NONE
            for trait in seen[:different]:
                taken = False
                for earlier in dominant[row, :rank]:
                    taken |= trait == earlier
                if not taken and (best == NONE or counts[trait] > counts[best]):
                    best = trait
            dominant[row, rank], tops[row, rank] = best, counts[best]
        item = sequence[targets[row]]
        for trait in traits[offsets[item] : offsets[item + 1]]:
            if intents[row] == NONE or counts[trait] > counts[intents[row]]:
                intents[row] = trait
        for trait in seen[:different]:
            counts[trait] = 0
        found = 0
        for place in range(targets[row] - 1, starts[row] - 1, -1):
            item = sequence[place]
            for trait in traits[offsets[item] : offsets[item + 1]]:
                if trait == dominant[row, 0] or trait == dominant[row, 1] or trait == intents[row]:
                    found += 1
                    kept[row, longest - found] = item
                    break
            if found == longest:
                break
        if found == 0:
            for back in range(1, min(longest, targets[row] - starts[row]) + 1):
                kept[row, longest - back] = sequence[targets[row] - back]
    return dominant, tops, intents, kept
