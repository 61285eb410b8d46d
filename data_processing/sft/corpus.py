"""What SFT rows are drawn from: training parts as arrays of item numbers, and every text as a slice of an arena.

What validation and test hold out of a user's interactions does not come in here, so it is in no row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Any

import numpy as np

from data_processing.sft.rules import NOTES, RuleTeacher, short_title
from data_processing.sft.texts import Arena, Ints, Slices, join
from data_processing.sources.clean import cut_text
from gream_verl.core.data_folder import Item
from gream_verl.core.errors import InputError
from gream_verl.core.prompts import FIRST_REASONING_TARGET
from gream_verl.core.semantic_ids import ItemIndex

DESCRIPTION_WORDS = 40
WORD_LETTERS = 8
"""A text that has no spaces is cut as if its words were so long."""
TELLING_WORDS = 8
"""A description of at least so many words can stand for an item without its title."""
BETWEEN_TITLES = "; "
EMPTY = np.zeros((1, 2), np.int64)
"""Behind slices, for the number -1."""
NOTHING: Mapping[Any, Any] = MappingProxyType({})


class Corpus:
    """What tasks draw from.

    Attributes:
        items: All items; their places are their numbers.
        index: Their semantic IDs.
        history: Longest history of a row, in items.
        wording: Of the chains that rules write.
        starts: Where the training part of each user begins in :attr:`sequence`, ``[users + 1]``.
        sequence: int32, the item numbers of all training parts, one user after the other. A *target* is a place in it.
        positions: int32, the position of every target in its user's sequence.
        traits: Trait numbers of every item, one item after the other, and where each item's begin, ``[items + 1]``.
        arena: The texts.
        sids, titles, features, ...: Slices of the texts of every item.
        sid_offsets, title_offsets: Where the text of every target begins in those of :attr:`sequence`.
        preferences, queries: Where the texts of each user begin, ``[users + 1]``, and their slices.
        chains: Targets that a language model has thought about, in order, and the slices of its responses.

    Args:
        training: What training may see of every user's items, in time order; not kept.
        items: All items.
        index: Their semantic IDs.
        history: Longest history of a row, in items.
        preferences: Sentences on the taste of users.
        queries: Search queries of users for their last training item.
        chains: Responses by user and position of the target in the user's sequence.
        wording: Of the chains that rules write, one of :data:`data_processing.sft.rules.WORDINGS`.

    Raises:
        InputError: When a chain has no target that may be trained, or the answer of another index.
    """

    def __init__(
        self,
        training: Mapping[str, Sequence[str]],
        items: Mapping[str, Item],
        index: ItemIndex,
        history: int = 20,
        *,
        preferences: Mapping[str, Sequence[str]] = NOTHING,
        queries: Mapping[str, Sequence[str]] = NOTHING,
        chains: Mapping[tuple[str, int], str] = NOTHING,
        wording: str = NOTES,
    ) -> None:
        self.keys, self.items, self.index, self.history = list(items), list(items.values()), index, history
        self.wording = wording
        numbers = {key: number for number, key in enumerate(items)}
        lengths = np.fromiter(map(len, training.values()), np.int64, len(training))
        self.starts = np.concatenate([[0], np.cumsum(lengths)])
        self.positions = (np.arange(self.starts[-1]) - np.repeat(self.starts[:-1], lengths)).astype(np.int32)
        flat = chain.from_iterable(training.values())
        self.sequence = np.fromiter(map(numbers.__getitem__, flat), np.int32, self.starts[-1])
        of_items = RuleTeacher(items, index).traits.values()
        self.trait_names = list(dict.fromkeys(chain.from_iterable(of_items)))
        trait_numbers = {name: number for number, name in enumerate(self.trait_names)}
        of_all = [trait_numbers[name] for name in chain.from_iterable(of_items)]
        self.traits = np.array(of_all, np.int64), np.cumsum([0, *map(len, of_items)])
        self.most_traits = max(map(len, of_items), default=0)

        self.arena = Arena()
        self._add_items()
        users = list(training)
        self.preferences, self.queries = (self._by_user(users, texts) for texts in (preferences, queries))
        by_target = self._by_target(users, chains)
        responses = self.arena.add(by_target[target] for target in sorted(by_target))
        self.chains = np.array(sorted(by_target), np.int64), np.concatenate([responses, EMPTY])
        self._add_sequences()

    def _add_items(self) -> None:
        add, items = self.arena.add, self.items
        self.sids = np.concatenate([add(self.index.texts(self.keys)), EMPTY])
        self.titles = add(item.title for item in items)
        self.short_titles = add(short_title(item.title) for item in items)
        self.descriptions = add(map(description, items))
        self.boths = add(map(title_and_description, items))
        self.tellings = add(map(telling_text, items))
        self.features = add(map(features, items))
        self.trait_texts = np.concatenate([add(self.trait_names), EMPTY])
        self.numbers = add(map(str, range(1 + self.history * max(self.most_traits, 1))))
        self.separator = add([BETWEEN_TITLES])[0]
        self.comma = add([", "])[0]

    def _by_user(self, users: Sequence[str], texts: Mapping[str, Sequence[str]]) -> tuple[Ints, Slices]:
        """Return where the texts of each user begin, ``[users + 1]``, and their slices."""
        given = [texts.get(user, ()) for user in users] if texts else [()] * len(users)
        slices = self.arena.add(chain.from_iterable(given))
        return np.cumsum([0, *map(len, given)]), np.concatenate([slices, EMPTY])

    def _by_target(self, users: Sequence[str], chains: Mapping[tuple[str, int], str]) -> dict[int, str]:
        """Return chains by target."""
        numbers = {user: number for number, user in enumerate(users)}
        places = {}
        for (user, position), text in chains.items():
            number = numbers.get(user)
            length = 0 if number is None else int(self.starts[number + 1] - self.starts[number])
            if number is None or not FIRST_REASONING_TARGET <= position < length:
                raise InputError(
                    f"chain of user {user!r}, position {position}: no training target of this data set; "
                    "ask the teacher anew"
                )
            place = int(self.starts[number]) + position
            sid = self.index.text(self.keys[self.sequence[place]])
            if not text.endswith(f"<answer>{sid}</answer>"):
                raise InputError(
                    f"chain of user {user!r}, position {position}: does not end with <answer>{sid}</answer>; "
                    "it was written for another index or other data; ask the teacher anew"
                )
            places[place] = text
        return places

    def _add_sequences(self) -> None:
        """Write whole training parts as semantic IDs and as titles: every history is a slice of them."""
        arena = self.arena.characters
        text, offsets = join(arena, [self.sids[self.sequence]])
        self.sid_offsets = self.arena.append(text) + offsets
        between = np.broadcast_to(self.separator, (len(self.sequence), 2))
        text, offsets = join(arena, [self.short_titles[self.sequence], between])
        self.title_offsets = self.arena.append(text) + offsets


def description(item: Item) -> str:
    """Return description and categories, cut to a few dozen words; the title when there are neither."""
    words = cut_text(" ".join(item.description.split()[:DESCRIPTION_WORDS]), DESCRIPTION_WORDS * WORD_LETTERS)
    return _sentences(words, ", ".join(item.categories)) or item.title


def title_and_description(item: Item) -> str:
    """Return title and description; the title is not said twice."""
    text = description(item)
    return text if text.startswith(item.title) else _sentences(item.title, text)


def telling_text(item: Item) -> str:
    """Return the description where it can stand for the item, else the title before it."""
    telling = len(item.description.split()) >= TELLING_WORDS
    return description(item) if telling else title_and_description(item)


def features(item: Item) -> str:
    """Return categories and brand; the title when there are neither."""
    return ", ".join(filter(None, (*item.categories, item.brand))) or item.title


def _sentences(*parts: str) -> str:
    """Join the parts that are not empty, with a full stop after each that has none before another begins."""
    *ended, last = [part for part in parts if part] or [""]
    return " ".join([*(part if part[-1] in ".!?" else f"{part}." for part in ended), last])
