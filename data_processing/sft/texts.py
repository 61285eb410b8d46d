"""Texts as slices of one array of characters, so that millions of rows are put together without a Python object each.

A row is a template filled in: literal, field, literal, ... Every literal and every field is a slice of an arena. A
compiled loop copies slice after slice to where Arrow wants the row to be.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_processing.compiled import compiled
from gream_verl.core.errors import InputError

Ints = npt.NDArray[np.integer[Any]]
Slices = npt.NDArray[np.int64]
"""``[..., 2]``: where texts begin and end in an arena; ``(0, 0)`` is the empty text."""
NOTHING = -1
"""Where a template has no more pieces."""


class Arena:
    """Texts one after another, in one array that grows.

    Args:
        encoding: ``utf-8`` for bytes, ``utf-32-le`` for one number a character.
    """

    def __init__(self, encoding: str = "utf-8") -> None:
        self._encoding = encoding
        self._dtype = np.dtype("<u4" if encoding == "utf-32-le" else np.uint8)
        self._parts: list[npt.NDArray[Any]] = [np.zeros(0, self._dtype)]
        self._size = 0

    @property
    def characters(self) -> npt.NDArray[Any]:
        """All that was added so far."""
        if len(self._parts) > 1:
            self._parts = [np.concatenate(self._parts)]
        return self._parts[0]

    def add(self, texts: Iterable[str]) -> Slices:
        """Put ``texts`` at the end; return where they are, ``[texts, 2]``."""
        encoded = [text.encode(self._encoding) for text in texts]
        sizes = np.fromiter(map(len, encoded), np.int64, len(encoded)) // self._dtype.itemsize
        ends = self.append(np.frombuffer(b"".join(encoded), self._dtype)) + np.cumsum(sizes)
        return np.stack([ends - sizes, ends], axis=1)

    def append(self, characters: npt.NDArray[Any]) -> int:
        """Put ``characters`` at the end; return where they begin."""
        start = self._size
        self._parts.append(characters)
        self._size += len(characters)
        return start


class Templates:
    """Texts with fields in braces.

    Args:
        templates: The texts.
        encoding: That of the arena which holds the fields.
    """

    def __init__(self, templates: Sequence[str], encoding: str = "utf-8") -> None:
        parsed = [
            [(literal, field or "") for literal, field, _, _ in string.Formatter().parse(template)]
            for template in templates
        ]
        self.fields = sorted({field for pieces in parsed for _, field in pieces if field})
        literals = list(dict.fromkeys(literal for pieces in parsed for literal, _ in pieces))
        arena = Arena(encoding)
        slices = arena.add(literals)  # before the characters are asked for
        self._literals = slices, arena.characters
        of_field = {field: code for code, field in enumerate(self.fields)}
        of_literal = {literal: len(of_field) + code for code, literal in enumerate(literals)}
        plan = np.full((len(parsed), max(map(len, parsed)), 2), NOTHING)
        for row, pieces in zip(plan, parsed, strict=True):
            for place, (literal, field) in enumerate(pieces):
                row[place] = of_literal[literal], of_field.get(field, NOTHING)
        self._plan = plan.reshape(len(parsed), -1)

    def fill(self, numbers: Ints, fields: Any) -> Filled:
        """Fill in templates.

        Args:
            numbers: Number of the template of every row.
            fields: Has the slices ``[rows, 2]`` of every field, as ``str.format`` finds it: ``sid``, ``kept[0]``.
        """
        slices = [string.Formatter().get_field(f"0.{name}", (fields,), {})[0] for name in self.fields]
        stacked = np.stack(slices) if slices else np.zeros((0, len(numbers), 2), np.int64)
        return Filled(self._plan, *self._literals, np.asarray(numbers, np.int64), stacked)


class Filled:
    """Filled-in templates, not yet written out: see :meth:`Templates.fill`."""

    def __init__(self, plan: Ints, literals: Slices, letters: npt.NDArray[Any], numbers: Ints, fields: Slices) -> None:
        self._plan = (plan, literals, numbers, np.ascontiguousarray(fields, np.int64))
        self._letters = letters

    def measure(self, lengths: Ints, places: Ints) -> None:
        """Set the characters of every row in ``lengths``, at its place."""
        _measure(*self._plan, lengths, places)

    def copy(self, arena: npt.NDArray[Any], text: npt.NDArray[Any], offsets: Ints, places: Ints) -> None:
        """Write every row to ``text``, from the offset at its place."""
        _copy(*self._plan, self._letters, arena, text, offsets, places)


def render(arena: npt.NDArray[Any], parts: Sequence[tuple[Filled, Ints]]) -> tuple[npt.NDArray[Any], Ints]:
    """Write out rows.

    Args:
        arena: What the slices cut from.
        parts: Rows, and the place of each among all; together every place once.

    Returns:
        The characters, and where the text at each place begins, ``[rows + 1]``.
    """
    offsets = np.zeros(1 + sum(len(places) for _, places in parts), np.int64)
    for filled, places in parts:
        filled.measure(offsets, 1 + places)
    np.cumsum(offsets, out=offsets)
    text = np.empty(offsets[-1], arena.dtype)
    for filled, places in parts:
        filled.copy(arena, text, offsets, places)
    return text, offsets


def join(arena: npt.NDArray[Any], pieces: Sequence[Slices]) -> tuple[npt.NDArray[Any], Ints]:
    """Join pieces row by row, and the rows one after another.

    Args:
        arena: What the slices cut from.
        pieces: Slices ``[rows, 2]`` of the first, second, ... piece of every row.

    Returns:
        The characters, and where each row begins, ``[rows + 1]``.
    """
    rows = len(pieces[0])
    plan, literals = np.arange(len(pieces))[None], np.zeros((0, 2), np.int64)
    filled = Filled(plan, literals, arena[:0], np.zeros(rows, np.int64), np.stack(pieces))
    return render(arena, [(filled, np.arange(rows))])


def string_array(text: npt.NDArray[np.uint8], offsets: Ints) -> pa.StringArray:
    """Return the texts that begin at ``offsets`` as an Arrow array, without a copy.

    Raises:
        InputError: When they are 2 GiB or more together.
    """
    if offsets[-1] >= 2**31:
        raise InputError(
            f"{len(offsets) - 1} texts of {offsets[-1]} bytes together: too long to be trained on; ask for shorter "
            "histories, or shorten titles and descriptions"
        )
    buffers = [pa.py_buffer(offsets.astype(np.int32)), pa.py_buffer(text)]
    return pa.StringArray.from_buffers(len(offsets) - 1, *buffers)


@compiled
def _measure(plan, literals, numbers, fields, lengths, places):  # type: ignore[no-untyped-def]
    for row in range(len(numbers)):
        length = 0
        for code in plan[numbers[row]]:
            if code >= 0:
                piece = fields[code, row] if code < len(fields) else literals[code - len(fields)]
                length += piece[1] - piece[0]
        lengths[places[row]] = length


@compiled
def _copy(plan, literals, numbers, fields, letters, arena, text, offsets, places):  # type: ignore[no-untyped-def]
    for row in range(len(numbers)):
        place = offsets[places[row]]
        for code in plan[numbers[row]]:
            if code < 0:
                continue
            if code < len(fields):
                piece, source = fields[code, row], arena
            else:
                piece, source = literals[code - len(fields)], letters
            source = source[piece[0] : piece[1]]
            target = text[place : place + len(source)]
            for character in range(len(source)):  # many times as fast as one assignment of the slice
                target[character] = source[character]
            place += len(source)
