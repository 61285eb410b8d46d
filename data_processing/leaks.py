"""Search for the next item in a chain of thought, whose writer knows it: only the answer may name it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable
from difflib import SequenceMatcher
from functools import lru_cache
from itertools import product

from gream_verl.core.data_folder import short_title
from gream_verl.core.semantic_ids import SID_TOKEN, SemanticId, find_sids

_ANSWER = re.compile(r"<answer>[^<]*(?:<\|[^<]*)*</answer>\s*$")
_WORD = re.compile(r"\w+")
SIMILAR = 0.9  # least similarity of a misspelt title
SHARED_TRIGRAMS = 0.4  # least share in common: such a title lacks at most 18% of the letters, each in 3 trigrams
FUZZY_LENGTH = 8  # fewest letters of a misspelt title: another letter makes another word of a shorter one


def find_leak(
    chain: str,
    *,
    title: str,
    sid: SemanticId,
    history_titles: Collection[str] = (),
    history_sids: Collection[SemanticId] = (),
) -> str | None:
    """Return the part of the target that a chain names before its final answer: "sid", "title" or None.

    Args:
        chain: The whole response, with its ``<answer>``.
        title: Title of the target.
        sid: Semantic ID of the target.
        history_titles: Titles of the user's earlier items, which may be named.
        history_sids: Their semantic IDs, which may be named.
    """
    thought = _ANSWER.sub("", chain)
    for mention in find_sids(thought):
        # All of the target's path but its last token gives it away, too.
        names_target = mention[: len(sid)] == sid or (len(sid) > 1 and mention == sid[:-1])
        if names_target and mention not in history_sids:
            return "sid"
    return "title" if names_title(SID_TOKEN.sub(" ", thought), title, history_titles) else None


def names_title(text: str, title: str, allowed: Iterable[str] = ()) -> bool:
    """Return whether a text names a title, in any case, punctuation and spacing, with small misspellings.

    Args:
        text: The text to search.
        title: The title. One of a single word, such as "Heat", counts only with a capital: the text may be about heat.
        allowed: Other titles that the text may name: "Alien 3" when the title is "Alien". The title "Alien 3" is found
            although "Alien" is allowed.
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
    """Return the texts that stand for a title: its words, those outside brackets, the first ones of a long title."""
    return {normal_words(form) for form in (title, re.sub(r"\(.*?\)", " ", title), short_title(title))} - {""}


@lru_cache(maxsize=1 << 16)
def normal_words(text: str) -> str:
    """Return the words of a text without case, accents and punctuation, with one space between."""
    if not text.isascii():
        letters = unicodedata.normalize("NFKD", text).casefold()
        text = "".join(letter for letter in letters if not unicodedata.combining(letter))
    return " ".join(_WORD.findall(text.casefold()))


def _without(words: str, titles: Iterable[str]) -> str:
    for title in titles:
        while f" {title} " in words:  # once more for a title that follows itself: the two share a space
            words = words.replace(f" {title} ", " | ")
    return words


def _with_capital(text: str, word: str) -> bool:
    """Return whether a word stands in a text with a capital letter, or in letters that have none."""
    found = (match[0] for match in _WORD.finditer(text) if normal_words(match[0]) == word)
    return any(as_is != as_is.lower() or as_is == as_is.upper() for as_is in found)


def _fuzzy(text: str, form: str) -> bool:
    """Return whether some words of a text are nearly a title's form."""
    # Trigrams in common exclude nearly every text, a hundred times faster than the comparison below.
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
