"""Semantic IDs (SIDs): their grammar, and the index of items to SIDs.

An item is a path of codes, one token per level: ``<|a_12|><|b_7|><|c_201|>``. Levels are letters from ``a``, codes
count from 1. All items that share a whole path get one more token on the next level, the collision token, so that no
SID is a prefix of another (arXiv 2510.20815, section 3.1; the authors' ``<D>.index.json``).
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain

import numpy as np
from pydantic_core import from_json

from gream_verl.core.errors import InputError
from gream_verl.core.files import require_file, write_json

SID_TOKEN = re.compile(r"<\|([a-z])_([1-9][0-9]{0,8})\|>")
MAX_LEVELS = 26

SemanticId = tuple[str, ...]


def format_token(level: int, code: int) -> str:
    """Return the token of ``code`` (from 1) on ``level`` (from 0).

    >>> format_token(1, 7)
    '<|b_7|>'
    """
    if not 0 <= level < MAX_LEVELS or code < 1:
        raise ValueError(f"level must be 0 to {MAX_LEVELS - 1} and code at least 1, got level {level}, code {code}")
    return f"<|{chr(ord('a') + level)}_{code}|>"


def parse_token(token: str) -> tuple[int, int] | None:
    """Return ``(level, code)`` of a SID token, or None when ``token`` is not one.

    >>> parse_token("<|b_7|>"), parse_token("hello")
    ((1, 7), None)
    """
    match = SID_TOKEN.fullmatch(token)
    return (ord(match[1]) - ord("a"), int(match[2])) if match else None


def find_tokens(text: str) -> list[str]:
    """Return every SID token in ``text``, in order."""
    return [match[0] for match in SID_TOKEN.finditer(text)]


def find_sids(text: str) -> list[SemanticId]:
    """Return every SID in ``text``, in order: each begins with a token of the first level.

    >>> find_sids("<|a_1|><|b_2|>, <|a_3|>")
    [('<|a_1|>', '<|b_2|>'), ('<|a_3|>',)]
    """
    found: list[list[str]] = []
    for token in find_tokens(text):
        if token.startswith("<|a_") or not found:
            found.append([])
        found[-1].append(token)
    return [tuple(tokens) for tokens in found]


def parse_sid(text: str) -> SemanticId | None:
    """Return the tokens of ``text`` when it is exactly one well-formed SID, else None.

    Well formed: at least one token, levels in order from ``a``, each once, nothing before, between or after.

    >>> parse_sid("<|a_1|><|b_2|>"), parse_sid("<|b_2|><|a_1|>"), parse_sid("x <|a_1|>")
    (('<|a_1|>', '<|b_2|>'), None, None)
    """
    tokens = find_tokens(text)
    in_order = all(token[2] == chr(ord("a") + level) for level, token in enumerate(tokens))
    return tuple(tokens) if tokens and in_order and "".join(tokens) == text else None


@dataclass(frozen=True)
class ItemIndex:
    """The SID of every item.

    Attributes:
        sids: Item id to its SID, in the order of the file; well formed, and none a prefix of another.
        source: The file of the index, for messages.
    """

    sids: Mapping[str, SemanticId]
    source: str = "item index"

    def __post_init__(self) -> None:
        if not self.sids:
            raise InputError(f"{self.source}: the index is empty; build it with `gream index build`")
        _validate(self.sids, self.source)

    @cached_property
    def base_levels(self) -> int:
        """Number of levels of every item; an item in a collision has one more token."""
        return min(len(sid) for sid in self.sids.values())

    @cached_property
    def items(self) -> dict[SemanticId, str]:
        """SID to item id."""
        return {sid: item for item, sid in self.sids.items()}

    @cached_property
    def tokens(self) -> list[str]:
        """Every SID token in use, by level, then by code."""
        used = {token for sid in self.sids.values() for token in sid}
        return sorted(used, key=lambda token: parse_token(token) or (0, 0))

    def __len__(self) -> int:
        return len(self.sids)

    def text(self, item: str) -> str:
        """Return the SID of ``item`` as text."""
        try:
            return "".join(self.sids[item])
        except KeyError:
            raise InputError(f"{self.source}: item {item!r} is not in the index; build the index again") from None

    def texts(self, items: Iterable[str]) -> list[str]:
        """Return the SIDs of ``items`` as text."""
        return [self.text(item) for item in items]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ItemIndex:
        """Read and check ``<D>.index.json``, ``{item: [token, ...]}``."""
        remedy = "build it with `gream index build`"
        file = require_file(path, remedy)
        try:  # this parser keeps each token in memory once, however many items have it
            raw = from_json(file.read_text(encoding="utf-8-sig"), cache_strings="all")
        except ValueError as error:
            raise InputError(f"{path}: not valid JSON ({error}); {remedy}") from error
        if not isinstance(raw, dict) or not all(isinstance(sid, list) for sid in raw.values()):
            raise InputError(f'{path}: expected {{item: ["<|a_1|>", ...]}}; {remedy}')
        return cls({item: tuple(sid) for item, sid in raw.items()}, str(path))

    @classmethod
    def from_codes(cls, items: Sequence[str], codes: Iterable[Sequence[int]]) -> ItemIndex:
        """Make an index from rows of codes (from 0) that may have different lengths."""
        token = cache(format_token)
        paths = ([token(level, int(code) + 1) for level, code in enumerate(row)] for row in codes)
        return cls({item: tuple(path) for item, path in zip(items, paths, strict=True)})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``<D>.index.json`` atomically."""
        write_json(path, {item: list(sid) for item, sid in self.sids.items()})


def _validate(sids: Mapping[str, SemanticId], source: str) -> None:
    """Check that SIDs are well formed, no two alike and none a prefix of another."""
    codes = _codes(sids)
    if codes is None:
        item, sid = next((item, sid) for item, sid in sids.items() if parse_sid("".join(map(str, sid))) != tuple(sid))
        raise InputError(
            f"{source}: item {reprlib.repr(item)} has a malformed SID {reprlib.repr(list(sid))}; expected one token "
            "per level, such as ['<|a_1|>', '<|b_7|>']; read other tokens with `gream index import`"
        )
    # In lexicographic order, equal SIDs are neighbours, and a SID comes right after its prefix.
    order = np.lexsort(codes.T[::-1])
    before, after = codes[order[:-1]], codes[order[1:]]
    shared = (before == after).all(axis=1)
    if shared.any():
        one, other = _first_pair(sids, order, shared)
        count = int((np.append(shared, False) | np.insert(shared, 0, False)).sum())
        raise InputError(
            f"{source}: items {one!r} and {other!r} share the SID {''.join(sids[one])} ({count:,} items share theirs); "
            "give each one more token with `gream index import --resolve`"
        )
    lengths = (codes > 0).sum(axis=1)
    base_levels = lengths.min()
    if codes.shape[1] > base_levels + 1:
        item = list(sids)[int(np.argmax(lengths > base_levels + 1))]
        raise InputError(f"{source}: item {item!r} has {len(sids[item])} tokens; expected {base_levels} or one more")
    prefix = ((before == after) | (before == 0)).all(axis=1)
    if prefix.any():
        owner, item = _first_pair(sids, order, prefix)
        raise InputError(
            f"{source}: the SID of item {owner!r} is a prefix of that of {item!r}; "
            "give every item of a collision a collision token"
        )


def _codes(sids: Mapping[str, SemanticId]) -> np.ndarray | None:
    """Return the codes of all SIDs, int32 [items, levels], 0 after the end; None when a SID is malformed."""
    # 1. All tokens in one list.
    tokens = list(chain.from_iterable(sids.values()))
    lengths = np.fromiter(map(len, sids.values()), np.int64, len(sids))
    if not lengths.all() or not all(issubclass(kind, str) for kind in set(map(type, tokens))):
        return None
    # 2. Each distinct token is parsed once: millions of SIDs hold some thousand tokens.
    number = {token: position for position, token in enumerate(dict.fromkeys(tokens))}
    parsed = list(map(parse_token, number))
    if None in parsed:
        return None
    table = np.array(parsed, np.int32)
    level, code = table[np.fromiter(map(number.__getitem__, tokens), np.int64, len(tokens))].T
    # 3. The level of a token must be its position in its SID.
    position = np.arange(len(tokens)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    if (level != position).any():
        return None
    # 4. One row per SID.
    codes = np.zeros((len(sids), lengths.max()), np.int32)
    codes[np.repeat(np.arange(len(sids)), lengths), position] = code
    return codes


def _first_pair(sids: Mapping[str, SemanticId], order: np.ndarray, pairs: np.ndarray) -> tuple[str, str]:
    """Return the items of a pair of neighbours in ``order``: the pair whose second item comes first in the file."""
    found = np.flatnonzero(pairs)
    first = found[np.argmin(order[found + 1])]
    items = list(sids)
    return items[order[first]], items[order[first + 1]]
