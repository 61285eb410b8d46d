"""A run of the teacher: it is asked what it never answered, and all its answers become a file of texts."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from itertools import takewhile
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from rich.console import Console
from rich.progress import Progress, TextColumn

from data_processing.teacher.questions import FORMS, Questions, UnusableError, json_schema
from data_processing.teacher.store import Answer, AnswerStore
from gream_verl.core.errors import InputError
from gream_verl.core.files import write_json
from gream_verl.core.openai_client import FailedError, RefusedError, Server, as_done

IN_A_ROW = 20  # requests without an answer, one after the other, that end a run
TOKENS_A_BYTE = 0.3  # of a prompt, for the estimate; English has a little fewer
TEMPLATE_TOKENS = 100  # most that a server puts around a conversation


class Teacher(BaseModel):
    """A language model, its server (:class:`gream_verl.core.openai_client.Server`) and the fields of every request.

    Attributes:
        structure: Form of the answer in a request: its schema, any JSON object, or nothing but the prompt's words.
        max_tokens: Longest answer.
        rounds: Times a question is asked: once, and again after every unusable answer.
        extra: More fields of a request, such as ``{"chat_template_kwargs": {"enable_thinking": false}}``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    endpoint: str
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = Field(32, ge=1)
    timeout: float = Field(120.0, gt=0)
    attempts: int = Field(8, ge=1)
    structure: Literal["json_schema", "json_object", "none"] = "json_schema"
    max_tokens: int = Field(512, ge=1)
    temperature: float = Field(0.7, ge=0)
    rounds: int = Field(3, ge=1)
    extra: dict[str, Any] = {}

    def fields(self, form: type[BaseModel]) -> dict[str, Any]:
        """Return the fields of a request but for its messages."""
        fields = self.model_dump(include={"model", "max_tokens", "temperature"})
        response: dict[str, Any] = {"type": self.structure}
        if self.structure == "json_schema":
            response["json_schema"] = {"name": form.__name__, "schema": json_schema(form), "strict": True}
        fields |= {"response_format": response} if self.structure != "none" else {}
        return fields | ({"extra_body": self.extra} if self.extra else {})


class Enricher:
    """A teacher that is asked some questions.

    ``budget`` bounds the tokens, prompts and answers, of all answers in the store; None for no bound.
    """

    def __init__(self, questions: Questions, teacher: Teacher, store: AnswerStore, budget: int | None = None) -> None:
        self.questions, self.teacher, self.store, self.budget = questions, teacher, store, budget
        self._server = Server(**teacher.model_dump(include=set(Server.__dataclass_fields__)))
        self._fields = teacher.fields(FORMS[questions.what])
        self._spent = sum(store.tokens())
        self._held = self._answered = self._in_a_row = 0
        self._unanswered: Counter[str] = Counter()
        self._budget_spent = False

    def follow(self, subject: Any) -> tuple[Any, list[str], dict[str, Any] | None]:
        """Follow the conversation about a subject through the stored answers.

        Returns:
            Data of the usable answer, kinds of the unusable ones, and the request to send next; None for nothing.
        """
        question, faults = self.questions.ask(subject), list[str]()
        messages = question.messages
        for _ in range(self.teacher.rounds):
            request = {"messages": messages, **self._fields}
            answer = self.store.get(request)
            if answer is None:
                return None, faults, request
            try:
                return question.read(answer.text, answer.finish), faults, None
            except UnusableError as fault:
                kind, reason = fault.args
                faults.append(kind)
                again = self.questions.templates["again"].messages(reason=reason)[-1]
                messages = [*messages, {"role": "assistant", "content": answer.text}, again]
        return None, faults, None

    def estimate(self) -> dict[str, int]:
        """Return questions and tokens still to ask, with one answer per question; nothing is asked."""
        requests = (self.follow(subject)[2] for subject in self.questions.subjects)
        sizes = [_prompt_bytes(request) for request in requests if request]
        return {
            "questions": len(self.questions.subjects),
            "to ask": len(sizes),
            "prompt tokens, about": round(TOKENS_A_BYTE * sum(sizes)),
            "answer tokens, at most": len(sizes) * self.teacher.max_tokens,
        }

    def run(self, console: Console) -> dict[str, Any]:
        """Ask what was never answered, write the file from all answers, and return the report, which is written too.

        When no request can be answered, the file is written only where there is none yet, and InputError goes on.
        """
        complete, found, faults, without = False, {}, Counter[str](), Counter[str]()
        try:
            asyncio.run(self._ask_all(console))
            complete = True
        finally:
            for subject in self.questions.subjects:
                data, kinds, request = self.follow(subject)
                faults.update(kinds)
                if data is not None:
                    found[subject] = data
                else:
                    without["still to ask" if request else f"dropped: {kinds[-1]}"] += 1
            writes = bool(found) and (complete or not self.questions.path.exists())
            if writes:
                self.questions.write(found)
        prompts, answers = self.store.tokens()
        report = {
            "written": self.questions.path.name if writes else "nothing",
            "usable": len(found),
            "without a text": dict(without),
            "unusable answers": dict(faults),
            "leak rate": faults["leak"] / max(len(found) + faults["leak"], 1),
            "answered now": self._answered,
            "not answered": dict(self._unanswered),
            "budget spent": self._budget_spent,
            "tokens of all runs": {"prompts": prompts, "answers": answers},
        }
        write_json(self.questions.folder.enrichment(self.questions.what), report, indent=1)
        return report

    async def _ask_all(self, console: Console) -> None:
        todo = takewhile(lambda _: not self._budget_spent, self.questions.subjects)
        columns = *Progress.get_default_columns(), TextColumn("{task.fields[tokens]:,} tokens")
        async with self._server.client() as client:
            create = client.chat.completions.with_raw_response.create
            with Progress(*columns, console=console) as progress:
                bar = progress.add_task(self.teacher.model, total=len(self.questions.subjects), tokens=self._spent)
                async for _ in as_done(todo, lambda subject: self._converse(subject, create), self.teacher.concurrency):
                    progress.update(bar, advance=1, tokens=self._spent)

    async def _converse(self, subject: Any, create: Any) -> None:
        """Ask one question, and again while its answers cannot be used."""
        while (request := self.follow(subject)[2]) is not None:
            # A prompt has at most one token per byte. Its true count replaces this bound when the request has ended.
            most = _prompt_bytes(request) + TEMPLATE_TOKENS + self.teacher.max_tokens
            while self.budget is not None and self._spent + self._held + most > self.budget:
                if not self._held:
                    self._budget_spent = True
                    return
                await asyncio.sleep(0.05)
            self._held += most
            try:
                answer = await self._server.ask(create, Answer, request)
            except (FailedError, RefusedError) as error:
                self._count_failure(error)
                return
            finally:
                self._held -= most
            self.store.put(request, answer, str(subject))
            self._spent += answer.prompt + answer.completion
            self._answered += 1
            self._in_a_row = 0

    def _count_failure(self, error: FailedError | RefusedError) -> None:
        self._unanswered[re.sub(r"(?<![:\d])\d{4,}", "#", str(error))] += 1  # some reasons count the tokens
        self._in_a_row += 1
        # A server that answered before may refuse all questions that are left.
        if self._in_a_row >= IN_A_ROW and not (self._spent and isinstance(error, RefusedError)):
            remedy = "call again with other options (--structure none for a server without JSON schemas)"
            raise InputError(f"{IN_A_ROW} requests in a row were not answered, the last because of {error}; {remedy}")


def _prompt_bytes(request: dict[str, Any]) -> int:
    """Return the bytes of the conversation and of the form of the answer."""
    return len(json.dumps([request["messages"], request.get("response_format")], ensure_ascii=False).encode())
