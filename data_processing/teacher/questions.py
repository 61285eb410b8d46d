"""The questions to a teacher about items, users and next items, and the files that the answers go to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model

from data_processing.layout import CHAINS, SEARCHED, SEARCHES, USER_TEXTS
from data_processing.leaks import names_title
from data_processing.teacher.templates import Messages, read_prompts
from gream_verl.core.data_folder import DataFolder, Item, short_title
from gream_verl.core.errors import InputError
from gream_verl.core.files import atomic_path, read_json, write_json
from gream_verl.core.prompts import FIRST_REASONING_TARGET
from gream_verl.core.semantic_ids import SID_TOKEN

What = Literal["items", "users", "chains"]
TITLE_WORDS = 24
DESCRIPTION_WORDS = 120
CATEGORIES = 3  # of an item of a history, the most special ones
_MARKUP = re.compile(r"</?\s*(think|answer)\b|<\|", re.IGNORECASE)
_JSON = re.compile(r"\{.*\}", re.DOTALL)


class UnusableError(ValueError):
    """An answer that cannot be used; its arguments are the kind (``form``, ``cut`` or ``leak``) and the reason."""


def _plain(text: str) -> str:
    """Collapse blanks; refuse markup that would be read as part of a response's form."""
    if SID_TOKEN.search(text) or _MARKUP.search(text):
        raise ValueError("must be plain words, without tags or identifiers")
    if not any(letter.isalnum() for letter in text):
        raise ValueError("must hold words")
    return " ".join(text.split())


Paragraph = Annotated[str, Field(min_length=3, max_length=1000), AfterValidator(_plain)]
Thought = Annotated[str, Field(min_length=3, max_length=500), AfterValidator(_plain)]
Sentence = Annotated[str, Field(min_length=3, max_length=200), AfterValidator(_plain)]
Sentences = Annotated[list[Sentence], Field(min_length=1, max_length=3)]
Numbers = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1, max_length=50)]
CHAIN: dict[str, Any] = dict.fromkeys(("evidence", "preference", "intent"), (Thought, ...)) | {"keep": (Numbers, ...)}
STRICT = ConfigDict(extra="forbid")
FORMS: Mapping[What, type[BaseModel]] = {
    "items": create_model("ItemText", __config__=STRICT, description=(Paragraph, ...)),
    "users": create_model("UserTexts", __config__=STRICT, preferences=(Sentences, ...), queries=(Sentences, ...)),
    "chains": create_model("Chain", __config__=STRICT, **CHAIN),
}
"""Form of the answer to each kind of question.

A chain has four steps (arXiv 2510.20815, section 3.3): the pattern in the history, the lasting taste that explains it,
the kind of item that the user wants now, and the numbers (from 1) of the items of the denoised history.
"""


def json_schema(form: type[BaseModel]) -> dict[str, Any]:
    """Return the JSON schema of a form, without the titles that pydantic adds."""
    schema = form.model_json_schema()
    for part in (schema, *schema["properties"].values()):
        del part["title"]
    return schema


@dataclass(frozen=True)
class Question:
    """A conversation, the form of its answer, the history that it shows, and the next item, not to be named."""

    messages: Messages
    form: type[BaseModel]
    past: Sequence[Item] = ()
    target: Item | None = None

    def read(self, text: str, finish: str | None) -> Any:
        """Return the data of an answer, or raise UnusableError; thoughts before it and fences around it are ignored."""
        if finish == "length":
            raise UnusableError("cut", "it is too long and was cut; write less.")
        found = _JSON.search(text.rpartition("</think>")[2])
        if not found:
            raise UnusableError("form", "it holds no JSON object.")
        try:
            data: Any = self.form.model_validate_json(found[0])
        except ValidationError as error:
            faults = [f"{'.'.join(map(str, fault['loc'])) or 'JSON'}: {fault['msg']}" for fault in error.errors()[:3]]
            raise UnusableError("form", "; ".join(faults) + ".") from error
        if (last := max(getattr(data, "keep", [0]))) > len(self.past):
            raise UnusableError("form", f"keep: there is no item {last}; the last one is {len(self.past)}.")
        if self.target is not None:
            known = [title for item in self.past for title in (item.title, short_title(item.title))]
            values = data.model_dump(exclude={"keep"}).values()
            texts = " | ".join(value if isinstance(value, str) else " | ".join(value) for value in values)
            if names_title(texts, self.target.title, known):
                raise UnusableError("leak", "it names the next item; describe the kind of item, without that title.")
        return data


class Questions:
    """All questions for one kind of text of a data set.

    Args:
        prompts: Folder of the user's prompts; None for those of the package.
        limit: Most questions, a seeded sample; None for all. A higher limit keeps the questions of a lower one.
        history: Longest history in a question, in items, the most recent ones.

    Attributes:
        path: The file of the texts.
        subjects: One per question: an item id, or user id and position of the next item.
    """

    def __init__(
        self,
        folder: DataFolder,
        what: What,
        prompts: Path | None = None,
        limit: int | None = None,
        history: int = 20,
        seed: int = 0,
    ) -> None:
        self.folder, self.what, self.history = folder, what, history
        self.path = {"items": folder.enriched, "users": folder.user_texts, "chains": folder.chains}[what]
        self.templates = read_prompts(prompts)
        self._items = folder.read_items(enriched=what != "items")
        self._training = {} if what == "items" else folder.read_training(self._items)
        self._reviews: dict[str, list[str]] = {}
        if what == "items" and folder.reviews.is_file():  # holds none of a held-out interaction
            reviews = pl.read_parquet(folder.reviews, columns=["item", "text"])
            self._reviews = dict(reviews.group_by("item", maintain_order=True).agg("text").iter_rows())
        if not (every := self._every_subject()):
            raise InputError(f"{folder.inter}: no user has enough interactions for training; bring longer histories")
        drawn = np.random.default_rng(seed).permutation(len(every))[:limit]
        self.subjects = [every[number] for number in np.sort(drawn).tolist()]

    def _every_subject(self) -> list[Any]:
        if self.what == "items":
            return list(self._items)
        if self.what == "users":
            if self.path.is_file() and USER_TEXTS not in read_json(self.path):
                raise InputError(f"{self.path}: holds something else; move it away")
            return [(user, len(items) - 1) for user, items in self._training.items() if len(items) > 1]
        first = FIRST_REASONING_TARGET
        return [(user, position) for user, items in self._training.items() for position in range(first, len(items))]

    def ask(self, subject: Any) -> Question:
        """Return the question about a subject."""
        if self.what == "items":
            item = self._items[subject]
            description = _first_words(item.description, DESCRIPTION_WORDS)
            reviews = "\n".join(f"- {text}" for text in self._reviews.get(subject, ()))
            fields = vars(item) | {
                "categories": ", ".join(item.categories),
                "description": description,
                "reviews": reviews,
            }
            known = {name: text or "(nothing known)" for name, text in fields.items()}
            return Question(self.templates["item"].messages(**known), FORMS["items"])
        *past, target = (self._items[item] for item in self._window(subject))
        prompt = self.templates["user" if self.what == "users" else "chain"]
        history = "\n".join(f"{number}. {_line(item)}" for number, item in enumerate(past, start=1))
        described = "\n".join(filter(None, (_line(target), _first_words(target.description, DESCRIPTION_WORDS))))
        return Question(prompt.messages(history=history, target=described), FORMS[self.what], past, target)

    def write(self, found: Mapping[Any, Any]) -> None:
        """Write the file from the data of the answers, by subject."""
        if self.what == "items":
            write_json(self.path, {item: data.model_dump() for item, data in found.items()}, indent=0)
        elif self.what == "users":
            texts = {user: data for (user, _), data in found.items()}
            written = {
                USER_TEXTS: {user: data.preferences for user, data in texts.items()},
                SEARCHES: {"train": {user: data.queries for user, data in texts.items()}},
                SEARCHED: {user: self._training[user][-1] for user in texts},
            }
            write_json(self.path, written, indent=0)
        else:
            records = []
            for (user, position), chain in found.items():
                *past, item = self._window((user, position))
                keep = [past[number - 1] for number in sorted(set(chain.keep))]
                target = {"user": user, "position": position, "item": item, "history": len(past), "keep": keep}
                records.append(chain.model_dump() | target)
            with atomic_path(self.path) as path:
                pq.write_table(pa.Table.from_pylist(records, CHAINS), path, compression="zstd")

    def _window(self, subject: tuple[str, int]) -> Sequence[str]:
        """Return the last items before a user's position, at most ``history``, and the item at it."""
        user, position = subject
        return self._training[user][max(position - self.history, 0) : position + 1]


def _line(item: Item) -> str:
    """Return title, brand and categories of an item."""
    about = ", ".join(filter(None, (item.brand, *item.categories[-CATEGORIES:])))
    title = _first_words(item.title, TITLE_WORDS)
    return f"{title} ({about})" if about else title


def _first_words(text: str, count: int) -> str:
    return " ".join(text.split()[:count])
