"""What clients send, and what they get."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gream_verl.core.semantic_ids import find_sids
from gream_verl.serving.catalogue import Catalogue
from gream_verl.serving.recommender import BEAMS

MOST_HISTORY, MOST_ITEMS, MOST_K, MOST_REQUESTS = 1000, 10_000, BEAMS[-1], 1000
Id = Annotated[str, Field(min_length=1, max_length=200)]
ServedMode = Literal["direct", "reasoning", "merged"]
PARTS = ("Evidence", "Preference", "Intent")
_PART = re.compile(rf"({'|'.join(PARTS)}):\s*")


class Subject(BaseModel):
    """A history of item ids, oldest first, or a user of the data set; and the served model."""

    model_config = ConfigDict(extra="forbid")

    history: list[Id] | None = Field(default=None, max_length=MOST_HISTORY)
    user: Id | None = None
    model: Id | None = Field(default=None, description="Name of a served checkpoint; None for the first.")

    @model_validator(mode="after")
    def _one_of_both(self) -> Subject:
        if (self.history is None) == (self.user is None):
            raise ValueError("give history or user, one of both")
        return self


class RecommendRequest(Subject):
    """A question for the next items."""

    k: int = Field(default=10, ge=1, le=MOST_K, strict=True)
    mode: ServedMode = "direct"
    exclude: list[Id] = Field(default=[], max_length=MOST_ITEMS)
    allow: list[Id] | None = Field(default=None, max_length=MOST_ITEMS, description="Only these items.")
    categories: list[Id] | None = Field(default=None, max_length=100, description="Only items in one of these.")
    explain: bool = Field(default=False, description="With the parts of each chain, and the branch of each item.")
    budget_ms: int | None = Field(
        default=None, ge=1, le=600_000, strict=True, description="When thinking takes longer, direct mode answers."
    )


class BatchRequest(BaseModel):
    """Many questions."""

    model_config = ConfigDict(extra="forbid")

    requests: list[RecommendRequest] = Field(min_length=1, max_length=MOST_REQUESTS)


class ScoreRequest(Subject):
    """Items to score for a history."""

    items: list[Id] = Field(min_length=1, max_length=MOST_K)


class ReloadRequest(BaseModel):
    """A served model to load again, from its folder or from another one."""

    model_config = ConfigDict(extra="forbid")

    model: Id | None = None
    checkpoint: str | None = Field(default=None, max_length=1000, description="Another checkpoint, inside the run.")


class ItemName(BaseModel):
    """An item by its id and title."""

    id: str
    title: str


class Branch(BaseModel):
    """A step down the tree of codes: ``items`` counts those on it, ``some`` names others, the most popular first."""

    token: str
    items: int
    some: list[ItemName]


class ScoredItem(ItemName):
    """An item of an answer.

    The score is a log-probability in nats, in merged mode that of the mode which found the item, of a fallback a count.
    """

    rank: int
    sid: str
    score: float
    path: list[Branch] = []


class Chain(BaseModel):
    """A chain of thought by its parts, semantic IDs as titles, and the items of the history that it keeps."""

    evidence: str = ""
    preference: str = ""
    intent: str = ""
    history: list[ItemName]
    text: str


class Versions(BaseModel):
    """What answered."""

    model: str
    index: str
    settings: str


class Scored(Versions):
    """Items with scores, the best first."""

    items: list[ScoredItem]
    unknown: list[str] = Field(description="Ids of the history or of the items to score that the index lacks.")


class Recommendations(Scored):
    """The answer to a question for the next items."""

    mode: ServedMode
    chains: list[Chain] = []
    fallback: str = Field(description="Why the model, or its thinking, did not answer; empty where it did.")
    shortage: str = Field(description="Why there are fewer items than asked for, empty where there are enough.")
    request_id: str
    milliseconds: dict[str, float] = Field(description="By part: think, search, total.")


class KnownItem(ItemName):
    """What is known of an item."""

    description: str
    brand: str
    categories: list[str]
    sid: str


class KnownUser(BaseModel):
    """A user of the data set, and the items before the one that is held out for the test."""

    id: str
    history: list[KnownItem]


def named(item: str, catalogue: Catalogue) -> ItemName:
    """Return an item by its id and title."""
    return ItemName(id=item, title=catalogue.texts[item].title)


def known(item: str, catalogue: Catalogue) -> KnownItem:
    """Return what is known of an item."""
    return KnownItem(id=item, sid=catalogue.index.text(item), **vars(catalogue.texts[item]))


def path_of(item: str, catalogue: Catalogue, shown: int = 5) -> list[Branch]:
    """Return the way to an item in the tree of codes, with some of the other items on each branch."""
    sid, path = catalogue.index.sids[item], []
    for depth, token in enumerate(sid, 1):
        count, popular = catalogue.branch(sid[:depth], shown + 1)
        some = [named(other, catalogue) for other in popular if other != item][:shown]
        path.append(Branch(token=token, items=count, some=some))
    return path


def listed(scores: Mapping[str, float], catalogue: Catalogue, with_path: bool = False) -> list[ScoredItem]:
    """Return the items of an answer."""
    return [
        ScoredItem(
            **dict(named(item, catalogue)), rank=rank, sid=catalogue.index.text(item), score=round(score, 5),
            path=path_of(item, catalogue) if with_path else [],
        )
        for rank, (item, score) in enumerate(scores.items(), 1)
    ]  # fmt: skip


def with_titles(text: str, catalogue: Catalogue) -> str:
    """Return a text with titles for the semantic IDs of items; unfinished ones stay."""
    items = catalogue.index.items
    for sid in sorted({*find_sids(text)} & items.keys(), key=len, reverse=True):
        text = text.replace("".join(sid), f"[{catalogue.texts[items[sid]].title}]")
    return text


def read_chain(text: str, catalogue: Catalogue) -> Chain:
    """Return a chain of thought by its parts; a part that it lacks is empty."""
    thought, _, denoised = text.partition("<answer>")[0].replace("<think>", "").partition("</think>")
    pieces = _PART.split(thought)
    parts = dict(zip(map(str.lower, pieces[1::2]), pieces[2::2], strict=True))
    items = catalogue.index.items
    kept = [named(items[sid], catalogue) for sid in find_sids(denoised) if sid in items]
    titled = {name: with_titles(part.strip(), catalogue) for name, part in parts.items()}
    return Chain(**titled, history=kept, text=with_titles(thought.strip(), catalogue))
