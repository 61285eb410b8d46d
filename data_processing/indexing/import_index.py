"""Item indexes of other projects: read, checked, and turned into ours.

Known are the authors' files, whose form is ours (``["<|a_12|>", "<|b_7|>"]``, codes from 1), those of LETTER, LC-Rec
and MiniOneRec (``["<a_11>", "<b_6>"]``, codes from 0), lists of codes as TIGER has them (``[11, 6]``, from 0), and the
texts of OneRec (``"<|sid_begin|><s_a_11><s_b_6><|sid_end|>"``) and OpenOneRec (``<item_a_11>``), codes from 0.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_processing.indexing.residual_index import resolve_collisions
from gream_verl.core.errors import InputError
from gream_verl.core.files import atomic_path, read_json, require_file
from gream_verl.core.semantic_ids import MAX_LEVELS, ItemIndex, format_token

TOKEN = re.compile(r"<(\||s_|item_|)([a-z])_(0|[1-9][0-9]{0,8})(\|?)>")
MARKERS = ("<|sid_begin|>", "<|sid_end|>", "<|item_begin|>", "<|item_end|>")
_MARKER = re.compile("|".join(map(re.escape, MARKERS)))
MOST_CODES = 10**9 - 1
FORMS = {
    "|": "GREAM: tokens such as <|a_1|>, codes from 1",
    "": "LETTER, LC-Rec, MiniOneRec: tokens such as <a_0>, codes from 0",
    "0": "TIGER: lists of codes from 0",
    "s_": "OneRec: tokens such as <s_a_0>, codes from 0",
    "item_": "OpenOneRec: tokens such as <item_a_0>, codes from 0",
}


@dataclass(frozen=True)
class OtherIndex:
    """An item index of well-formed semantic IDs; several items may still share one.

    Attributes:
        source: The file.
        form: One of ``FORMS``.
        paths: Item to its codes, from 0, in the order of the file.
    """

    source: str
    form: str
    paths: dict[str, tuple[int, ...]]

    @property
    def codes(self) -> np.ndarray:
        """Codes of the levels that every item has, int64 [items, levels]."""
        levels = min(map(len, self.paths.values()))
        return np.array([path[:levels] for path in self.paths.values()])

    def for_items(self, items: Collection[str], item_file: str | os.PathLike[str]) -> OtherIndex:
        """Return the index of ``items`` alone, in their order; refuse one of ``item_file`` without a semantic ID."""
        if missing := [item for item in items if item not in self.paths]:
            raise InputError(
                f"{self.source}: has no SID for {len(missing):,} of the {len(items):,} items of {item_file}, such as "
                f"{reprlib.repr(missing[0])}; take the item file that it was made for"
            )
        return replace(self, paths={item: self.paths[item] for item in items})

    def to_index(self, *, resolve: bool = False) -> ItemIndex:
        """Return our item index of these items; ``resolve`` numbers those that share a path again, in their order."""
        paths = resolve_collisions(self.codes) if resolve else self.paths.values()
        sids = [tuple(format_token(level, code + 1) for level, code in enumerate(path)) for path in paths]
        return ItemIndex(dict(zip(self.paths, sids, strict=True)), self.source)

    def describe(self) -> dict[str, Any]:
        """Return the content of the file in figures, for a table."""
        codes, sharing = self.codes, Counter(self.paths.values())
        return {
            "form": self.form,
            "items": len(self.paths),
            "codes used": {level: len(np.unique(used)) for level, used in zip(ascii_lowercase, codes.T, strict=False)},
            "items with a collision token": sum(len(path) > codes.shape[1] for path in self.paths.values()),
            "items that share a SID": sum(count for count in sharing.values() if count > 1),
        }


def read_other_index(path: str | os.PathLike[str]) -> OtherIndex:
    """Read ``{item: [token or code, ...]}`` in the form that its tokens show."""
    rows = read_json(path)
    if not isinstance(rows, dict) or not rows:
        raise InputError(f'{path}: expected {{item: ["<a_0>", "<b_0>", ...]}} with at least one item')
    forms, paths = set(), {}
    for item, row in rows.items():
        listed = re.findall(r"<[^<>]+>|[^<>]+", row) if isinstance(row, str) else row
        tokens = [token for token in listed if token not in MARKERS] if isinstance(listed, list) else []
        tokens = tokens if len(tokens) < MAX_LEVELS else []
        parts = [_parse(token) if isinstance(token, str | int) else None for token in tokens]
        in_order = zip(parts, ascii_lowercase, strict=False)
        codes = [part[2] for part, level in in_order if part and part[1] in ("", level)]
        forms |= {part[0] for part in parts if part}
        if not codes or len(codes) < len(parts) or len(forms) > 1:
            raise InputError(
                f"{path}: item {reprlib.repr(item)} has {reprlib.repr(row)}; expected one token per level, in order, "
                "such as ['<|a_1|>', '<|b_7|>'], ['<a_0>', '<b_6>'] or [0, 6], of one form in the whole file"
            )
        paths[item] = tuple(codes)
    # Longer SIDs must be those of collisions: one token more, of items that share a path or once shared one.
    lengths, least = Counter(map(len, paths.values())), min(map(len, paths.values()))
    sharing = Counter(codes[:least] for codes in paths.values())
    alone = sum(len(codes) > least and sharing[codes[:least]] == 1 for codes in paths.values())
    if max(lengths) > least + 1 or alone > lengths[least]:
        odd = min(paths, key=lambda item: lengths[len(paths[item])])
        raise InputError(f"{path}: item {reprlib.repr(odd)} has {len(paths[odd])} tokens, unlike the others")
    form = forms.pop()
    if form == "|" and not any(0 in codes for codes in paths.values()):
        paths = {item: tuple(code - 1 for code in codes) for item, codes in paths.items()}
    return OtherIndex(str(path), FORMS[form], paths)


@lru_cache(maxsize=None, typed=True)  # there are thousands of tokens in millions of semantic IDs
def _parse(token: str | int) -> tuple[str, str, int] | None:
    """Return form, level ("" for a number) and code of a token, None when it is none."""
    if type(token) is int:
        return ("0", "", token) if 0 <= token < MOST_CODES else None
    match = TOKEN.fullmatch(str(token))
    closed = match and (match[1] == "|") == (match[4] == "|")
    return (match[1], match[2], int(match[3])) if match and closed and int(match[3]) < MOST_CODES else None


def import_rows(source: Path, output: Path) -> dict[str, Any]:
    """Write rows whose texts hold SIDs in another form, such as ``<a_0>``, with ours, ``<|a_1|>``.

    Every text of a parquet file is read, also inside lists and structs. Returns the form, the tokens and the rows.
    """
    forms = Counter[str]()

    def ours(match: re.Match[str]) -> str:
        parsed = _parse(match[0])
        if parsed is None or parsed[0] == "|":
            return match[0]
        form, level, code = parsed
        forms[form] += 1
        return format_token(ascii_lowercase.index(level), code + 1)

    def translated(value: Any) -> Any:
        if isinstance(value, list):
            return [translated(one) for one in value]
        if isinstance(value, dict):
            return {name: translated(one) for name, one in value.items()}
        return TOKEN.sub(ours, _MARKER.sub("", value)) if isinstance(value, str) else value

    try:
        table = pq.read_table(require_file(source, "check the path"))
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"{source}: not a parquet file ({str(error).splitlines()[0]})") from error
    rows = translated(table.to_pylist())
    if len(forms) != 1:
        found = ", ".join(FORMS[form] for form in forms) or "no SID of another project"
        raise InputError(f"{source}: holds {found}; expected SIDs of one form, such as <a_0><b_6>")
    with atomic_path(output) as temporary:
        pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), temporary)
    (form,) = forms
    return {"form": FORMS[form], "tokens": forms[form], "rows": len(rows), "codes": "each 1 higher", "written": output}
