"""Semantic IDs (SIDs): their grammar, and the index that gives every item one.

An item is a path of codes, one token a level: ``<|a_12|><|b_7|><|c_201|>``. Levels are letters from ``a``, codes count
from 1. Items that share a whole path get one collision token more on the next level, all of them, so that no SID is a
prefix of another (arXiv 2510.20815, section 3.1; the authors' ``<D>.index.json``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from gream_verl.files import InputError, read_json, write_json

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
    """Return the tokens of ``text`` when it is one well-formed SID and nothing else, else None.

    Well formed: at least one token, levels in order from ``a``, each once, nothing before, between or after.

    >>> parse_sid("<|a_1|><|b_2|>"), parse_sid("<|b_2|><|a_1|>"), parse_sid("x <|a_1|>")
    (('<|a_1|>', '<|b_2|>'), None, None)
    """
    tokens = find_tokens(text)
    in_order = all(token[2] == chr(ord("a") + level) for level, token in enumerate(tokens))
    return tuple(tokens) if tokens and in_order and "".join(tokens) == text else None


@dataclass(frozen=True)
class ItemIndex:
    """Which SID every item has.

    Attributes:
        sids: Item id to its SID. Items keep the order of the file.
        base_levels: Number of levels that every item has; an item in a collision has one token more.
        source: Where the index came from, for messages.

    Raises:
        InputError: When SIDs are malformed, shared, or prefixes of one another.
    """

    sids: Mapping[str, SemanticId]
    source: str = "item index"

    def __post_init__(self) -> None:
        _validate(self.sids, self.source)

    @cached_property
    def base_levels(self) -> int:
        """Number of levels every item has, without the collision level."""
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
        """Return the SID of ``item`` as text.

        Raises:
            InputError: When the item is not in the index.
        """
        try:
            return "".join(self.sids[item])
        except KeyError:
            raise InputError(f"{self.source}: item {item!r} is not in the index; build the index anew") from None

    def texts(self, items: Iterable[str]) -> list[str]:
        """Return the SIDs of ``items`` as text."""
        return [self.text(item) for item in items]

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ItemIndex:
        """Read and check ``<D>.index.json``: ``{item: [token, ...]}``."""
        raw = read_json(path, "build it with `gream index build`")
        if not isinstance(raw, dict) or not all(isinstance(sid, list) for sid in raw.values()):
            raise InputError(f'{path}: expected {{item: ["<|a_1|>", ...]}}; build it with `gream index build`')
        return cls({item: tuple(sid) for item, sid in raw.items()}, source=str(path))

    @classmethod
    def from_codes(cls, items: Sequence[str], codes: Iterable[Sequence[int]]) -> ItemIndex:
        """Make an index from rows of codes (from 0) that may have different lengths."""
        paths = ([format_token(level, int(code) + 1) for level, code in enumerate(row)] for row in codes)
        return cls({item: tuple(path) for item, path in zip(items, paths, strict=True)})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``<D>.index.json`` atomically."""
        write_json(path, {item: list(sid) for item, sid in self.sids.items()})


def _validate(sids: Mapping[str, SemanticId], source: str) -> None:
    if not sids:
        raise InputError(f"{source}: the index is empty; build it with `gream index build`")
    owners: dict[SemanticId, str] = {}
    for item, sid in sids.items():
        if not all(isinstance(token, str) for token in sid) or parse_sid("".join(sid)) != tuple(sid):
            raise InputError(
                f"{source}: item {item!r} has a malformed SID {list(sid)}; expected one token a level, "
                "in order, such as ['<|a_1|>', '<|b_7|>']"
            )
        if sid in owners:
            raise InputError(
                f"{source}: items {owners[sid]!r} and {item!r} share the SID {''.join(sid)}; "
                "resolve collisions with one more token each"
            )
        owners[sid] = item
    base_levels = min(map(len, owners))
    for sid, item in owners.items():
        if len(sid) > base_levels + 1:
            raise InputError(f"{source}: item {item!r} has {len(sid)} tokens; expected {base_levels} or one more")
        if len(sid) > base_levels and (owner := owners.get(sid[:base_levels])) is not None:
            raise InputError(
                f"{source}: the SID of item {owner!r} is a prefix of that of {item!r}; "
                "give every item of a collision a collision token"
            )
