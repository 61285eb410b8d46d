"""Texts of sources, made readable."""

from __future__ import annotations

import html
import re
from collections.abc import Callable
from functools import lru_cache

from gream_verl.core.data_folder import Item

_TAG = re.compile(r"</?[A-Za-z!][^>]*>")
_TAG_TAIL = re.compile(r'^(?:[^<>\s]*|(?:[^<>]*=|\s*")[^<>]*)"(?:\s*/)?>|"\s*/>')
_NAMES = (
    "body|br|center|div|em|embed|font|form|h[1-6]|head|hr|html|iframe|img|input|li|link|meta|object|ol|option|param"
    "|script|select|span|strong|style|sub|sup|table|tbody|td|th|tr|ul"
)
_TAG_HEAD = re.compile(
    rf"""<(?:/[a-z]\w*\s*|!--.*|!doctype.*|/?(?:{_NAMES})\b.*|a\s+href\b.*|[a-z][^<>]*=\s*["'].*)$""", re.I | re.S
)
"""A tag without an end. Other words after a "<" are no tag: "if a<b then"."""
_WORD = re.compile(r"[^\W_]")
_SCRIPT = re.compile(r"getTime\(\)|function\s*\(|\bvar\s+\w+\s*=")


def clean_text(text: str) -> str:
    """Return ``text`` without HTML: entities decoded, tags and pieces of tags removed, blanks collapsed.

    >>> clean_text("Home &amp; <b>Garden</b>"), clean_text('<span class="a-size-medium"'), clean_text('" Books" />')
    ('Home & Garden', '', '')
    >>> clean_text('A book of cats" /> and dogs'), clean_text('name="x" />Cats')
    ('A book of cats and dogs', 'Cats')
    """
    text = html.unescape(html.unescape(text))
    if "<" in text or ">" in text:
        text = _TAG_HEAD.sub(" ", _TAG.sub(" ", _TAG_TAIL.sub(" ", text)))
    return " ".join(text.split())


_clean_name = lru_cache(1 << 16)(clean_text)
"""For texts that many items share."""


def clean_title(title: str) -> str:
    """Return a title without HTML, "" for one without a word and for a piece of a script."""
    text = "" if _SCRIPT.search(title) else clean_text(title)
    return text if _WORD.search(text) else ""


def clean_item(item: Item, rewrite_title: Callable[[str], str] = str.strip) -> Item:
    """Return an item without HTML, and without categories that are empty or "unknown"."""
    names = dict.fromkeys(map(_clean_name, item.categories))
    return Item(
        rewrite_title(clean_title(item.title)),
        clean_text(item.description),
        _clean_name(item.brand),
        tuple(name for name in names if name and name.casefold() != "unknown"),
    )
