"""Texts that a language model writes: descriptions of items, tastes of users, chains of thought.

Every answer is kept in ``<D>.teacher.jsonl``; the files that later steps read are made from it, whole, after each run.
A question that was not answered, or not usably, is in none of them: a failed call is never training text.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from data_processing.layout import CHAINS, SEARCHED, SEARCHES, USER_TEXTS
from data_processing.teacher.asking import Asked, Asker, Estimate, Result, Settings, estimate, results
from data_processing.teacher.budget import Budget
from data_processing.teacher.client import Connection, Teacher
from data_processing.teacher.questions import Questions, chain_questions, item_questions, sample, user_questions, window
from data_processing.teacher.store import AnswerStore
from data_processing.teacher.templates import Prompt, read_prompts
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.files import atomic_path, read_json, write_json
from gream_verl.core.prompts import NO_TARGET, TrainingTargets

What = Literal["items", "users", "chains"]


@dataclass
class Enrichment:
    """What a run made.

    Attributes:
        path: The file that was written, None when there was nothing to write.
        before: Texts in that file before this run.
        usable: Questions with a usable answer.
        open: Questions, or later rounds of them, that are still to be asked.
        dropped: Questions whose every answer was unusable, by the kind of the last.
        faults: Unusable answers, by kind.
        leaks: Share of well-formed answers that named what they must not, and were asked again or dropped.
        asked: What this run asked.
        seconds: How long it took.
    """

    path: Path | None = None
    before: int = 0
    usable: int = 0
    open: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    asked: Asked = field(default_factory=Asked)
    seconds: float = 0.0

    @property
    def leaks(self) -> float:
        """Share of answers of the right form that named what they must not."""
        return self.faults["leak"] / max(self.usable + self.faults["leak"], 1)

    def count(self, found: Iterable[Result]) -> Iterator[Result]:
        """Count results; yield those with data."""
        for result in found:
            self.faults.update(result.faults)
            if result.data is not None:
                self.usable += 1
                yield result
            elif result.open:
                self.open += 1
            else:
                self.dropped[result.faults[-1]] += 1


@dataclass
class Enricher:
    """Asks a teacher about a data set.

    Attributes:
        folder: A prepared data set.
        what: Descriptions of items, tastes of users, or chains of thought.
        settings: Fields of the requests.
        prompts: Folder with the prompts, those of the package when None.
        limit: Most questions, a seeded sample; all when None.
        history: Items shown of a user, the most recent ones.
        seed: Draws the sample.
    """

    folder: DataFolder
    what: What
    settings: Settings
    prompts: Path | None = None
    limit: int | None = None
    history: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.what not in get_args(What):
            raise InputError(f"{self.what!r}: cannot be written by a teacher; choose {', '.join(get_args(What))}")
        prompts = read_prompts(self.prompts)
        self._again = prompts["again"]
        self._items = self.folder.read_items(enriched=self.what != "items")
        self._questions = self._ask_about(prompts)
        self._output = {
            "items": self.folder.enriched,
            "users": self.folder.user_texts,
            "chains": self.folder.chains,
        }[self.what]
        self._before = self._count_before()

    @cached_property
    def _training(self) -> dict[str, Sequence[str]]:
        return self.folder.read_training(self._items)

    def estimate(self, budget: Budget) -> Estimate:
        """Return what asking would take, without asking."""
        if not self.folder.teacher.is_file():
            return estimate(self._questions, self.settings, (), budget)
        with AnswerStore(self.folder.teacher) as store:
            return estimate(self._questions, self.settings, store, budget)

    def run(self, connection: Connection, budget: Budget, console: Console) -> Enrichment:
        """Ask what was never answered, then write the file from all that was.

        What has been answered is written also when the budget or the server ends before the questions do; when the run
        is broken off, only if it is as much as the file holds.

        Raises:
            InputError: When no request can be answered, or a file cannot be used.
        """
        made, began = Enrichment(before=self._before), time.monotonic()
        with AnswerStore(self.folder.teacher) as store:
            budget.prompt_tokens, budget.completion_tokens = store.prompt_tokens, store.completion_tokens
            budget.cost = store.cost
            stopped = True
            try:
                made.asked = asyncio.run(self._ask(connection, budget, store, console))
                stopped = False
            finally:
                found = list(made.count(results(self._questions, self.settings, store, self._again)))
                if found and (not stopped or len(found) >= self._before):
                    self._write(found)
                    made.path = self._output
        made.seconds = time.monotonic() - began
        write_json(self.folder.enrichment(self.what), describe(made, budget), indent=1)
        return made

    async def _ask(self, connection: Connection, budget: Budget, store: AnswerStore, console: Console) -> Asked:
        async with Teacher(connection) as teacher:
            return await Asker(self._questions, self.settings, store, budget, self._again, teacher).run(console)

    def _ask_about(self, prompts: Mapping[str, Prompt]) -> Questions:
        if self.what == "items":
            chosen = sample(list(self._items), self.limit, self.seed)
            return item_questions(self._items, _reviews(self.folder), prompts["item"], chosen)
        if self.what == "users":
            users = sample([user for user, part in self._training.items() if len(part) > 1], self.limit, self.seed)
            if not users:
                raise InputError(
                    f"{self.folder.inter}: no user has two interactions for training; bring longer histories"
                )
            return user_questions(self._items, self._training, prompts["user"], users, self.history)
        return chain_questions(self._items, self._training, prompts["chain"], self._targets(), self.history)

    def _targets(self) -> list[tuple[str, int]]:
        """Draw the interactions to write chains for, of those that training may ask for."""
        targets, users = TrainingTargets(map(len, self._training.values())), list(self._training)
        if not len(targets):
            raise InputError(f"{self.folder.inter}: {NO_TARGET}")
        owners, positions = targets.locate(np.array(sample(range(len(targets)), self.limit, self.seed), np.int64))
        return [(users[owner], position) for owner, position in zip(owners.tolist(), positions.tolist(), strict=True)]

    def _count_before(self) -> int:
        if not self._output.is_file():
            return 0
        if self.what == "chains":
            return pq.read_metadata(self._output).num_rows
        written = read_json(self._output)
        if self.what == "users" and USER_TEXTS not in written:
            raise InputError(f"{self._output}: holds something else; move it, and call again")
        return len(written[USER_TEXTS] if self.what == "users" else written)

    def _write(self, found: Sequence[Result]) -> None:
        if self.what == "items":
            write_json(self._output, {row.subject: {"description": row.data.description} for row in found}, indent=0)
        elif self.what == "users":
            preferences = {row.subject: row.data.preferences for row in found}
            queries = {row.subject: row.data.queries for row in found}
            targets = {row.subject: self._training[row.subject][-1] for row in found}
            written = {USER_TEXTS: preferences, SEARCHES: {"train": queries}, SEARCHED: targets}
            write_json(self._output, written, indent=0)
        else:
            table = pa.Table.from_pylist([self._chain_record(row) for row in found], CHAINS)
            with atomic_path(self._output) as path:
                pq.write_table(table, path, compression="zstd")

    def _chain_record(self, row: Result) -> dict[str, Any]:
        user, position = row.subject
        past, target = window(self._training, row.subject, self.history)
        return {
            "user": user,
            "position": position,
            "item": target,
            "history": len(past),
            **{name: getattr(row.data, name) for name in ("evidence", "preference", "intent")},
            "keep": [past[number - 1] for number in sorted(set(row.data.keep))],
        }


def _reviews(folder: DataFolder) -> dict[str, list[str]]:
    """Return the reviews that `gream data prepare` kept of each item; none when it kept none."""
    texts: dict[str, list[str]] = defaultdict(list)
    if folder.reviews.is_file():
        for item, text in pl.read_parquet(folder.reviews, columns=["item", "text"]).iter_rows():
            texts[item].append(text)
    return texts


def describe(made: Enrichment, budget: Budget) -> dict[str, Any]:
    """Return what a run made, for a table."""
    asked = made.asked
    return {
        "written": str(made.path or "nothing"),
        "texts before": made.before,
        "usable": made.usable,
        "still to ask": made.open,
        "dropped": dict(made.dropped),
        "unusable answers": dict(made.faults),
        "leak rate": made.leaks,
        "answers asked for now": asked.answers,
        "attempts made again": asked.retried,
        "failed": asked.failed,
        "refused": dict(asked.refused),
        "budget spent": asked.budget_spent,
        "tokens of all runs": {"prompts": budget.prompt_tokens, "answers": budget.completion_tokens},
        "cost of all runs": budget.cost,
        "seconds": made.seconds,
    }
