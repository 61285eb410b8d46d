"""The one client of servers that speak the OpenAI API: the teacher and the evaluation ask through it."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import openai
from pydantic import BaseModel, ValidationError

from gream_verl.core.errors import InputError

Job = TypeVar("Job")
Done = TypeVar("Done")
Body = TypeVar("Body", bound=BaseModel)

FIRST_WAIT = 0.5  # seconds after a reply that is no answer; twice as long after each further one
UNUSABLE = {
    401: "set the API key in the environment variable {key}",
    403: "use an API key in {key} that may use this model",
    404: "check the endpoint (it ends in /v1 for most servers) and the name of the model",
}
"""Status codes that no request to this server can survive, and the remedy for each."""


class RefusedError(Exception):
    """The server will never answer this request; the message is its reason."""


class FailedError(Exception):
    """Every attempt failed; the message is the last reason."""


@dataclass(frozen=True)
class Server:
    """Address and limits of a server.

    Attributes:
        endpoint: Base URL, such as ``http://127.0.0.1:8000/v1``.
        key_variable: Environment variable that holds the API key.
        concurrency: Requests in flight.
        timeout: Seconds per attempt.
        attempts: Attempts per request, with longer and longer waits or those of Retry-After.
    """

    endpoint: str
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 32
    timeout: float = 120.0
    attempts: int = 8

    def client(self) -> openai.AsyncOpenAI:
        """Return a client that retries rate limits, server errors, timeouts and lost connections by itself."""
        key, retries = os.environ.get(self.key_variable, "").strip() or "none", self.attempts - 1
        if not re.fullmatch(r"https?://(\[[\da-f:]+\]|[^\s/:]+)(:\d+)?(/\S*)?", self.endpoint):
            raise InputError(f"--endpoint {self.endpoint!r}: expected a URL such as http://127.0.0.1:8000/v1")
        if not (key.isascii() and key.isprintable()):
            raise InputError(f"the API key in {self.key_variable} holds a character that no key has; set it again")
        return openai.AsyncOpenAI(base_url=self.endpoint, api_key=key, timeout=self.timeout, max_retries=retries)

    async def ask(self, create: Callable[..., Awaitable[Any]], form: type[Body], request: dict[str, Any]) -> Body:
        """Return the reply to a request, which is sent again while the reply is not of this form.

        Args:
            create: A method of the client, such as ``client.chat.completions.with_raw_response.create``.
            form: The model of the reply.
            request: Arguments of ``create``.
        """
        for attempt in range(self.attempts):
            try:
                body = (await create(**request)).content
                return form.model_validate_json(body)
            except openai.APIError as error:
                raise self.error(error) from error
            except ValidationError:
                await asyncio.sleep(min(FIRST_WAIT * 2**attempt, 8.0) * (attempt + 1 < self.attempts))
        raise FailedError(f"{self.endpoint}: no answer but {body[:80]!r}")

    def error(self, error: openai.APIError) -> InputError | RefusedError | FailedError:
        """Return InputError when no request can succeed, RefusedError when this one never will, else FailedError."""
        status = getattr(error, "status_code", None)  # None: no reply at all
        reason = " ".join(f"{self.endpoint}: {error} {error.__cause__ or ''}".split())[:400]
        if status in UNUSABLE:
            return InputError(f"{reason}; {UNUSABLE[status].format(key=self.key_variable)}")
        return FailedError(reason) if status in (None, 408, 409, 425, 429) or status >= 500 else RefusedError(reason)


async def find_model(client: openai.AsyncOpenAI, endpoint: str, wanted: str | None) -> tuple[str, bool]:
    """Return the name of the model on a server, and True when the server is vLLM's; None wants the only one.

    Raises:
        InputError: When there is no such model, or no only one.
        openai.APIError: When the server does not answer; AttributeError or TypeError for what is no list.
    """
    try:
        models = {model.id: model.owned_by async for model in client.models.list()}
    except (openai.APIError, AttributeError, TypeError) as error:
        may_have_list = isinstance(error, openai.APIError) and getattr(error, "status_code", None) != 404
        if wanted is not None and not may_have_list:
            return wanted, False
        raise
    if wanted is None and len(models) == 1:
        wanted = next(iter(models))
    if wanted is None or (models and wanted not in models):
        names = ", ".join(sorted(models)) or "none"
        raise InputError(f"{endpoint}: no model {wanted!r} there but {names}; set served_model to one")
    return wanted, models.get(wanted) == "vllm"


async def as_done(
    jobs: Iterable[Job], work: Callable[[Job], Awaitable[Done]], concurrency: int
) -> AsyncIterator[tuple[Job, Done]]:
    """Yield each job with its result as it finishes, at most ``concurrency`` at once; an error cancels the rest."""
    running: dict[asyncio.Future[Done], Job] = {}
    waiting = iter(jobs)
    try:
        while True:
            for job in islice(waiting, concurrency - len(running)):  # drawn only when there is room
                running[asyncio.ensure_future(work(job))] = job
            if not running:
                return
            finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for future in sorted(finished, key=lambda done: done.exception() is not None):  # results before an error
                yield running.pop(future), future.result()
    finally:
        for future in running:
            future.cancel()
        await asyncio.gather(*running, return_exceptions=True)
