"""Item indexes that others made: read, checked, and turned into ours.

Known are the authors' files, whose form is ours (``["<|a_12|>", "<|b_7|>"]``, codes from 1), those of LETTER, LC-Rec
and MiniOneRec (``["<a_11>", "<b_6>"]``, codes from 0), and lists of codes as TIGER has them (``[11, 6]``, from 0).
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import pairwise
from string import ascii_lowercase
from typing import Any

import numpy as np

from data_processing.indexing.residual_index import resolve_collisions
from gream_verl.core.errors import InputError
from gream_verl.core.files import require_file
from gream_verl.core.semantic_ids import MAX_LEVELS, ItemIndex

TOKEN = re.compile(r"<(\|?)([a-z])_(0|[1-9][0-9]{0,8})\1>")
MOST_CODES = 10**9 - 1
SHOWN = 3
"""Items that a message names."""


@dataclass(frozen=True)
class Form:
    """How a file writes semantic IDs.

    Attributes:
        name: Who writes them so, and how.
        first: The lowest code of a level.
    """

    name: str
    first: int


OURS = Form("GREAM: tokens such as <|a_1|>, codes from 1", 1)
OURS_FROM_0 = Form("tokens such as <|a_0|>, codes from 0", 0)
ANGLES = Form("LETTER, LC-Rec, MiniOneRec: tokens such as <a_0>, codes from 0", 0)
NUMBERS = Form("TIGER: lists of codes from 0", 0)


@dataclass(frozen=True)
class Foreign:
    """An item index in which every semantic ID is in order; several items may still share one.

    Attributes:
        source: The file.
        form: How the file writes semantic IDs.
        paths: Item to its codes (from 0), in the order of the file; as many for all, or for some one more, which tells
            apart items that share the others.
        left_out: Items of the file that the data set does not have.
    """

    source: str
    form: Form
    paths: Mapping[str, tuple[int, ...]]
    left_out: int = 0

    @cached_property
    def codes(self) -> np.ndarray:
        """Codes of the levels that every item has, int64 [items, levels]."""
        levels = min(map(len, self.paths.values()))
        return np.array([path[:levels] for path in self.paths.values()])

    @cached_property
    def collisions(self) -> list[list[str]]:
        """Groups of items with the same path of all levels, in which not each has a code of its own behind it."""
        owners: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for item, path in self.paths.items():
            owners[path[: self.codes.shape[1]]].append(item)
        return [items for items in owners.values() if len(items) > 1 and not self._is_resolved(items)]

    def _is_resolved(self, items: Collection[str]) -> bool:
        paths = {self.paths[item] for item in items}
        return len(paths) == len(items) and all(len(path) > self.codes.shape[1] for path in paths)

    def for_items(self, items: Collection[str], place: str | os.PathLike[str]) -> Foreign:
        """Return the index of ``items`` alone, in their order.

        Args:
            items: The items of a data set, a set or the keys of a dictionary.
            place: Their file, for messages.

        Raises:
            InputError: When one of them has no semantic ID here.
        """
        left_out = [item for item in self.paths if item not in items]
        if missing := [item for item in items if item not in self.paths]:
            others = f", but one for {len(left_out):,} others ({_some(left_out)})" if left_out else ""
            raise InputError(
                f"{self.source}: has no SID for {len(missing):,} of the {len(items):,} items of {place} "
                f"({_some(missing)}){others}; take the item file that it was made for, or `gream index build`"
            )
        return replace(self, paths={item: self.paths[item] for item in items}, left_out=len(left_out))

    def index(self, *, resolve: bool = False) -> ItemIndex:
        """Return our item index of these items.

        Args:
            resolve: Whether to number the items of every collision anew, in their order.

        Raises:
            InputError: When items share a semantic ID or one is the beginning of another's, unless ``resolve``.
        """
        if resolve:
            return ItemIndex.from_codes(list(self.paths), resolve_collisions(self.codes))
        if self.collisions:
            one, other = self._colliding_pair()
            raise InputError(
                f"{self.source}: collisions are not resolved ({self._in_collisions():,} items on "
                f"{len(self.collisions):,} paths), such as {reprlib.repr(one)} {self._in_file(one)} and "
                f"{reprlib.repr(other)} {self._in_file(other)}; `gream index import --resolve` "
                "gives each of them a token more"
            )
        return ItemIndex.from_codes(list(self.paths), self.paths.values())

    def _colliding_pair(self) -> tuple[str, str]:
        by_path = sorted(self.collisions[0], key=lambda item: self.paths[item])
        return next(
            (one, other)
            for one, other in pairwise(by_path)
            if self.paths[other][: len(self.paths[one])] == self.paths[one]
        )

    def _in_collisions(self) -> int:
        return sum(map(len, self.collisions))

    def _in_file(self, item: str) -> list[int]:
        return [code + self.form.first for code in self.paths[item]]

    def describe(self) -> dict[str, Any]:
        """Return what the file holds, for a table."""
        levels = self.codes.shape[1]
        longer = sum(len(path) > levels for path in self.paths.values())
        return {
            "form": self.form.name,
            "items": f"{len(self.paths):,}",
            "levels": levels,
            "codes of level": {
                letter: f"{len(np.unique(codes)):,} used, highest {codes.max() + self.form.first:,}"
                for letter, codes in zip(ascii_lowercase, self.codes.T, strict=False)
            },
            "length": f"{levels}, one more for {longer:,} items" if longer else f"{levels} for all items",
            "last level": "numbers the items that share all others" if self._last_level_numbers() else "as the others",
            "not resolved": {"collisions": f"{len(self.collisions):,}", "items": f"{self._in_collisions():,}"},
        } | ({"items that the data set lacks": f"{self.left_out:,}"} if self.left_out else {})

    def _last_level_numbers(self) -> bool:
        """Whether the last level counts, from 0, the items with the same path before it, as TIGER's and LC-Rec's do."""
        last: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for path in self.codes.tolist():
            last[tuple(path[:-1])].append(path[-1])
        return all(sorted(codes) == list(range(len(codes))) for codes in last.values())


def read_foreign(path: str | os.PathLike[str]) -> Foreign:
    """Read an item index in any form that is known; which one is seen from its tokens.

    Args:
        path: JSON, ``{item: [token or code, ...]}``.

    Returns:
        The index; its collisions may not be resolved.

    Raises:
        InputError: When the file is in no known form, names an item twice, or a semantic ID is malformed, out of order,
            with a gap, or too short or long beside the others.
    """
    source, rows = str(path), _read_rows(path)
    numbers = all(isinstance(code, int) for code in next(iter(rows.values())))
    form, paths = _read_numbers(source, rows) if numbers else _read_tokens(source, rows)
    _check_lengths(source, paths)
    return Foreign(source, form, paths)


def _read_rows(path: str | os.PathLike[str]) -> dict[str, list[Any]]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
            raise InputError(
                f"{path}: {len(twice):,} items are there more than once ({_some(twice)}); keep one SID of each"
            )
        return values

    file = require_file(path, "check the path")
    try:
        rows = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=unique)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); fetch it anew") from error
    if not isinstance(rows, dict) or not rows:
        raise InputError(f'{path}: expected {{item: ["<a_0>", "<b_0>", ...]}} with at least one item; give such a file')
    for item, row in rows.items():
        if not isinstance(row, list) or not row:
            raise InputError(
                f"{path}: item {reprlib.repr(item)} has {reprlib.repr(row)}; expected a list of at least one token"
            )
    return rows


def _read_numbers(source: str, rows: Mapping[str, list[Any]]) -> tuple[Form, dict[str, tuple[int, ...]]]:
    for item, row in rows.items():
        if wrong := [code for code in row if type(code) is not int or not 0 <= code < MOST_CODES]:
            raise InputError(
                f"{source}: item {reprlib.repr(item)} has {reprlib.repr(wrong[0])} in {reprlib.repr(row)}; "
                "expected codes, whole numbers from 0"
            )
    return NUMBERS, {item: tuple(row) for item, row in rows.items()}


def _read_tokens(source: str, rows: Mapping[str, list[Any]]) -> tuple[Form, dict[str, tuple[int, ...]]]:
    parse = cache(_parse)  # there are thousands of tokens in millions of semantic IDs
    bar, example, paths = None, None, {}
    for item, row in rows.items():
        letters, path = "", []
        for token in row:
            parts = parse(token) if isinstance(token, str) else None
            if parts is None or bar not in (None, parts[0]) or parts[2] >= MOST_CODES:
                like = repr(example) if example else "'<|a_1|>', '<a_0>' or a number"
                raise InputError(
                    f"{source}: item {reprlib.repr(item)} has {reprlib.repr(token)} in {reprlib.repr(row)}; "
                    f"expected tokens such as {like} in the whole file"
                )
            bar, example = parts[0], example or token
            letters += parts[1]
            path.append(parts[2])
        if letters != ascii_lowercase[: len(letters)]:
            raise InputError(
                f"{source}: item {reprlib.repr(item)}: {_disorder(letters)} in {reprlib.repr(row)}; "
                "expected one token a level, in order"
            )
        paths[item] = tuple(path)
    if not bar:
        return ANGLES, paths
    if any(0 in path for path in paths.values()):
        return OURS_FROM_0, paths
    return OURS, {item: tuple(code - 1 for code in path) for item, path in paths.items()}


def _parse(token: str) -> tuple[str, str, int] | None:
    """Return bar ("" for none), level and code of a token, None when it is none."""
    match = TOKEN.fullmatch(token)
    return (match[1], match[2], int(match[3])) if match else None


def _disorder(letters: str) -> str:
    """Return what is wrong with levels that are not a, b, c and so on."""
    if twice := [letter for letter, count in Counter(letters).items() if count > 1]:
        return f"level {twice[0]} is there twice"
    if missing := [
        letter for letter in ascii_lowercase[: ascii_lowercase.index(max(letters))] if letter not in letters
    ]:
        return f"level {missing[0]} is missing"
    one, other = next((one, other) for one, other in pairwise(letters) if one > other)
    return f"level {one} comes before level {other}"


def _check_lengths(source: str, paths: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse lengths that collisions do not explain.

    Those with one code more may be alone when a catalogue has lost items, but not outnumber those without.
    """
    lengths = Counter(map(len, paths.values()))
    least, most = min(lengths), max(lengths)
    if least >= MAX_LEVELS:
        raise InputError(f"{source}: {least} levels; expected at most {MAX_LEVELS - 1}, one letter is for collisions")
    with_path = Counter(path[:least] for path in paths.values())
    alone = sum(len(path) > least and with_path[path[:least]] == 1 for path in paths.values())
    if most > least + 1 or alone > lengths[least]:
        ranked = sorted(lengths, key=lambda length: (lengths[length], length))
        rare, usual = ranked[0], ranked[-1]
        item = next(item for item, path in paths.items() if len(path) == rare)
        raise InputError(
            f"{source}: item {reprlib.repr(item)} has {rare} tokens, but {lengths[usual]:,} items have {usual}; "
            "expected as many for all, or one more for items that share a path; repair that item, or remove it"
        )


def _some(items: Collection[str]) -> str:
    shown = [reprlib.repr(item) for item, _ in zip(items, range(SHOWN), strict=False)]
    return ", ".join(shown) + (", ..." if len(items) > SHOWN else "")
