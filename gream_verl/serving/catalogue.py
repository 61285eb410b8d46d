"""The items of a run, what users did with them, and what counting recommends."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Sequence
from functools import cached_property
from heapq import nlargest
from itertools import islice

import numpy as np
import scipy.sparse as sp

from gream_verl.core.counting import cooccurrence, cooccurrence_scores, recommend
from gream_verl.core.data_folder import DataFolder, Item
from gream_verl.core.semantic_ids import ItemIndex, SemanticId


class Catalogue:
    """The items that an index holds, and the interactions of a data set.

    Attributes:
        index: The items and their semantic IDs.
        texts: The texts of each item.
        histories: The items of every user before the one that the split holds out for the test.
        held_out: That item of every user who has one.
        popularity: Items by their number of interactions for training, the most popular first.
    """

    def __init__(self, data: DataFolder) -> None:
        self.index, texts = ItemIndex.load(data.index), data.read_items()
        self.texts = {item: texts.get(item, Item(item)) for item in self.index.sids}
        sequences = data.read_inter(texts)
        splits = data.read_splits(sequences)
        self.histories = {user: items[: splits[user].test or len(items)] for user, items in sequences.items()}
        self.held_out = {user: items[end] for user, items in sequences.items() if (end := splits[user].test)}
        self._training = [items[: splits[user].training] for user, items in sequences.items()]
        counts = Counter(item for items in self._training for item in items)
        order = sorted(self.index.sids, key=lambda item: (-counts[item], item))
        self.popularity = {item: counts[item] for item in order}
        self._categories: dict[str, list[str]] = {}
        for item, text in self.texts.items():
            for name in text.categories:
                self._categories.setdefault(name, []).append(item)
        self._paths = sorted(self.index.items.items())  # both here: the first question would hold up all others

    def search(self, query: str, limit: int) -> list[str]:
        """Return the items with ``query`` in their titles, the most popular first."""
        wanted = query.casefold()
        return list(islice((item for item in self.popularity if wanted in self.texts[item].title.casefold()), limit))

    def in_categories(self, names: Collection[str]) -> frozenset[str]:
        """Return the items that are in any of the categories."""
        return frozenset[str]().union(*(self._categories.get(name, ()) for name in names))

    def branch(self, prefix: SemanticId, most: int) -> tuple[int, list[str]]:
        """Return how many semantic IDs begin with some tokens, and the most popular of their items."""
        last = chr(0x10FFFF)  # after every token
        begin, end = (bisect_left(self._paths, (sid, "")) for sid in (prefix, (*prefix, last)))
        items = [item for _, item in self._paths[begin:end]]
        return len(items), nlargest(most, items, key=self.popularity.__getitem__)

    def counted(self, history: Sequence[str], k: int) -> list[str]:
        """Return the ``k`` best items for a history by co-occurrence, then by popularity."""
        number_of, counts = self._cooccurrence
        known = [number_of[item] for item in history if item in number_of]
        scores = cooccurrence_scores(counts, [known])
        (best,) = recommend(scores, [known], np.arange(len(number_of)), k)
        items = list(self.popularity)
        return [items[number] for number in best]

    @cached_property
    def _cooccurrence(self) -> tuple[dict[str, int], sp.csr_array]:
        """The number of each item, by popularity, and the counts of pairs."""
        number_of = {item: number for number, item in enumerate(self.popularity)}
        train = [[number_of[item] for item in items if item in number_of] for items in self._training]
        return number_of, cooccurrence(train, len(number_of))
