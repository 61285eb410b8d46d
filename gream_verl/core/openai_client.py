"""The one client of servers that speak the OpenAI API: the teacher and the evaluation ask through it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

from gream_verl.core.errors import InputError

if TYPE_CHECKING:
    import openai

Job = TypeVar("Job")
Done = TypeVar("Done")

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
        concurrency: Requests in flight at once.
        timeout: Seconds per attempt.
        attempts: Attempts per request; the client waits longer after each, and as long as Retry-After asks.

    Raises:
        InputError: When the endpoint is no URL, or the key holds a character that no key has.
    """

    endpoint: str
    key_variable: str = "OPENAI_API_KEY"
    concurrency: int = 32
    timeout: float = 120.0
    attempts: int = 8

    def __post_init__(self) -> None:
        if not _is_url(self.endpoint):
            raise InputError(f"--endpoint {self.endpoint!r}: expected a URL such as http://127.0.0.1:8000/v1")
        if not (self._key.isascii() and self._key.isprintable()):
            raise InputError(f"the API key in {self.key_variable} holds a character that no key has; set it again")

    @property
    def _key(self) -> str:
        return os.environ.get(self.key_variable, "").strip()

    def client(self) -> openai.AsyncOpenAI:
        """Return a client that retries rate limits, server errors, timeouts and lost connections by itself."""
        import openai

        return openai.AsyncOpenAI(
            base_url=self.endpoint, api_key=self._key or "none", timeout=self.timeout, max_retries=self.attempts - 1
        )

    def error(self, error: openai.APIError) -> InputError | RefusedError | FailedError:
        """Return the error to raise for one of the client's.

        Returns:
            ``InputError`` when no request can succeed, ``RefusedError`` when this one never will, else ``FailedError``.
        """
        import openai

        if not isinstance(error, openai.APIStatusError):
            return FailedError(f"{self.endpoint}: {error.__cause__ or error}")
        reason = " ".join(f"{error.status_code} {error.message}".split())[:300]
        if error.status_code in UNUSABLE:
            return InputError(f"{self.endpoint}: {reason}; {UNUSABLE[error.status_code].format(key=self.key_variable)}")
        temporary = error.status_code in (408, 409, 429) or error.status_code >= 500
        return FailedError(f"{self.endpoint}: {reason}") if temporary else RefusedError(reason)


async def as_done(
    jobs: Iterable[Job], work: Callable[[Job], Awaitable[Done]], concurrency: int
) -> AsyncIterator[tuple[Job, Done]]:
    """Run ``work`` on every job, at most ``concurrency`` at once, and yield results as they finish.

    Jobs are drawn only when there is room, so that a stream of millions takes no memory. An error cancels the rest.
    """
    running: dict[asyncio.Future[Done], Job] = {}
    waiting = iter(jobs)
    exhausted = False
    try:
        while True:
            while not exhausted and len(running) < concurrency:
                try:
                    job = next(waiting)
                except StopIteration:
                    exhausted = True
                else:
                    running[asyncio.ensure_future(work(job))] = job
            if not running:
                return
            finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for future in finished:
                yield running.pop(future), future.result()
    finally:
        for future in running:
            future.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:  # the port is no number
        return False
