"""Chains of thought by rule, from titles and categories: a teacher that needs no language model.

Like the language-model teacher it is shown the true next item, and uses one category of it. A chain names evidence in
the history, the preference that follows and an intent, then keeps the items of the history that support them
(arXiv 2510.20815, section 3.3).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Literal, NamedTuple

from gream_verl.core.data_folder import Item, short_title

Wording = Literal["notes", "sentences"]
"""Notes cost few tokens and suit the tiny model; sentences suit a pretrained model."""
DOMINANT, KEPT = 3, 5
"""Most traits named as evidence; longest denoised history, in items."""
COMMON = 0.6
"""A category of more than this share of all items says nothing, such as the root of an Amazon catalogue."""


class Phrases(NamedTuple):
    """The phrases of a wording; of each pair, the second is for a chain that has nothing to name."""

    first: str  # the most frequent trait of the history and its count
    more: str  # the same for the following traits
    evidence: tuple[str, str]
    preference: tuple[str, str]  # of the two most frequent traits
    intent: tuple[str, str]  # a trait of the target


PHRASES: dict[Wording, Phrases] = {
    "notes": Phrases(
        "{name} {count}",
        "{name} {count}",
        ("Evidence: {named} of {length}; last {last}.", "Evidence: last {last}."),
        ("Preference: {names}.", "Preference: more of the same kind."),
        ("Intent: {intent}.", "Intent: something close to the last."),
    ),
    "sentences": Phrases(
        "{count} are {name}",
        "{count} {name}",
        ("Evidence: of the {length} items in this history, {named}; the latest is {last}.",
         "Evidence: the latest item in this history is {last}."),
        ("Preference: this user likes {names}.", "Preference: this user likes more of the same kind."),
        ("Intent: the next item should be {intent}.", "Intent: the next item should be close to the latest."),
    ),
}  # fmt: skip


class RuleTeacher:
    """Write chains and preferences by rule.

    Attributes:
        titles: The first words of every title.
        traits: The traits of every item: its telling categories, or its brand when it has none.
    """

    def __init__(self, items: Mapping[str, Item], sids: Mapping[str, str], wording: Wording = "notes") -> None:
        self._sids, self._phrases = sids, PHRASES[wording]
        self.titles = {key: short_title(item.title) for key, item in items.items()}
        counts = Counter(name for item in items.values() for name in item.categories)
        telling = {name for name, count in counts.items() if count <= COMMON * len(items)}
        self.traits = {
            key: tuple(name for name in item.categories if name in telling) or ((item.brand,) if item.brand else ())
            for key, item in items.items()
        }
        self._counts = Counter(name for names in self.traits.values() for name in names)

    def preference(self, history: Sequence[str]) -> str:
        """Return the most frequent traits of a history; the title of its last item when there are none."""
        counts = Counter(name for item in history for name in self.traits[item])
        return ", ".join(name for name, _ in counts.most_common(DOMINANT)) or self.titles[history[-1]]

    def chain(self, history: Sequence[str], target: str) -> str:
        """Return the first of :meth:`chains`: the most frequent traits, and the target's most frequent one."""
        return next(self.chains(history, target))

    def chains(self, history: Sequence[str], target: str) -> Iterator[str]:
        """Yield whole responses to a history, oldest first: thought, denoised history and answer; no two alike.

        They differ in the target's trait that is the intent, in the traits that the evidence names (the most frequent,
        or the most frequent for their number in the catalogue), and in the denoised history.
        """
        counts = Counter(name for item in history for name in self.traits[item])
        frequent = [name for name, _ in counts.most_common()]
        special = sorted(frequent, key=lambda name: -counts[name] / self._counts[name])
        # The target's trait that is most frequent in the history comes first; None when the target has no traits.
        intents: list[str | None] = [*sorted(self.traits[target], key=lambda name: -counts[name])] or [None]
        phrases, nothing, written = self._phrases, not counts, set()
        for names, by_intent, intent in product((frequent, special), (False, True), intents):
            named = ", ".join(
                (phrases.more if rank else phrases.first).format(name=name, count=counts[name])
                for rank, name in enumerate(names[:DOMINANT])
            )
            thought = " ".join(
                [
                    phrases.evidence[nothing].format(named=named, length=len(history), last=self.titles[history[-1]]),
                    phrases.preference[nothing].format(names=" and ".join(names[:2])),
                    phrases.intent[intent is None].format(intent=intent),
                ]
            )
            # The denoised history: the most recent items with a wanted trait, oldest first; of all items if none has.
            wanted = {intent} if by_intent else {*names[:2], intent}
            fitting = [item for item in history if not wanted.isdisjoint(self.traits[item])] or history
            chain = f"<think>{thought}</think>{''.join(self._sids[item] for item in fitting[-KEPT:])}"
            if chain not in written:
                written.add(chain)
                yield f"{chain}<answer>{self._sids[target]}</answer>"
