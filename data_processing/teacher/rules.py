"""A teacher that needs no language model: chains of thought by rule from titles and categories.

It is shown the true next item, as the language-model teacher is, and may use of it only one category: the chain names
evidence in the history, the preference behind it and an intent, then keeps the part of the history that speaks for it
(arXiv 2510.20815, section 3.3, in its four steps).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property

from data_processing.layout import Item
from gream_verl.semantic_ids import ItemIndex

DOMINANT = 3
"""Categories named as evidence."""
KEPT = 5
"""Items that the denoised history keeps at most."""
COMMON = 0.6
"""A category that more than this share of the items has tells nothing, such as the root of an Amazon catalogue."""
TITLE_WORDS = 8


class RuleTeacher:
    """Writes the reasoning response for a history and its next item.

    Args:
        items: All items.
        index: Their semantic IDs.
    """

    def __init__(self, items: Mapping[str, Item], index: ItemIndex) -> None:
        self.items = items
        self.index = index

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
        return (
            f"<think>{self._evidence(history, counts, dominant)} {_preference(dominant)} {_intent(intent)}</think>"
            f"{''.join(self.index.texts(kept))}<answer>{self.index.text(target)}</answer>"
        )

    def intent(self, counts: Mapping[str, int], target: str) -> tuple[str, ...]:
        """Return the target's trait that is most frequent in the history, () when it has none."""
        traits = self.traits[target]
        return (max(traits, key=lambda name: counts.get(name, 0)),) if traits else ()

    def denoise(self, history: Sequence[str], wanted: set[str]) -> list[str]:
        """Return the most recent items of ``history`` that share a wanted trait, oldest first; all count if none do."""
        fitting = [item for item in history if wanted.intersection(self.traits[item])]
        return (fitting or list(history))[-KEPT:]

    def _evidence(self, history: Sequence[str], counts: Mapping[str, int], dominant: Sequence[str]) -> str:
        last = short_title(self.items[history[-1]].title)
        named = ", ".join(f"{name} {counts[name]}" for name in dominant)
        return f"Evidence: {named} of {len(history)}; last {last}." if named else f"Evidence: last {last}."


def short_title(title: str, words: int = TITLE_WORDS) -> str:
    """Return the first words of a title."""
    return " ".join(title.split()[:words]).rstrip(".,;:")


def _preference(dominant: Sequence[str]) -> str:
    return f"Preference: {' and '.join(dominant[:2])}." if dominant else "Preference: more of the same kind."


def _intent(intent: Sequence[str]) -> str:
    return f"Intent: {intent[0]}." if intent else "Intent: something close to the last."
