"""The forms of a teacher's answers, and what is wrong with one that cannot be used."""

from __future__ import annotations

import re
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from gream_verl.core.semantic_ids import SID_TOKEN

_MARKUP = re.compile(r"</?\s*(think|answer)\b|<\|", re.IGNORECASE)
_JSON = re.compile(r"\{.*\}", re.DOTALL)


MOST_KEPT = 50
"""Items of a denoised history."""


class UnusableError(ValueError):
    """An answer that cannot be used; the message says why, to the teacher and to the report.

    Attributes:
        kind: Short name for counts: ``form``, ``cut`` or ``leak``.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def _plain(text: str) -> str:
    """Collapse blanks; refuse what would be read as part of a response's form."""
    if SID_TOKEN.search(text) or _MARKUP.search(text):
        raise ValueError("must be plain words, without tags or identifiers")
    text = " ".join(text.split())
    if not any(letter.isalnum() for letter in text):
        raise ValueError("must hold words")
    return text


Sentence = Annotated[str, Field(min_length=3, max_length=200), AfterValidator(_plain)]
Thought = Annotated[str, Field(min_length=3, max_length=500), AfterValidator(_plain)]
Paragraph = Annotated[str, Field(min_length=3, max_length=1000), AfterValidator(_plain)]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ItemText(_Answer):
    """A description of an item."""

    description: Paragraph


class UserTexts(_Answer):
    """What a user likes, and how the user would search for the next item."""

    preferences: list[Sentence] = Field(min_length=1, max_length=3)
    queries: list[Sentence] = Field(min_length=1, max_length=3)


class Chain(_Answer):
    """A chain of thought in its four steps (arXiv 2510.20815, section 3.3).

    Attributes:
        evidence: What in the history shows a pattern.
        preference: The lasting taste behind it.
        intent: What the user wants now.
        keep: Numbers, from 1, of the items of the denoised history.
    """

    evidence: Thought
    preference: Thought
    intent: Thought
    keep: list[Annotated[int, Field(ge=1)]] = Field(min_length=1, max_length=MOST_KEPT)


Form = TypeVar("Form", bound=_Answer)


def json_schema(form: type[_Answer]) -> dict[str, Any]:
    """Return the JSON schema of a form as a server is told it: without our docstrings, no part of a request."""

    def bare(value: Any) -> Any:
        if isinstance(value, list):
            return [bare(part) for part in value]
        if not isinstance(value, dict):
            return value
        ours = {key for key in ("title", "description") if isinstance(value.get(key), str)}
        return {key: bare(part) for key, part in value.items() if key not in ours}

    schema: dict[str, Any] = bare(form.model_json_schema())
    return schema


def read_answer(text: str, finish: str, form: type[Form]) -> Form:
    """Return the data of an answer; what a model thinks aloud before it, and fences around it, are passed over.

    Raises:
        UnusableError: When the answer was cut, or is not of that form.
    """
    if finish == "length":
        raise UnusableError("cut", "it is too long and was cut; write less.")
    found = _JSON.search(text.rpartition("</think>")[2])
    if not found:
        raise UnusableError("form", "it holds no JSON object.")
    try:
        return form.model_validate_json(found[0])
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc'])) or 'JSON'}: {fault['msg']}" for fault in error.errors()[:3]]
        raise UnusableError("form", "; ".join(faults) + ".") from error
