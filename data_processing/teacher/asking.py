"""Asks all questions, round by round, and keeps every answer; asks only what was never answered."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_processing.teacher.answers import UnusableError
from data_processing.teacher.budget import Budget, BudgetSpentError, Price
from data_processing.teacher.client import FailedError, RefusedError, Teacher
from data_processing.teacher.questions import Question, Questions
from data_processing.teacher.store import Answer, AnswerStore, request_key
from data_processing.teacher.templates import Messages, Prompt
from gream_verl.core.errors import InputError

Structure = Literal["json_schema", "json_object", "none"]
FAILURES_IN_A_ROW = 20
"""So many requests without an answer, and none with one between, end the run."""
OURS = {"max_completion_tokens", "max_tokens", "messages", "model", "n", "response_format", "stream", "temperature"}
"""Fields of a request that the store or the budget counts on."""


@dataclass(frozen=True)
class Settings:
    """What every request has beside its messages.

    Attributes:
        model: Name of the model, as the server knows it.
        max_tokens: Longest answer.
        temperature: 0 for the likeliest answer.
        structure: How the server is told the form of the answer: by its schema, as any JSON object, or only in words.
        rounds: Times a question is asked: once, and again for every answer that cannot be used.
        extra: More fields of a request, such as ``{"chat_template_kwargs": {"enable_thinking": false}}``.
    """

    model: str
    max_tokens: int = 512
    temperature: float = 0.7
    structure: Structure = "json_schema"
    rounds: int = 3
    extra: Mapping[str, Any] = field(default_factory=dict)

    def request(self, messages: Messages, form: tuple[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Return the fields of a request."""
        formats: dict[str, dict[str, Any]] = {
            "json_schema": {
                "type": "json_schema",
                "json_schema": {"name": form[0], "schema": dict(form[1]), "strict": True},
            },
            "json_object": {"type": "json_object"},
        }
        request: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        if self.structure in formats:
            request["response_format"] = formats[self.structure]
        return request | ({"extra_body": dict(self.extra)} if self.extra else {})


class UnansweredError(Exception):
    """A round whose request has no answer in the store."""


@dataclass
class Result:
    """What came of a question.

    Attributes:
        subject: What it was about.
        data: The answer's data, None when no answer could be used.
        faults: Kind of every answer that could not be used, in order.
        open: Whether a round is still to be answered.
    """

    subject: Any
    data: Any = None
    faults: list[str] = field(default_factory=list)
    open: bool = False


async def converse(
    question: Question,
    ask: Callable[[Messages], Awaitable[Answer]],
    again: Prompt,
    rounds: int,
) -> Result:
    """Ask a question, and again with what was wrong, until an answer can be used.

    Args:
        question: What to ask.
        ask: Returns the answer to a conversation, or raises :class:`UnansweredError`.
        again: The prompt that tells what was wrong.
        rounds: Most answers.
    """
    result, messages = Result(question.subject), question.messages
    for _ in range(rounds):
        try:
            answer = await ask(messages)
        except UnansweredError:
            result.open = True
            return result
        try:
            result.data = question.read(answer.text, answer.finish)
            return result
        except UnusableError as fault:
            result.faults.append(fault.kind)
            told = again.messages(reason=str(fault))[-1]
            messages = [*messages, {"role": "assistant", "content": answer.text}, told]
    return result


def results(questions: Questions, settings: Settings, store: AnswerStore, again: Prompt) -> Iterator[Result]:
    """Yield what came of every question, from the store alone."""

    def stored(messages: Messages) -> Answer:
        answer = store.get(request_key(settings.request(messages, questions.form)))
        if answer is None:
            raise UnansweredError
        return answer

    async def ask(messages: Messages) -> Answer:
        return stored(messages)

    for question in questions:
        yield _run_now(converse(question, ask, again, settings.rounds))


def _run_now(coroutine: Any) -> Any:
    """Run a coroutine that waits for nothing."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    raise AssertionError("a coroutine over the store does not wait")


@dataclass(frozen=True)
class Estimate:
    """What is to be asked, first rounds only.

    Attributes:
        questions: All questions.
        answered: Those whose first round is in the store.
        prompt_tokens: Tokens of the other prompts, about.
        most_tokens: Most tokens of their answers.
        most_money: Most money for both.
    """

    questions: int
    answered: int
    prompt_tokens: int
    most_tokens: int
    most_money: float


def estimate(questions: Questions, settings: Settings, store: Container[str], budget: Budget) -> Estimate:
    """Return what asking would take, without asking.

    Args:
        questions: What would be asked.
        settings: Fields of the requests.
        store: Keys of the requests that are answered.
        budget: Knows what a prompt costs.
    """
    answered, prompt = 0, 0.0
    for question in questions:
        request = settings.request(question.messages, questions.form)
        if request_key(request) in store:
            answered += 1
        else:
            prompt += budget.prompt_estimate(request_bytes(request))
    most = (len(questions) - answered) * settings.max_tokens
    return Estimate(len(questions), answered, round(prompt), most, budget.price.of(prompt, most))


def request_bytes(request: Mapping[str, Any]) -> int:
    """Return the bytes of what a model reads of a request: the conversation and the form of the answer."""
    form = json.dumps(request.get("response_format", ""))
    return len(form) + sum(len(message["content"].encode()) for message in request["messages"])


@dataclass
class Asked:
    """What one run asked.

    Attributes:
        answers: Requests that were answered and kept.
        retried: Attempts that were made again, by reason.
        failed: Questions that no attempt got answered.
        refused: Questions that the server refused, by reason.
        budget_spent: Whether the budget ended the run.
    """

    answers: int = 0
    retried: dict[str, int] = field(default_factory=dict)
    failed: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    budget_spent: bool = False


class Asker:
    """One run over some questions.

    Args:
        questions: What to ask.
        settings: Fields of the requests.
        store: Where answers are kept and looked up.
        budget: What it may cost.
        again: The prompt that tells what was wrong.
        teacher: Who answers.
    """

    def __init__(
        self,
        questions: Questions,
        settings: Settings,
        store: AnswerStore,
        budget: Budget,
        again: Prompt,
        teacher: Teacher,
    ) -> None:
        self._questions = questions
        self._settings = settings
        self._store = store
        self._budget = budget
        self._again = again
        self._teacher = teacher
        self._under_way: dict[str, asyncio.Task[Answer]] = {}
        self._in_a_row = 0
        self._known = 0
        self.asked = Asked(retried=teacher.retried)

    async def run(self, console: Console) -> Asked:
        """Ask everything that has no answer yet.

        Raises:
            InputError: When no request can be answered: wrong key or address, server gone.
        """
        todo = iter(self._questions)
        columns = (
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
            *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[spent]}")),
        )
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task(f"Asking {self._settings.model}", total=len(self._questions), spent="")

            async def work() -> None:
                for question in todo:  # shared: each takes the next
                    if self.asked.budget_spent:
                        return
                    await self._answer(question)
                    progress.update(bar, advance=1, spent=self._spent())

            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(self._teacher.connection.concurrency):
                        group.create_task(work())
            except* InputError as errors:
                raise errors.exceptions[0] from None
        return self.asked

    async def _answer(self, question: Question) -> None:
        try:
            ask = partial(self._ask, str(question.subject))
            await converse(question, ask, self._again, self._settings.rounds)
        except BudgetSpentError:
            self.asked.budget_spent = True
        except RefusedError as error:
            self._refuse(str(error))
        except FailedError:
            self.asked.failed += 1

    def _refuse(self, reason: str) -> None:
        """Count a refusal; when the server has refused all it was ever asked, the options are at fault."""
        self.asked.refused[re.sub(r"\d+", "#", reason)] += 1
        if not self._known and not self.asked.answers and self.asked.refused.total() >= FAILURES_IN_A_ROW:
            raise InputError(
                f"the server refused all of the first {FAILURES_IN_A_ROW} requests: {reason}; change the options (a "
                "server that knows no JSON schemas takes --structure none) and call again"
            )

    def _fail(self, reason: str) -> None:
        self._in_a_row += 1
        if self._in_a_row >= FAILURES_IN_A_ROW:
            raise InputError(
                f"{self._in_a_row} requests in a row were not answered, the last for this reason: {reason}. Check the "
                "server and the options, and call again: what was answered is kept"
            )

    async def _ask(self, about: str, messages: Messages) -> Answer:
        request = self._settings.request(messages, self._questions.form)
        key = request_key(request)
        if (answer := self._store.get(key)) is not None:
            self._known += 1
            return answer
        if key not in self._under_way:  # two questions may be one request
            task = self._under_way[key] = asyncio.create_task(self._fetch(about, key, request))
            task.add_done_callback(lambda _: self._under_way.pop(key))
        return await self._under_way[key]

    async def _fetch(self, about: str, key: str, request: dict[str, Any]) -> Answer:
        size = request_bytes(request)
        async with self._budget.reserve(size, self._settings.max_tokens):
            try:
                answer = await self._teacher.ask(request)
            except FailedError as error:
                self._fail(str(error))
                raise
            cost = self._budget.add(size, answer.prompt_tokens, answer.completion_tokens)
            self._store.put(key, self._settings.model, answer, cost, about)
        self.asked.answers += 1
        self._in_a_row = 0
        return answer

    def _spent(self) -> str:
        tokens = self._budget.prompt_tokens + self._budget.completion_tokens
        money = f", {self._budget.cost:.2f} of money" if self._budget.price != Price() else ""
        retries = sum(self.asked.retried.values())
        return f"{tokens:,} tokens{money}, {retries} retries"


def read_extra(text: str | None) -> dict[str, Any]:
    """Read more fields of a request, a JSON object.

    Raises:
        InputError: When it is none.
    """
    try:
        value = json.loads(text or "{}")
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise InputError(f'--extra {text!r}: expected a JSON object, such as {{"top_p": 0.9}}')
    if ours := sorted(OURS.intersection(value)):
        raise InputError(f"--extra: {ours[0]} cannot be set there; use its own option, or leave it out")
    return value
