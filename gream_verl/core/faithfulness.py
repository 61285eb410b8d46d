"""Faithfulness of chains of thought: the truth of what they say about the user's history.

A chain by rule states every kind of claim below. Of free text, titles, SIDs and numbers next to a category are read.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from gream_verl.core.data_folder import TITLE_WORDS, Item, short_title
from gream_verl.core.semantic_ids import ItemIndex, find_sids

Claims = Mapping[str, Sequence[bool]]
"""Truth of every claim of a chain, by its kind."""
_LENGTH = re.compile(r"\bof (\d+);|\bof the (\d+) items in this history\b")
_LAST = re.compile(r"\b(?:last|latest(?: item in this history)? is) (.+?)\.(?= Preference:)")
_NUMBER = re.compile(r"(?<![\w.,-])\d{1,3}(?![\w-])")  # no year


class ClaimReader:
    """Read the claims of chains about a catalogue."""

    def __init__(self, items: Mapping[str, Item], index: ItemIndex) -> None:
        self._index = index
        self._traits = {key: {*item.categories, item.brand} - {""} for key, item in items.items()}
        self._known_traits = set().union(*self._traits.values())
        self._titles = {key: short_title(item.title) for key, item in items.items()}
        self._known_titles = {title for title in self._titles.values() if " " in title}  # "Heat" may be no title

    def read(self, chain: str, history: Sequence[str]) -> dict[str, list[bool]]:
        """Return the truth of what a response says before its answer.

        The kinds are ``length`` of the history, ``count`` of items with a category or brand, ``last item``, ``title``
        and ``SID`` of an item of the history, ``denoised item``, and their ``order``.

        Args:
            chain: The response.
            history: The items that the prompt shows, oldest first.
        """
        thought, _, denoised = chain.partition("<answer>")[0].replace("<think>", "").partition("</think>")
        kept, sids = find_sids(denoised), [self._index.sids[item] for item in history]
        counts = Counter(trait for item in history for trait in self._traits.get(item, ()))
        titles = [self._titles.get(item, item) for item in history]
        later = iter(sids)  # a search goes on where the one before it ended
        return {
            "length": [int(one or other) == len(history) for one, other in _LENGTH.findall(thought)],
            "count": [counts[trait] == count for trait, count in self._counts(thought)],
            "last item": [title in titles[-1:] for title in _LAST.findall(thought)],
            "title": [title in titles for title in self._named_titles(thought)],
            "SID": [sid in sids for sid in find_sids(thought)],
            "denoised item": [sid in sids for sid in kept],
            "order": [all(sid in later for sid in kept if sid in sids)] if kept else [],
        }

    def _counts(self, thought: str) -> Iterator[tuple[str, int]]:
        """Yield the category or brand before or after each number: "Crime 2", "2 are Crime"."""
        for number in _NUMBER.finditer(thought):
            before, after = thought[: number.start()].split(), thought[number.end() :].removeprefix(" are").split()
            sizes = range(TITLE_WORDS, 0, -1)  # the longest name first
            names = (name for n in sizes for name in (" ".join(before[-n:]), " ".join(after[:n]).rstrip(".,;:")))
            yield from [(name, int(number[0])) for name in names if name in self._known_traits][:1]

    def _named_titles(self, thought: str) -> Iterator[str]:
        """Yield the titles of the catalogue, of two words or more, that a text names in their own letters."""
        words, start = thought.split(), 0
        while start < len(words):
            ends = range(min(start + TITLE_WORDS, len(words)), start, -1)  # the longest title first
            names = ((end, " ".join(words[start:end]).rstrip(".,;:")) for end in ends)
            end, title = next(((end, name) for end, name in names if name in self._known_titles), (start + 1, ""))
            yield from [title] * bool(title)
            start = end


def faithfulness(chains: Iterable[Claims]) -> dict[str, float]:
    """Return the share of chains that claim something and nothing untrue, and of each kind the share of true claims.

    >>> faithfulness([{"count": [True, False], "SID": []}, {"count": [True, True], "SID": []}])
    {'faithful': 0.5, 'count': 0.75}
    """
    every: dict[str, list[bool]] = {"faithful": []}
    for claims in chains:
        made = [truth for kind in claims.values() for truth in kind]
        every["faithful"].append(bool(made) and all(made))
        for kind, truths in claims.items():
            every.setdefault(kind, []).extend(truths)
    return {kind: sum(truths) / len(truths) for kind, truths in every.items() if truths}
