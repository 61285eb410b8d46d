"""Names, schemas and checks of every file of one data set.

The names are those of the authors' code, LC-Rec and LETTER (``<D>.inter.json``, ``<D>.item.json``, ``<D>.index.json``),
so that published data drop in. All files of a data set lie in one folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json
from gream_verl.core.prompts import Mode
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.core.split import split_file, training_parts

OTHER_PARQUET = ("align", "rl", "val", "test", "chains")
"""What follows the data set's name in files that are no mix."""


@dataclass(frozen=True)
class Item:
    """What is known of one item.

    Attributes:
        title: Readable title, never empty.
        description: Readable description, "" when there is none.
        brand: Brand, author or label, "" when there is none.
        categories: Names of categories, general to special where the source orders them.
    """

    title: str
    description: str = ""
    brand: str = ""
    categories: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the value that ``<D>.item.json`` holds for this item."""
        return {
            "title": self.title,
            "description": self.description,
            "brand": self.brand,
            "categories": list(self.categories),
        }


@dataclass(frozen=True)
class DataFolder:
    """Where every file of a data set lies.

    Attributes:
        root: The folder.
        name: The data set's name, ``<D>`` in file names, such as ``ml-100k``.
    """

    root: Path
    name: str

    def __init__(self, root: str | os.PathLike[str], name: str) -> None:
        object.__setattr__(self, "root", Path(root))
        object.__setattr__(self, "name", name)
        if not name or Path(name).name != name:
            raise InputError(f"data set name {name!r}: not usable in file names; use letters, digits, '-' and '_'")

    @property
    def inter(self) -> Path:
        """``{user: [item, ...]}`` in time order."""
        return self.root / f"{self.name}.inter.json"

    @property
    def split(self) -> Path:
        """How the interactions are split when it is not leave-one-out."""
        return split_file(self.inter)

    @property
    def item(self) -> Path:
        """``{item: {title, description, brand, categories}}``."""
        return self.root / f"{self.name}.item.json"

    @property
    def enriched(self) -> Path:
        """``{item: {description}}``: what a teacher wrote, in the place of the descriptions of :attr:`item`."""
        return self.root / f"{self.name}.enriched.json"

    @property
    def user_texts(self) -> Path:
        """Preferences and searches of users as a teacher wrote them, in LC-Rec's layout."""
        return self.root / f"{self.name}.user.json"

    @property
    def chains(self) -> Path:
        """Chains of thought as a teacher wrote them."""
        return self.root / f"{self.name}-chains.parquet"

    @property
    def teacher(self) -> Path:
        """Every answer of a teacher, one a line."""
        return self.root / f"{self.name}.teacher.jsonl"

    def enrichment(self, what: str) -> Path:
        """What came of the last run of the teacher: counts, leaks, tokens, cost."""
        return self.root / f"{self.name}.teacher-{what}.json"

    @property
    def reviews(self) -> Path:
        """A few reviews of every item, for the teacher; none of a held-out interaction."""
        return self.root / f"{self.name}.reviews.parquet"

    @property
    def index(self) -> Path:
        """``{item: [token, ...]}``: the semantic IDs."""
        return self.root / f"{self.name}.index.json"

    @property
    def report(self) -> Path:
        """What the source held, what was dropped and why, and the statistics of what is left."""
        return self.root / f"{self.name}.report.json"

    @property
    def rejects(self) -> Path:
        """Rows of the source that could not be used, one a line: file, row, reason and text; none, no file."""
        return self.root / f"{self.name}.rejects.jsonl"

    @property
    def align(self) -> Path:
        """SFT rows of the alignment tasks alone."""
        return self.root / f"{self.name}-align.parquet"

    @property
    def mix(self) -> Path:
        """SFT rows in the order in which they are to be trained."""
        return self.root / f"{self.name}-mix.parquet"

    def mix_of(self, name: str) -> Path:
        """A mix of another name than ``mix``, such as one of chains alone.

        Raises:
            InputError: When ``name`` cannot be part of a file's name, or is that of another kind of file.
        """
        if not re.fullmatch(r"[A-Za-z0-9_]+", name) or name in OTHER_PARQUET:
            raise InputError(
                f"a mix named {name!r}: choose letters, digits and '_', and none of {', '.join(OTHER_PARQUET)}"
            )
        return self.root / f"{self.name}-{name}.parquet"

    @property
    def rl(self) -> Path:
        """RL prompts."""
        return self.root / f"{self.name}-rl.parquet"

    @property
    def val(self) -> Path:
        """Validation prompts: what the split holds out of every user for it."""
        return self.root / f"{self.name}-val.parquet"

    def rl_of(self, mode: Mode) -> Path:
        """RL prompts of ``mode``; those of reasoning mode have the authors' name."""
        return self.rl if mode == "reasoning" else self.root / f"{self.name}-rl-{mode}.parquet"

    def val_of(self, mode: Mode) -> Path:
        """Validation prompts of ``mode``."""
        return self.val if mode == "reasoning" else self.root / f"{self.name}-val-{mode}.parquet"

    @property
    def test(self) -> Path:
        """Test prompts, likewise."""
        return self.root / f"{self.name}-test.parquet"

    @property
    def dataset_info(self) -> Path:
        """What LLaMA-Factory reads to find :attr:`align` and the mixes."""
        return self.root / "dataset_info.json"

    def read_items(self, *, enriched: bool = True) -> dict[str, Item]:
        """Read and check :attr:`item`.

        Args:
            enriched: Whether the descriptions in :attr:`enriched`, when it is there, take the place of those of the
                source.

        Raises:
            InputError: When a file is missing or malformed, or an item has no title.
        """
        raw = read_json(self.item, "prepare the data set first")
        if not isinstance(raw, dict) or not raw:
            raise InputError(f"{self.item}: expected {{item: {{title, ...}}}} with at least one item; prepare it anew")
        items = {item: _item(self.item, item, fields) for item, fields in raw.items()}
        if enriched and self.enriched.is_file():
            for item, fields in read_json(self.enriched).items():
                if item in items and (description := item_text(fields.get("description"))):
                    items[item] = replace(items[item], description=description)
        return items

    def read_inter(self, items: Mapping[str, Item] | None = None) -> dict[str, list[str]]:
        """Read and check :attr:`inter`.

        Args:
            items: What :meth:`read_items` gave, to spare reading it again.

        Raises:
            InputError: When the file is missing or malformed, or names an item that :attr:`item` does not hold.
        """
        raw = read_json(self.inter, "prepare the data set first")
        if not isinstance(raw, dict) or not raw:
            raise InputError(f"{self.inter}: expected {{user: [item, ...]}} with at least one user; prepare it anew")
        known = self.read_items() if items is None else items
        sequences = {}
        for user, sequence in raw.items():
            sequences[user] = item_ids(sequence, f"{self.inter}: user {user!r}")
            unknown = next((item for item in sequences[user] if item not in known), None)
            if unknown is not None:
                raise InputError(
                    f"{self.inter}: user {user!r}: item {unknown!r} is not in {self.item.name}; prepare both together"
                )
        return sequences

    def read_training(self, items: Mapping[str, Item] | None = None) -> dict[str, Sequence[str]]:
        """Return what training may see of every user's items, in time order: see :mod:`gream_verl.core.split`."""
        return training_parts(self.inter, self.read_inter(items))

    def read_index(self, items: Iterable[str]) -> ItemIndex:
        """Read :attr:`index` and check that it has a SID for each of ``items``.

        Raises:
            InputError: When the file is missing or malformed, or lacks an item.
        """
        index = ItemIndex.load(self.index)
        missing = [item for item in items if item not in index.sids]
        if missing:
            raise InputError(
                f"{self.index}: no SID for item {missing[0]!r} ({len(missing)} items lack one); build the index anew "
                f"for this {self.item.name}"
            )
        return index


def item_ids(sequence: Any, place: str) -> list[str]:
    """Return the items of a user as text.

    Raises:
        InputError: When it is no list of item ids; the message begins with ``place``.
    """
    if not isinstance(sequence, list) or not all(isinstance(item, str | int) for item in sequence):
        raise InputError(f"{place}: expected a list of item ids; prepare it anew")
    return [str(item) for item in sequence]


def _item(path: Path, item: str, fields: Any) -> Item:
    if not isinstance(fields, dict):
        raise InputError(f"{path}: item {item!r}: expected an object with a title; prepare it anew")
    title = item_text(fields.get("title"))
    if not title:
        raise InputError(f"{path}: item {item!r} has no title; remove the item or give it one")
    return Item(
        title,
        item_text(fields.get("description")),
        item_text(fields.get("brand")),
        tuple(dict.fromkeys(category_names(fields.get("categories")))),
    )


def item_text(value: Any) -> str:
    """Return the text of a field, "" where it has none; lists are joined."""
    if isinstance(value, list):
        return " ".join(filter(None, map(item_text, value)))
    return value.strip() if isinstance(value, str) else ""


def category_names(value: Any) -> list[str]:
    """Flatten the ways in which published files write categories: a list, a list of paths, one text with commas."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    if isinstance(value, list):
        parts = (category_names(part) if isinstance(part, list) else [item_text(part)] for part in value)
        return [name for names in parts for name in names if name]
    return []
