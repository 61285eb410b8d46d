"""Which reasoning rows give their answer away, for many at once.

A chain by rule goes to :func:`data_processing.leaks.find_leak` only when that could find something: it finds a
title only in a text that has all trigrams of the title or, where it allows for misspelling, a share of
:data:`SHARED_TRIGRAMS`. A compiled loop counts them, and nearly all chains have too few.
"""

from __future__ import annotations

import copy
import string
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from data_processing.compiled import compiled
from data_processing.leaks import FUZZY_LENGTH, SHARED_TRIGRAMS, find_leak, normal_words, title_forms
from data_processing.sft.corpus import EMPTY, Corpus
from data_processing.sft.fields import LENGTH, TARGET, Specs, WindowFields
from data_processing.sft.rules import short_title
from data_processing.sft.tasks import REASONING, Renderer, chain_templates
from data_processing.sft.texts import Arena, Slices, Templates, render, string_array
from gream_verl.core.semantic_ids import SID_TOKEN

HASHES = 1 << 15
"""Trigrams are told apart by so many hashes: two that fall together only make more chains suspect."""


class ChainLeaks:
    """Finds leaks in reasoning rows.

    Args:
        corpus: Where the rows are drawn from.
    """

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        self._renderer = Renderer(corpus, [REASONING])
        self._titles = [short_title(item.title) for item in corpus.items]
        self._every = bool(len(corpus.chains[0])) or any(map(SID_TOKEN.search, [*corpus.trait_names, *self._titles]))
        if not self._every:
            self._prepare()

    def find(self, specs: Specs) -> list[str | None]:
        """Return for every row what of the target its chain names, as :func:`find_leak` does."""
        found: list[str | None] = [None] * len(specs)
        suspects = np.arange(len(specs)) if self._every else np.flatnonzero(self._suspects(specs))
        turns = string_array(*self._renderer.turns(np.zeros(len(suspects), np.int64), specs[suspects])).to_pylist()
        for row, chain in zip(suspects.tolist(), turns[1::2], strict=True):
            target, length = specs[row, TARGET], specs[row, LENGTH]
            *history, item = self._corpus.sequence[target - length : target + 1].tolist()
            sids, keys = self._corpus.index.sids, self._corpus.keys
            found[row] = find_leak(
                chain,
                title=self._corpus.items[item].title,
                sid=sids[keys[item]],
                history_titles=[self._titles[past] for past in history],
                history_sids={sids[keys[past]] for past in history},
            )
        return found

    def _prepare(self) -> None:
        """Make the corpus over again in the words that titles are looked for in; every field ends in a space."""
        corpus, encoding = self._corpus, "utf-32-le"
        arena = Arena(encoding)
        words = copy.copy(corpus)
        words.trait_texts = np.concatenate([_add_words(arena, map(normal_words, corpus.trait_names)), EMPTY])
        words.numbers = _add_words(arena, map(str, range(len(corpus.numbers))))
        words.short_titles = _add_words(arena, map(normal_words, self._titles))
        self._words, self._arena = words, arena
        self._templates = Templates([_words_of(template) for template in chain_templates()[:-1]], encoding)
        forms = [sorted(title_forms(item.title)) for item in corpus.items]
        self._forms = np.cumsum([0, *map(len, forms)]), arena.add(form for both in forms for form in both)

    def _suspects(self, specs: Specs) -> npt.NDArray[np.bool_]:
        """Return which chains by rule could be found guilty."""
        fields = WindowFields(self._words, specs)
        filled = self._templates.fill(fields.chain_form, fields)
        text, offsets = render(self._arena.characters, [(filled, np.arange(len(specs)))])
        starts, forms = self._forms
        item = self._corpus.sequence[specs[:, TARGET]]
        share = np.where(forms[:, 1] - forms[:, 0] >= FUZZY_LENGTH, SHARED_TRIGRAMS, 1)
        return _share_trigrams(text, offsets, starts[item], starts[item + 1], forms, share, self._arena.characters)


def _add_words(arena: Arena, texts: Iterable[str]) -> Slices:
    return arena.add(f"{text} " if text else "" for text in texts)


def _words_of(template: str) -> str:
    """Return the thought of a chain template in words, each with a space behind."""
    thought = template[: template.index("</think>")]
    made = " "
    for literal, field, _, _ in string.Formatter().parse(f"{thought}</think>"):
        made += "".join(f"{word} " for word in normal_words(literal).split())
        made += f"{{{field}}}" if field else ""
    return made


@compiled
def _share_trigrams(text, offsets, firsts, ends, forms, share, arena):  # type: ignore[no-untyped-def]
    """Return which texts have a share of the trigrams of one of their titles' forms, ``[rows]``."""
    found = np.zeros(len(firsts), np.bool_)
    marks = np.full(HASHES, -1, np.int32)
    for row in range(len(firsts)):
        for place in range(offsets[row], offsets[row + 1] - 2):
            marks[_hash(text, place)] = row
        for form in range(firsts[row], ends[row]):
            start, end = forms[form]
            shared = 0
            for place in range(start, end - 2):
                shared += marks[_hash(arena, place)] == row
            found[row] |= shared >= share[form] * (end - start - 2)
    return found


@compiled
def _hash(text, place):  # type: ignore[no-untyped-def]
    first, second, third = np.int64(text[place]), np.int64(text[place + 1]), np.int64(text[place + 2])
    return (first * 31 * 31 + second * 31 + third) % HASHES
