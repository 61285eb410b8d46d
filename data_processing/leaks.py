"""Does a chain of thought give its own answer away?

The teacher is shown the true next item and asked to reason as if it did not know it. A chain that names the item's
title or semantic ID before the answer would teach the model to recall, not to reason, so it is dropped.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import product

from gream_verl.core.semantic_ids import SID_TOKEN, SemanticId, find_sids

_ANSWER = re.compile(r"<answer>[^<]*(?:<\|[^<]*)*</answer>\s*$")
_WORD = re.compile(r"\w+")
SIMILAR = 0.9
SHARED_TRIGRAMS = 0.4
"""What is similar by :data:`SIMILAR` lacks at most 18% of the title's letters, and each letter is in 3 trigrams."""
FUZZY_LENGTH = 8
"""Shorter titles are compared exactly: a letter more makes another word of them."""
TITLE_WORDS = 8
"""Words of a short title."""


def find_leak(
    chain: str,
    *,
    title: str,
    sid: SemanticId,
    history_titles: Collection[str] = (),
    history_sids: Collection[SemanticId] = (),
) -> str | None:
    """Return what of the target a chain names outside its final answer.

    What the user has really had before may be named: an item that is bought again, or "Alien 3" when the target is
    "Alien".

    Args:
        chain: The whole response, with its ``<answer>``.
        title: The target's title.
        sid: The target's semantic ID.
        history_titles: Titles of the user's earlier items.
        history_sids: Their semantic IDs.

    Returns:
        "sid", "title" or None.
    """
    thought = _ANSWER.sub("", chain)
    if any(_names_target(mention, sid) for mention in find_sids(thought) if mention not in history_sids):
        return "sid"
    return "title" if names_title(SID_TOKEN.sub(" ", thought), title, history_titles) else None


def names_title(text: str, title: str, allowed: Iterable[str] = ()) -> bool:
    """Whether ``text`` names ``title``: any case, accents, punctuation and division in words, small misspellings too.

    Args:
        text: Where to look.
        title: What to look for: see :func:`title_forms`. One of a single word, such as "Heat", only counts with a
            capital: the text may be about heat.
        allowed: Other titles that the text may name. "Alien 3" may be named when "Alien" is looked for, and "Alien 3"
            is found although "Alien" may be named.
    """
    words, forms = f" {normal_words(text)} ", title_forms(title)
    others = sorted({normal_words(other) for other in allowed} - {""}, key=lambda other: (-len(other), other))
    longer = [other for other in others if any(f" {form} " in f" {other} " for form in forms)]
    left = _without(words, longer)
    if any(f" {form} " in left and (" " in form or _with_capital(text, form)) for form in forms):
        return True
    left = _without(words, others)
    return any(len(form) >= FUZZY_LENGTH and _fuzzy(left, form) for form in forms)


def title_forms(title: str) -> set[str]:
    """Return what a title is found by: its words, those without brackets, and the first ones of a long title."""
    return {normal_words(form) for form in (title, re.sub(r"\(.*?\)", " ", title), short_title(title))} - {""}


def _without(words: str, titles: Iterable[str]) -> str:
    for title in titles:
        words = words.replace(f" {title} ", " | ")
    return words


def _with_capital(text: str, word: str) -> bool:
    """Whether ``word`` stands in ``text`` with a capital letter, or in letters that have none."""
    found = (match[0] for match in _WORD.finditer(text) if normal_words(match[0]) == word)
    return any(as_is != as_is.lower() or as_is == as_is.upper() for as_is in found)


def _fuzzy(text: str, form: str) -> bool:
    """Whether some words of ``text`` are nearly ``form``; the trigrams in common rule most texts out at once."""
    trigrams = [form[start : start + 3] for start in range(len(form) - 2)]
    if sum(trigram in text for trigram in trigrams) < SHARED_TRIGRAMS * len(trigrams):
        return False
    words, width = text.split(), len(form.split())
    matcher = SequenceMatcher(b=form, autojunk=False)
    for start, length in product(range(len(words)), range(max(width - 1, 1), width + 2)):
        matcher.set_seq1(" ".join(words[start : start + length]))
        if matcher.real_quick_ratio() >= SIMILAR and matcher.quick_ratio() >= SIMILAR and matcher.ratio() >= SIMILAR:
            return True
    return False


def short_title(title: str) -> str:
    """Return the first words of a title."""
    return " ".join(title.split()[:TITLE_WORDS]).rstrip(".,;:")


@lru_cache(maxsize=1 << 16)
def normal_words(text: str) -> str:
    """Return the words of ``text`` without case, accents and punctuation, with one space between."""
    if text.isascii():
        return " ".join(_WORD.findall(text.casefold()))
    plain = unicodedata.normalize("NFKD", text).casefold()
    return " ".join(_WORD.findall("".join(letter for letter in plain if not unicodedata.combining(letter))))


def _names_target(mention: SemanticId, sid: SemanticId) -> bool:
    """Whether ``mention`` is the target or all of its path but the last token."""
    return mention[: len(sid)] == sid or (len(sid) > 1 and mention == sid[:-1])
