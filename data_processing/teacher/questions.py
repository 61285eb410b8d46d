"""What is asked of a teacher about items, users and next items, and how an answer is read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_processing.leaks import names_title, short_title
from data_processing.teacher.answers import Chain, ItemText, UnusableError, UserTexts, json_schema, read_answer
from data_processing.teacher.templates import Messages, Prompt
from gream_verl.core.data_folder import Item

TITLE_WORDS = 24
DESCRIPTION_WORDS = 120
CATEGORIES = 3
"""Categories named of an item of a history, the most special ones."""
NOTHING = "(nothing known)"


@dataclass(frozen=True)
class Question:
    """One thing to ask.

    Attributes:
        subject: What it is about, an item, a user, or a user and a position; the key of its result.
        messages: The conversation of the first round.
        read: Returns the data in an answer's text, given why the answer ended; raises UnusableError.
    """

    subject: Any
    messages: Messages
    read: Callable[[str, str], Any]


@dataclass(frozen=True)
class Questions:
    """Questions of one kind, each made when it is asked.

    Attributes:
        form: Name and JSON schema of the answers.
        subjects: What is asked about.
        make: Makes the question on a subject.
    """

    form: tuple[str, Mapping[str, Any]]
    subjects: Sequence[Any]
    make: Callable[[Any], Question]

    def __len__(self) -> int:
        return len(self.subjects)

    def __iter__(self) -> Iterator[Question]:
        return map(self.make, self.subjects)


def item_questions(
    items: Mapping[str, Item], reviews: Mapping[str, Sequence[str]], prompt: Prompt, chosen: Sequence[str]
) -> Questions:
    """Ask for a description of each chosen item.

    Args:
        items: All items.
        reviews: Texts of reviews of an item; none of a held-out interaction.
        prompt: The prompt ``item``.
        chosen: Item ids.
    """

    def make(key: str) -> Question:
        item = items[key]
        said = "\n".join(f"- {text}" for text in reviews.get(key, ()))
        messages = prompt.messages(
            title=item.title,
            brand=item.brand or NOTHING,
            categories=", ".join(item.categories) or NOTHING,
            description=_first_words(item.description, DESCRIPTION_WORDS) or NOTHING,
            reviews=said or NOTHING,
        )
        return Question(key, messages, lambda text, finish: read_answer(text, finish, ItemText))

    return Questions(("item", json_schema(ItemText)), chosen, make)


def user_questions(
    items: Mapping[str, Item],
    training: Mapping[str, Sequence[str]],
    prompt: Prompt,
    chosen: Sequence[str],
    history: int,
) -> Questions:
    """Ask for the preferences of each chosen user, and for searches that lead to the user's last training item.

    Args:
        items: All items.
        training: The training part of every user, oldest first; at least two items for a chosen one.
        prompt: The prompt ``user``.
        chosen: User ids.
        history: Items shown, the most recent ones.
    """

    def make(user: str) -> Question:
        *past, target = training[user]

        def read(text: str, finish: str) -> UserTexts:
            texts = read_answer(text, finish, UserTexts)
            _refuse_title(items, target, past[-history:], [*texts.preferences, *texts.queries])
            return texts

        return Question(user, _next_item(items, past[-history:], target, prompt), read)

    return Questions(("user", json_schema(UserTexts)), chosen, make)


def chain_questions(
    items: Mapping[str, Item],
    training: Mapping[str, Sequence[str]],
    prompt: Prompt,
    chosen: Sequence[tuple[str, int]],
    history: int,
) -> Questions:
    """Ask for the chain of thought that leads to each chosen interaction.

    Args:
        items: All items.
        training: The training part of every user, oldest first.
        prompt: The prompt ``chain``.
        chosen: User and position of the target, from 1.
        history: Items shown, the most recent ones before the target.
    """

    def make(subject: tuple[str, int]) -> Question:
        past, target = window(training, subject, history)

        def read(text: str, finish: str) -> Chain:
            chain = read_answer(text, finish, Chain)
            if wrong := [number for number in chain.keep if number > len(past)]:
                raise UnusableError("form", f"keep: there is no item {wrong[0]}; the last one is {len(past)}.")
            _refuse_title(items, target, past, [chain.evidence, chain.preference, chain.intent])
            return chain

        return Question(subject, _next_item(items, past, target, prompt), read)

    return Questions(("chain", json_schema(Chain)), chosen, make)


def window(training: Mapping[str, Sequence[str]], subject: tuple[str, int], history: int) -> tuple[Sequence[str], str]:
    """Return the last ``history`` items before a user's position, and the item at it."""
    user, position = subject
    return training[user][max(position - history, 0) : position], training[user][position]


def sample(subjects: Sequence[Any], limit: int | None, seed: int) -> list[Any]:
    """Draw at most ``limit`` subjects, in their order: a higher limit keeps those of a lower one."""
    if limit is None or limit >= len(subjects):
        return list(subjects)
    drawn = np.random.default_rng(seed).permutation(len(subjects))[:limit]
    return [subjects[number] for number in np.sort(drawn).tolist()]


def _next_item(items: Mapping[str, Item], past: Sequence[str], target: str, prompt: Prompt) -> Messages:
    history = "\n".join(f"{number}. {_line(items[item])}" for number, item in enumerate(past, start=1))
    described = _first_words(items[target].description, DESCRIPTION_WORDS)
    return prompt.messages(history=history, target="\n".join(filter(None, (_line(items[target]), described))))


def _refuse_title(items: Mapping[str, Item], target: str, past: Sequence[str], texts: Sequence[str]) -> None:
    """Raise UnusableError when a text names the target; what the user has had before may be named."""
    known = [title for item in past for title in (items[item].title, short_title(items[item].title))]
    if names_title(" | ".join(texts), items[target].title, known):
        raise UnusableError(
            "leak", "it names the next item; describe the kind of item that is wanted, without that title."
        )


def _line(item: Item) -> str:
    about = ", ".join(filter(None, (item.brand, *item.categories[-CATEGORIES:])))
    title = _first_words(item.title, TITLE_WORDS)
    return f"{title} ({about})" if about else title


def _first_words(text: str, count: int) -> str:
    return " ".join(text.split()[:count])
