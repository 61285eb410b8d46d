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
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from data_processing.layout import CHAINS, USER_TEXTS, DataFolder
from data_processing.teacher.asking import Asked, Asker, Estimate, Result, Settings, estimate, results
from data_processing.teacher.budget import Budget
from data_processing.teacher.client import Connection, Teacher
from data_processing.teacher.questions import Questions, chain_questions, item_questions, sample, user_questions
from data_processing.teacher.store import AnswerStore
from data_processing.teacher.templates import Prompt, read_prompts
from gream_verl.files import InputError, atomic_path, read_json, write_json
from gream_verl.next_item import NO_TARGET, TrainingTargets

What = Literal["items", "users", "chains"]
CHUNK = 8192


@dataclass
class Enrichment:
    """What a run made.

    Attributes:
        path: The file that was written, None when there was nothing to write.
        usable: Questions with a usable answer.
        open: Questions, or later rounds of them, that are still to be asked.
        dropped: Questions whose every answer was unusable, by the kind of the last.
        faults: UnusableError answers, by kind.
        leaks: Share of well-formed answers that named what they must not, and were asked again or dropped.
        asked: What this run asked.
        seconds: How long it took.
    """

    path: Path | None = None
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
            elif result.open or not result.asked:
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
        self._questions = self._ask_about(prompts)

    def estimate(self, budget: Budget) -> Estimate:
        """Return what asking would take, without asking."""
        if not self.folder.teacher.is_file():
            return estimate(self._questions, self.settings, (), budget)
        with AnswerStore(self.folder.teacher) as store:
            return estimate(self._questions, self.settings, store, budget)

    def run(self, connection: Connection, budget: Budget, console: Console) -> Enrichment:
        """Ask what was never answered, then write the file from all that was.

        What has been answered is written also when the budget or the server ends before the questions do.

        Raises:
            InputError: When no request can be answered, or a file cannot be used.
        """
        made, began = Enrichment(), time.monotonic()
        with AnswerStore(self.folder.teacher) as store:
            budget.prompt_tokens, budget.completion_tokens = store.prompt_tokens, store.completion_tokens
            try:
                made.asked = asyncio.run(self._ask(connection, budget, store, console))
            finally:
                found = results(self._questions, self.settings, store, self._again)
                made.path = self._write(made.count(found))
        made.seconds = time.monotonic() - began
        write_json(self.folder.enrichment(self.what), describe(made, budget), indent=1)
        return made

    async def _ask(self, connection: Connection, budget: Budget, store: AnswerStore, console: Console) -> Asked:
        async with Teacher(connection) as teacher:
            return await Asker(self._questions, self.settings, store, budget, self._again, teacher).run(console)

    def _ask_about(self, prompts: Mapping[str, Prompt]) -> Questions:
        items = self.folder.read_items(enriched=False)
        if self.what == "items":
            chosen = sample(list(items), self.limit, self.seed)
            return item_questions(items, _reviews(self.folder), prompts["item"], chosen)
        items, training = self.folder.read_items(), self.folder.read_training(items)
        if self.what == "users":
            users = sample([user for user, part in training.items() if len(part) > 1], self.limit, self.seed)
            return user_questions(items, training, prompts["user"], users, self.history)
        return chain_questions(items, training, prompts["chain"], self._targets(training), self.history)

    def _targets(self, training: Mapping[str, Sequence[str]]) -> list[tuple[str, int]]:
        """Draw the interactions to write chains for, of those that training may ask for."""
        targets, users = TrainingTargets(map(len, training.values())), list(training)
        if not len(targets):
            raise InputError(f"{self.folder.inter}: {NO_TARGET}")
        drawn = sample(range(len(targets)), self.limit, self.seed)
        owners, positions = targets.locate(pl.Series(drawn, dtype=pl.Int64).to_numpy())
        return [(users[owner], position) for owner, position in zip(owners.tolist(), positions.tolist(), strict=True)]

    def _write(self, usable: Iterator[Result]) -> Path | None:
        first = list(islice(usable, 1))
        if not first:
            return None
        rows = (result for part in (first, usable) for result in part)
        write = {"items": _write_items, "users": _write_users, "chains": self._write_chains}[self.what]
        return write(self.folder, rows)

    def _write_chains(self, folder: DataFolder, rows: Iterator[Result]) -> Path:
        sequences = folder.read_inter(folder.read_items())
        with atomic_path(folder.chains) as path, pq.ParquetWriter(path, CHAINS, compression="zstd") as writer:
            while chunk := list(islice(rows, CHUNK)):
                records = [_chain_record(sequences, self.history, result) for result in chunk]
                writer.write_table(pa.Table.from_pylist(records, CHAINS))
        return folder.chains


def _chain_record(sequences: Mapping[str, Sequence[str]], history: int, result: Result) -> dict[str, Any]:
    user, position = result.subject
    past = sequences[user][max(position - history, 0) : position]
    fields = {name: getattr(result.data, name) for name in ("evidence", "preference", "intent")}
    kept = [past[number - 1] for number in sorted(set(result.data.keep))]
    return {
        "user": user,
        "position": position,
        "item": sequences[user][position],
        "history": len(past),
        **fields,
        "keep": kept,
    }


def _write_items(folder: DataFolder, rows: Iterator[Result]) -> Path:
    write_json(folder.enriched, {row.subject: {"description": row.data.description} for row in rows}, indent=0)
    return folder.enriched


def _write_users(folder: DataFolder, rows: Iterator[Result]) -> Path:
    preferences, queries = {}, {}
    for row in rows:
        preferences[row.subject], queries[row.subject] = row.data.preferences, row.data.queries
    written = {USER_TEXTS: preferences, "user_vague_intention": {"train": queries}}
    if folder.user_texts.is_file() and USER_TEXTS not in read_json(folder.user_texts):
        raise InputError(f"{folder.user_texts}: holds something else; move it, and call again: the answers are kept")
    write_json(folder.user_texts, written, indent=0)
    return folder.user_texts


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
