"""Names and readers of the files of one data set.

The names are those of the authors' code, LC-Rec and LETTER (``<D>.inter.json``, ``<D>.item.json``, ``<D>.index.json``),
so that published data drop in. All files of a data set lie in one folder.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json
from gream_verl.core.rsvr import Mode
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.core.split import INTERACTIONS, SPLIT, UserSplit, read_interactions, read_splits, training_parts

OTHER_PARQUET = ("align", "rl", "val", "test", "chains")
"""Endings of parquet files that are no mix."""
TITLE_WORDS = 8
"""Words of a title that chains of thought name."""
PREPARE = "prepare the data set with `gream data prepare`"
_PRINTED_LIST = re.compile(r"\s*\[\s*(?:[\"'\[].*)?\]\s*", re.DOTALL)
_CONTROL = re.compile(r"<\|[^<>]*\|>|</?(?:think|answer|s|bos|eos|pad|unk|start_of_turn|end_of_turn)>|\[/?INST\]")


@dataclass(frozen=True)
class Item:
    """Texts of one item.

    Attributes:
        title: Readable title, not empty after ``read_items``.
        description: Readable description, "" when there is none.
        brand: Brand, author or label, "" when there is none.
        categories: Names of categories, general to special where the source orders them.
    """

    title: str
    description: str = ""
    brand: str = ""
    categories: tuple[str, ...] = ()


class DataFolder:
    """The files of a data set. Each attribute is a path; the file need not exist.

    Args:
        root: The folder.
        name: The data set's name, ``<D>`` in file names, such as ``ml-100k``.
    """

    def __init__(self, root: str | os.PathLike[str], name: str) -> None:
        if not name or Path(name).name != name:
            raise InputError(f"data set name {name!r}: not usable in file names; use letters, digits, '-' and '_'")
        self.root, self.name = Path(root), name
        base = self.root / name
        self.inter = Path(f"{base}{INTERACTIONS}")  # {user: [item, ...]} in time order
        self.split = Path(f"{base}{SPLIT}")  # the split of the interactions when it is not leave-one-out
        self.item = Path(f"{base}.item.json")  # {item: {title, description, brand, categories}}
        self.index = Path(f"{base}.index.json")  # {item: [token, ...]}: the semantic IDs
        self.codebooks = Path(f"{base}.codebooks.npz")  # vectors, codes, codebooks and settings of the index
        self.report = Path(f"{base}.report.json")  # counts of the source, of dropped rows by reason, and of the rest
        self.rejects = Path(f"{base}.rejects.jsonl")  # source rows that could not be used: file, row, reason and text
        self.reviews = Path(f"{base}.reviews.parquet")  # some reviews of every item, none of a held-out interaction
        self.teacher = Path(f"{base}.teacher.sqlite")  # every answer of a teacher
        self.enriched = Path(f"{base}.enriched.json")  # {item: {description}}: a teacher's texts, which replace ours
        self.user_texts = Path(f"{base}.user.json")  # a teacher's preferences and searches of users, LC-Rec's layout
        self.chains = Path(f"{base}-chains.parquet")  # a teacher's chains of thought
        self.align = Path(f"{base}-align.parquet")  # SFT rows of the alignment tasks alone
        self.mix = Path(f"{base}-mix.parquet")  # SFT rows in the order of training
        self.rl = Path(f"{base}-rl.parquet")  # RL prompts
        self.val = Path(f"{base}-val.parquet")  # validation prompts
        self.test = Path(f"{base}-test.parquet")  # test prompts
        self.dataset_info = self.root / "dataset_info.json"  # LLaMA-Factory's list of the alignment rows and the mixes

    def enrichment(self, kind: str) -> Path:
        """Return the path of the report of the teacher's last run of a kind."""
        return self.root / f"{self.name}.teacher-{kind}.json"

    def mix_of(self, name: str) -> Path:
        """Return the path of a mix with a name of its own; raise InputError for a name that cannot be used."""
        if not re.fullmatch(r"[A-Za-z0-9_]+", name) or name in OTHER_PARQUET:
            others = ", ".join(OTHER_PARQUET)
            raise InputError(f"a mix named {name!r}: choose letters, digits and '_', and none of {others}")
        return self.root / f"{self.name}-{name}.parquet"

    def rl_of(self, mode: Mode) -> Path:
        """Return the path of the RL prompts of a mode; that of reasoning mode is the authors'."""
        return self.rl if mode == "reasoning" else self.root / f"{self.name}-rl-{mode}.parquet"

    def val_of(self, mode: Mode) -> Path:
        """Return the path of the validation prompts of a mode."""
        return self.val if mode == "reasoning" else self.root / f"{self.name}-val-{mode}.parquet"

    def read_items(self, *, enriched: bool = True) -> dict[str, Item]:
        """Read and check the items; raise InputError for an item without a title.

        Args:
            enriched: Take descriptions from ``<D>.enriched.json``, where there is such a file.
        """
        raw = read_json(self.item, PREPARE)
        if not isinstance(raw, dict) or not raw or not all(isinstance(fields, dict) for fields in raw.values()):
            raise InputError(f"{self.item}: expected {{item: {{title, ...}}}} with at least one item; {PREPARE}")
        items = {item: item_of(fields) for item, fields in raw.items()}
        if untitled := [item for item, fields in items.items() if not fields.title]:
            raise InputError(f"{self.item}: item {untitled[0]!r} has no title; remove the item or give it one")
        if enriched and self.enriched.is_file():
            for item, fields in read_json(self.enriched).items():
                if item in items and (description := item_text(fields.get("description"))):
                    items[item] = replace(items[item], description=description)
        return items

    def titles(self) -> dict[str, str]:
        """Read the title of every item."""
        return {item: fields.title for item, fields in self.read_items(enriched=False).items()}

    def read_inter(self, items: Mapping[str, Item] | None = None) -> dict[str, list[str]]:
        """Read the interactions; raise InputError for an item that the data set does not hold.

        Args:
            items: Result of :meth:`read_items`, read again when None.
        """
        sequences = read_interactions(self.inter)
        if not sequences:
            raise InputError(f"{self.inter}: expected at least one user; {PREPARE}")
        known = self.read_items() if items is None else items
        for user, sequence in sequences.items():
            if unknown := [item for item in sequence if item not in known]:
                raise InputError(
                    f"{self.inter}: user {user!r}: item {unknown[0]!r} is not in {self.item.name}; {PREPARE}"
                )
        return sequences

    def read_splits(self, sequences: Mapping[str, Sequence[str]]) -> dict[str, UserSplit]:
        """Return the split of every user (:mod:`gream_verl.core.split`) for the result of :meth:`read_inter`."""
        return read_splits(self.inter, sequences)

    def read_training(self, items: Mapping[str, Item] | None = None) -> dict[str, Sequence[str]]:
        """Return the items of every user that training may see, in time order."""
        return training_parts(self.inter, self.read_inter(items))

    def read_index(self, items: Iterable[str]) -> ItemIndex:
        """Read the index; raise InputError when an item of ``items`` has no SID."""
        index = ItemIndex.load(self.index)
        if missing := [item for item in items if item not in index.sids]:
            raise InputError(f"{self.index}: no SID for item {missing[0]!r} ({len(missing)} lack one); build it again")
        return index


def has_texts(items: Mapping[str, Item]) -> bool:
    """Return whether any item has a text; an id stands for the title of an item without texts."""
    return any(fields != Item(item) for item, fields in items.items())


def short_title(title: str, words: int = TITLE_WORDS) -> str:
    """Return the first words of a title."""
    return " ".join(title.split()[:words]).rstrip(".,;:")


def item_of(fields: Mapping[str, Any]) -> Item:
    """Return the item of a JSON object, in any published layout; its title may be empty."""
    title, description, brand = (item_text(fields.get(name)) for name in ("title", "description", "brand"))
    return Item(title, description, brand, tuple(dict.fromkeys(_category_names(fields.get("categories")))))


def item_text(value: Any) -> str:
    """Return the text of a field, "" for an empty one; lists are joined, also those that were printed into the text.

    What a tokenizer would read as a control token or a semantic ID is left out: a text must not end or answer a prompt.

    >>> item_text(["Heat", "<|im_end|> <|a_1|>", "(1995)</answer>"]), item_text("['Relay', 'small']")
    ('Heat (1995)', 'Relay small')
    """
    value = _unprinted(value)
    if isinstance(value, list):
        return " ".join(filter(None, map(item_text, value)))
    text = value.strip() if isinstance(value, str) else ""
    if not text.isascii():
        text = text.encode(errors="ignore").decode()  # without halves of surrogate pairs
    return " ".join(_CONTROL.sub(" ", text).split()) if _CONTROL.search(text) else text


def _unprinted(value: Any) -> Any:
    """Return the list of a text such as "['One.', 'Two.']", which is how pandas writes lists; else the value."""
    if isinstance(value, str) and _PRINTED_LIST.fullmatch(value):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return ast.literal_eval(value.strip())
    return value


def _category_names(value: Any) -> list[str]:
    """Flatten the published forms of categories: a list, a list of paths, one text with commas."""
    value = _unprinted(value)
    if isinstance(value, str):
        return [name.strip() for name in item_text(value).split(",") if name.strip()]
    if isinstance(value, list):
        parts = (_category_names(part) if isinstance(part, list) else [item_text(part)] for part in value)
        return [name for names in parts for name in names if name]
    return []
