"""Asks language models behind the OpenAI API: vLLM, any compatible server, several at once.

What fails for a while (429, 5xx, resets, timeouts, bodies that are no answer) is asked again, later and elsewhere. What
fails for good is an error or a refusal, never an answer.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import openai
from pydantic import BaseModel, Field, ValidationError
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt

from data_processing.teacher.store import Answer
from gream_verl.core.errors import InputError

FIRST_WAIT = 0.5
LONGEST_WAIT = 60.0
"""Seconds between two attempts; it doubles from the first to the longest, and each wait is drawn from 0 to that. Longer
than the longest no server is waited for at once."""
REST = 5.0
"""Seconds for which an endpoint that failed is passed over while another can answer."""
FATAL = {
    401: "set the API key in the environment variable {key}",
    403: "the API key in {key} has no right to this",
    404: "check --endpoint (it ends in /v1 for most servers) and --model",
}


class RefusedError(Exception):
    """The server will not answer this request, however often it is asked; the message is its reason."""


class FailedError(Exception):
    """No attempt was answered; the message is the last reason."""


class NoAnswerError(Exception):
    """The server said 200 and sent something else than an answer."""


PASSING = (openai.APIError, NoAnswerError, TimeoutError)
"""What an attempt may end in that another attempt need not."""


class _Usage(BaseModel):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(ge=0)


class _Message(BaseModel):
    content: str | None = None  # null: the model only thought, or refused


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


@dataclass(frozen=True)
class Connection:
    """How to reach a teacher.

    Attributes:
        endpoints: Base URLs, such as ``http://127.0.0.1:8000/v1``; requests go to the least busy one.
        key_variable: Environment variable that holds the API key.
        api_key: The key.
        concurrency: Requests under way at once, over all endpoints.
        timeout: Seconds until an attempt is given up.
        attempts: Attempts for each request.
    """

    endpoints: tuple[str, ...]
    key_variable: str = "OPENAI_API_KEY"
    api_key: str = field(default="", repr=False)
    concurrency: int = 32
    timeout: float = 120.0
    attempts: int = 8

    def __post_init__(self) -> None:
        if not self.api_key.isascii() or not self.api_key.isprintable():
            raise InputError(f"the API key in {self.key_variable} holds a letter that no key has; set it anew")
        for url in self.endpoints:
            if not _is_url(url):
                raise InputError(f"--endpoint {url!r}: expected a URL such as http://127.0.0.1:8000/v1")
        if not self.endpoints:
            raise InputError("no endpoint; give --endpoint URL, such as http://127.0.0.1:8000/v1")


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # no such port
        return False


@dataclass
class _Endpoint:
    client: openai.AsyncOpenAI
    busy: int = 0
    rests_until: float = 0.0
    waits: bool = False

    @property
    def asked_us_to_wait(self) -> bool:
        """Whether the server said when it can be asked again, and that is not yet."""
        return self.waits and self.rests_until > time.monotonic()


@dataclass
class Teacher:
    """A client of one or several servers.

    Attributes:
        connection: How to reach them.
        retried: Attempts that failed and were made again, by reason.
    """

    connection: Connection
    retried: dict[str, int] = field(default_factory=dict)

    async def __aenter__(self) -> Teacher:
        settings = self.connection
        self._endpoints = [
            _Endpoint(
                openai.AsyncOpenAI(
                    base_url=url, api_key=settings.api_key or "none", timeout=settings.timeout, max_retries=0
                )
            )
            for url in settings.endpoints
        ]
        return self

    async def __aexit__(self, *error: object) -> None:
        for endpoint in self._endpoints:
            await endpoint.client.close()

    async def ask(self, request: dict[str, Any]) -> Answer:
        """Return the answer to a chat-completion request.

        Raises:
            RefusedError: When the server says that the request itself is at fault.
            FailedError: When no attempt was answered.
            InputError: When the key or the address is wrong, so that no request can be answered.
        """
        try:
            async for attempt in AsyncRetrying(
                retry=retry_if_exception(_passes),
                stop=stop_after_attempt(self.connection.attempts),
                wait=_wait,
                before_sleep=self._count,
                reraise=True,
            ):
                with attempt:
                    return await self._attempt(request)
        except openai.APIStatusError as error:
            if error.status_code in FATAL:
                remedy = FATAL[error.status_code].format(key=self.connection.key_variable)
                raise InputError(f"{error.request.url}: {_short(error)}; {remedy}") from error
            if _passes(error):
                raise FailedError(f"{error.request.url}: {_short(error)}") from error
            raise RefusedError(_short(error)) from error
        except openai.APIConnectionError as error:
            raise FailedError(f"{error.request.url}: {error.__cause__ or error}") from error
        except (NoAnswerError, TimeoutError) as error:
            raise FailedError(str(error) or f"no answer within {self.connection.timeout:g} seconds") from error
        raise AssertionError("tenacity ends with an answer or an error")

    async def _attempt(self, request: dict[str, Any]) -> Answer:
        now = time.monotonic()
        endpoint = min(self._endpoints, key=lambda one: (max(one.rests_until - now, 0), one.busy))
        if endpoint.asked_us_to_wait:  # and so did all others
            await asyncio.sleep(endpoint.rests_until - now)
        endpoint.busy += 1
        try:
            async with asyncio.timeout(self.connection.timeout):  # of the whole attempt, however slowly bytes arrive
                raw = await endpoint.client.chat.completions.with_raw_response.create(**request)
            return _answer(raw.content)
        except PASSING as error:
            if _passes(error):
                asked = _asked_wait(error)
                endpoint.rests_until = time.monotonic() + (REST if asked is None else asked)
                endpoint.waits = asked is not None
            raise
        finally:
            endpoint.busy -= 1

    def _count(self, state: RetryCallState) -> None:
        reason = _reason(state.outcome.exception()) if state.outcome else "unknown"
        self.retried[reason] = self.retried.get(reason, 0) + 1


def _answer(body: bytes) -> Answer:
    try:
        completion = _Completion.model_validate_json(body)
    except ValidationError as error:
        raise NoAnswerError(f"no answer but {body[:80]!r}") from error
    if completion.usage is None:
        raise InputError("the server does not say how many tokens it used (no usage in its answer): no budget can hold")
    choice, usage = completion.choices[0], completion.usage
    text, finish = choice.message.content or "", choice.finish_reason or "stop"
    return Answer(text, finish, usage.prompt_tokens, usage.completion_tokens)


def _passes(error: BaseException) -> bool:
    """Whether the same request may be answered later."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 425, 429) or error.status_code >= 500
    return isinstance(error, PASSING)


def _wait(state: RetryCallState) -> float:
    """Return seconds to wait: more with every attempt, drawn so that clients spread."""
    error = state.outcome.exception() if state.outcome else None
    if error is not None and _asked_wait(error) is not None:
        return random.uniform(0, FIRST_WAIT)  # the endpoint itself is passed over for as long as it asked
    return random.uniform(0, min(FIRST_WAIT * 2 ** (state.attempt_number - 1), LONGEST_WAIT))


def _asked_wait(error: BaseException) -> float | None:
    """Return the seconds that the server asked us to wait, None when it did not say."""
    asked = error.response.headers.get("retry-after", "") if isinstance(error, openai.APIStatusError) else ""
    return min(float(asked), LONGEST_WAIT) if re.fullmatch(r"\d+(\.\d+)?", asked) else None


def _reason(error: BaseException | None) -> str:
    if isinstance(error, openai.APIStatusError):
        return f"status {error.status_code}"
    if isinstance(error, openai.APITimeoutError | TimeoutError):
        return "timeout"
    return "connection" if isinstance(error, openai.APIConnectionError) else "no answer in the body"


def _short(error: openai.APIStatusError) -> str:
    """Return status and message of a server."""
    body = error.body if isinstance(error.body, dict) else {}
    message = str(body.get("message") or error.message).removeprefix(f"Error code: {error.status_code}")
    return " ".join(f"{error.status_code} {message}".split())[:300]
