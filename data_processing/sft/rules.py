"""A teacher that needs no language model: chains of thought by rule from titles and categories.

It is shown the true next item, as the language-model teacher is, and may use of it only one category: the chain names
evidence in the history, the preference behind it and an intent, then keeps the part of the history that speaks for it
(arXiv 2510.20815, section 3.3, in its four steps).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from data_processing.leaks import short_title
from gream_verl.core.data_folder import Item
from gream_verl.core.semantic_ids import ItemIndex

DOMINANT = 3
"""Categories named as evidence."""
KEPT = 5
"""Items that the denoised history keeps at most."""
COMMON = 0.6
"""A category that more than this share of the items has tells nothing, such as the root of an Amazon catalogue."""


@dataclass(frozen=True)
class Wording:
    """How a chain is put into words; of two forms, the second is for when there is nothing to name.

    Attributes:
        count: A trait of the history and its count: ``{name}``, ``{count}``.
        more: The same for the traits after the first.
        evidence: ``{named}`` traits, ``{length}`` of the history, ``{last}`` title in it.
        preference: ``{names}`` of the two traits in front.
        intent: ``{intent}``, the target's trait.
    """

    count: str
    more: str
    evidence: tuple[str, str]
    preference: tuple[str, str]
    intent: tuple[str, str]

    def thought(self, traits: Sequence[tuple[str, str]], length: str, last: str, intent: str | None) -> str:
        """Return the text between the ``<think>`` tags.

        Args:
            traits: Names and counts of the traits in front.
            length: Length of the history.
            last: Short title of its last item.
            intent: The target's trait, None when it has none.
        """
        named = ", ".join(
            (self.more if place else self.count).format(name=name, count=count)
            for place, (name, count) in enumerate(traits)
        )
        names = " and ".join(name for name, _ in traits[:2])
        return " ".join(
            [
                self.evidence[not traits].format(named=named, length=length, last=last),
                self.preference[not traits].format(names=names),
                self.intent[intent is None].format(intent=intent),
            ]
        )


WORDINGS = {
    "notes": Wording(
        "{name} {count}",
        "{name} {count}",
        ("Evidence: {named} of {length}; last {last}.", "Evidence: last {last}."),
        ("Preference: {names}.", "Preference: more of the same kind."),
        ("Intent: {intent}.", "Intent: something close to the last."),
    ),
    "sentences": Wording(
        "{count} are {name}",
        "{count} {name}",
        ("Evidence: of the {length} items in this history, {named}; the latest is {last}.",
         "Evidence: the latest item in this history is {last}."),
        ("Preference: this user likes {names}.", "Preference: this user likes more of the same kind."),
        ("Intent: the next item should be {intent}.", "Intent: the next item should be close to the latest."),
    ),
}  # fmt: skip
"""Notes cost few tokens and suit a model that has learnt English here; sentences suit one that is pretrained."""
NOTES = "notes"


class RuleTeacher:
    """Writes the reasoning response for a history and its next item.

    Args:
        items: All items.
        index: Their semantic IDs.
        wording: One of :data:`WORDINGS`.
    """

    def __init__(self, items: Mapping[str, Item], index: ItemIndex, wording: str = NOTES) -> None:
        self.items = items
        self.index = index
        self.wording = WORDINGS[wording]

    @cached_property
    def traits(self) -> dict[str, tuple[str, ...]]:
        """What the teacher may say of each item: its telling categories, or its brand when it has none."""
        counts = Counter(name for item in self.items.values() for name in item.categories)
        telling = {name for name, count in counts.items() if count <= COMMON * len(self.items)}
        return {
            key: tuple(name for name in item.categories if name in telling) or ((item.brand,) if item.brand else ())
            for key, item in self.items.items()
        }

    def chain(self, history: Sequence[str], target: str) -> str:
        """Return the whole response: thought, denoised history and answer.

        Args:
            history: Item ids that the prompt shows, oldest first, at least one.
            target: The true next item.
        """
        counts = Counter(name for item in history for name in self.traits[item])
        dominant = [name for name, _ in counts.most_common(DOMINANT)]
        intent = self.intent(counts, target)
        kept = self.denoise(history, {*dominant[:2], *intent[:1]})
        thought = self.wording.thought(
            [(name, str(counts[name])) for name in dominant],
            str(len(history)),
            short_title(self.items[history[-1]].title),
            next(iter(intent), None),
        )
        return f"<think>{thought}</think>{''.join(self.index.texts(kept))}<answer>{self.index.text(target)}</answer>"

    def intent(self, counts: Mapping[str, int], target: str) -> tuple[str, ...]:
        """Return the target's trait that is most frequent in the history, () when it has none."""
        traits = self.traits[target]
        return (max(traits, key=lambda name: counts.get(name, 0)),) if traits else ()

    def denoise(self, history: Sequence[str], wanted: set[str]) -> list[str]:
        """Return the most recent items of ``history`` that share a wanted trait, oldest first; all count if none do."""
        fitting = [item for item in history if wanted.intersection(self.traits[item])]
        return (fitting or list(history))[-KEPT:]
