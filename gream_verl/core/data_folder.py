"""Names and readers of the files of one data set.

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
from gream_verl.core.rsvr import Mode
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.core.split import INTERACTIONS, SPLIT, UserSplit, read_interactions, read_splits

OTHER_PARQUET = ("align", "rl", "val", "test", "chains")
"""Endings of parquet files that are no mix."""
PREPARE = "prepare the data set with `gream data prepare`"


@dataclass(frozen=True)
class Item:
    """Texts of one item.

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


class _File:
    """The path of a file in the folder of a data set: the name of the data set with an ending."""

    def __init__(self, ending: str) -> None:
        self.ending = ending

    def __get__(self, folder: DataFolder, _: type[DataFolder]) -> Path:
        return folder.root / f"{folder.name}{self.ending}"


@dataclass(frozen=True)
class DataFolder:
    """The files of a data set.

    Attributes:
        root: The folder.
        name: The data set's name, ``<D>`` in file names, such as ``ml-100k``.
    """

    root: Path
    name: str

    inter = _File(INTERACTIONS)
    """``{user: [item, ...]}`` in time order."""
    split = _File(SPLIT)
    """The split of the interactions when it is not leave-one-out."""
    item = _File(".item.json")
    """``{item: {title, description, brand, categories}}``."""
    index = _File(".index.json")
    """``{item: [token, ...]}``: the semantic IDs."""
    embeddings = _File(".emb.npy")
    """float32 ``[items, dimension]``, rows in the order of :attr:`item`."""
    report = _File(".report.json")
    """Counts of the source, counts of dropped rows by reason, and statistics of the rest."""
    rejects = _File(".rejects.jsonl")
    """Rows of the source that could not be used, one per line: file, row, reason and text; without rejects no file."""
    reviews = _File(".reviews.parquet")
    """A few reviews of every item, for the teacher; none of a held-out interaction."""
    teacher = _File(".teacher.sqlite")
    """Every answer of a teacher."""
    enriched = _File(".enriched.json")
    """``{item: {description}}``: texts of a teacher, which replace the descriptions of :attr:`item`."""
    user_texts = _File(".user.json")
    """Preferences and searches of users, written by a teacher, in LC-Rec's layout."""
    chains = _File("-chains.parquet")
    """Chains of thought, written by a teacher."""
    align = _File("-align.parquet")
    """SFT rows of the alignment tasks alone."""
    mix = _File("-mix.parquet")
    """SFT rows in the order of training."""
    rl = _File("-rl.parquet")
    """RL prompts."""
    val = _File("-val.parquet")
    """Validation prompts."""
    test = _File("-test.parquet")
    """Test prompts."""

    def __init__(self, root: str | os.PathLike[str], name: str) -> None:
        object.__setattr__(self, "root", Path(root))
        object.__setattr__(self, "name", name)
        if not name or Path(name).name != name:
            raise InputError(f"data set name {name!r}: not usable in file names; use letters, digits, '-' and '_'")

    @property
    def dataset_info(self) -> Path:
        """LLaMA-Factory's list of :attr:`align` and the mixes."""
        return self.root / "dataset_info.json"

    def enrichment(self, kind: str) -> Path:
        """Return the report of the teacher's last run of a kind: counts, leaks, tokens, cost."""
        return self.root / f"{self.name}.teacher-{kind}.json"

    def mix_of(self, name: str) -> Path:
        """Return a mix of another name than ``mix``; raise InputError for a name that cannot be used."""
        if not re.fullmatch(r"[A-Za-z0-9_]+", name) or name in OTHER_PARQUET:
            raise InputError(
                f"a mix named {name!r}: choose letters, digits and '_', and none of {', '.join(OTHER_PARQUET)}"
            )
        return self.root / f"{self.name}-{name}.parquet"

    def rl_of(self, mode: Mode) -> Path:
        """Return the RL prompts of ``mode``; those of reasoning mode have the authors' name."""
        return self.rl if mode == "reasoning" else self.root / f"{self.name}-rl-{mode}.parquet"

    def val_of(self, mode: Mode) -> Path:
        """Return the validation prompts of ``mode``."""
        return self.val if mode == "reasoning" else self.root / f"{self.name}-val-{mode}.parquet"

    def read_items(self, *, enriched: bool = True) -> dict[str, Item]:
        """Read and check :attr:`item`.

        Args:
            enriched: Take descriptions from :attr:`enriched`, where there is such a file.

        Raises:
            InputError: When a file is missing or malformed, or an item has no title.
        """
        raw = read_json(self.item, PREPARE)
        if not isinstance(raw, dict) or not raw:
            raise InputError(f"{self.item}: expected {{item: {{title, ...}}}} with at least one item; {PREPARE}")
        items = {}
        for item, fields in raw.items():
            if not isinstance(fields, dict):
                raise InputError(f"{self.item}: item {item!r}: expected an object with a title; {PREPARE}")
            items[item] = item_of(fields)
            if not items[item].title:
                raise InputError(f"{self.item}: item {item!r} has no title; remove the item or give it one")
        if enriched and self.enriched.is_file():
            for item, fields in read_json(self.enriched).items():
                if item in items and (description := item_text(fields.get("description"))):
                    items[item] = replace(items[item], description=description)
        return items

    def titles(self) -> dict[str, str]:
        """Read :attr:`item` and return the title of every item."""
        return {item: fields.title for item, fields in self.read_items(enriched=False).items()}

    def read_inter(self, items: Mapping[str, Item] | None = None) -> dict[str, list[str]]:
        """Read and check :attr:`inter`; ``items`` are those of :meth:`read_items`, read again when None.

        Raises:
            InputError: When the file is missing or malformed, or names an item that :attr:`item` does not hold.
        """
        sequences = read_interactions(self.inter)
        if not sequences:
            raise InputError(f"{self.inter}: expected at least one user; {PREPARE}")
        known = self.read_items() if items is None else items
        for user, sequence in sequences.items():
            unknown = next((item for item in sequence if item not in known), None)
            if unknown is not None:
                raise InputError(
                    f"{self.inter}: user {user!r}: item {unknown!r} is not in {self.item.name}; prepare both together"
                )
        return sequences

    def read_splits(self, sequences: Mapping[str, Sequence[str]]) -> dict[str, UserSplit]:
        """Return the split of every user (:mod:`gream_verl.core.split`) for the result of :meth:`read_inter`."""
        return read_splits(self.inter, sequences)

    def read_training(self, items: Mapping[str, Item] | None = None) -> dict[str, Sequence[str]]:
        """Return the items of every user that training may see, in time order."""
        sequences = self.read_inter(items)
        return {user: sequences[user][: split.training] for user, split in self.read_splits(sequences).items()}

    def read_index(self, items: Iterable[str]) -> ItemIndex:
        """Read :attr:`index`; raise InputError when an item of ``items`` has no SID."""
        index = ItemIndex.load(self.index)
        if missing := [item for item in items if item not in index.sids]:
            raise InputError(
                f"{self.index}: no SID for item {missing[0]!r} ({len(missing)} items lack one); build the index again "
                f"for this {self.item.name}"
            )
        return index


def item_of(fields: Mapping[str, Any]) -> Item:
    """Return the item of a JSON object, in any published layout; its title may be empty."""
    title, description, brand = (item_text(fields.get(name)) for name in ("title", "description", "brand"))
    return Item(title, description, brand, tuple(dict.fromkeys(_category_names(fields.get("categories")))))


def item_text(value: Any) -> str:
    """Return the text of a field, "" for an empty one; lists are joined."""
    if isinstance(value, list):
        return " ".join(filter(None, map(item_text, value)))
    return value.strip() if isinstance(value, str) else ""


def _category_names(value: Any) -> list[str]:
    """Flatten the published forms of categories: a list, a list of paths, one text with commas."""
    if isinstance(value, str):
        return [name.strip() for name in value.split(",") if name.strip()]
    if isinstance(value, list):
        parts = (_category_names(part) if isinstance(part, list) else [item_text(part)] for part in value)
        return [name for names in parts for name in names if name]
    return []
