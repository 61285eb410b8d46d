from __future__ import annotations

import asyncio
import time
from typing import Any

import openai
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field
from teacher_server import GARBAGE, HttpServer, answer, scripted

from gream_verl.core import openai_client
from gream_verl.core.errors import InputError
from gream_verl.core.openai_client import FailedError, RefusedError, Server, as_done

REQUEST = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "temperature": 0.0}


class Reply(BaseModel):
    choices: list[dict[str, Any]] = Field(min_length=1)
    usage: dict[str, int]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_client, "FIRST_WAIT", 0.002)
    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)


def ask(url: str, request: dict[str, Any] = REQUEST, **limits: Any) -> str:
    async def run() -> Reply:
        server = Server(url, **limits)
        async with server.client() as client:
            return await server.ask(client.chat.completions.with_raw_response.create, Reply, request)

    return str(asyncio.run(run()).choices[0]["message"]["content"])


def flaky(faults: list[Any]) -> HttpServer:
    """Return a server that shows the faults one after the other, then answers."""
    left = list(faults)
    return scripted(lambda body: left.pop(0) if left else answer("fine"))


def test_the_request_arrives_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret\n")
    with scripted(lambda body: answer("hi")) as server:
        assert ask(server.url, REQUEST | {"extra_body": {"top_k": 3}}, key_variable="MY_KEY") == "hi"
    assert server.requests == [REQUEST | {"top_k": 3}]
    assert server.keys == ["Bearer secret"]


def test_temporary_faults_are_asked_again() -> None:
    garbage = [web.Response(body=body, content_type="application/json") for body in GARBAGE]
    with flaky([web.Response(status=429), web.Response(status=503), None, *garbage]) as server:
        assert ask(server.url) == "fine"
    assert len(server.requests) == 4 + len(garbage)


def test_a_server_that_says_when_is_not_asked_sooner() -> None:
    with flaky([web.Response(status=429, headers={"Retry-After": "0.4"})]) as server:
        began = time.monotonic()
        ask(server.url)
        assert time.monotonic() - began >= 0.4


@pytest.mark.parametrize("fault", ["500", "garbage", "slow", "absent"])
def test_attempts_end(fault: str) -> None:
    async def reply(body: dict[str, Any]) -> web.Response:
        await asyncio.sleep(0.3 if fault == "slow" else 0)
        return web.Response(status=500) if fault == "500" else web.json_response({"choices": []})

    with HttpServer(reply) as server:
        url = "http://127.0.0.1:9/v1" if fault == "absent" else server.url
        with pytest.raises(FailedError, match=url):
            ask(url, attempts=3, timeout=0.1 if fault == "slow" else 5)
    assert len(server.requests) == (0 if fault == "absent" else 3)


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (400, RefusedError, "400.*longer than the model can read"),
        (401, InputError, "set the API key .* MY_KEY"),
        (403, InputError, "MY_KEY"),
        (404, InputError, "check the endpoint"),
    ],
)
def test_permanent_faults_are_not_asked_again(status: int, error: type[Exception], said: str) -> None:
    reply = {"error": {"message": "the prompt is longer than the model can read"}}
    with (
        scripted(lambda body: web.json_response(reply, status=status)) as server,
        pytest.raises(error, match=said),
    ):
        ask(server.url, key_variable="MY_KEY")
    assert len(server.requests) == 1


@pytest.mark.parametrize("url", ["127.0.0.1:8000/v1", "ftp://x", "", "http://", "http://x:port/v1"])
def test_an_endpoint_is_a_url(url: str) -> None:
    with pytest.raises(InputError, match="expected a URL"):
        Server(url).client()


def test_a_key_is_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "schlüssel")
    with pytest.raises(InputError, match="MY_KEY holds a character"):
        Server("http://[::1]:8000/v1", "MY_KEY").client()


@given(st.lists(st.integers(1, 3), max_size=12), st.integers(1, 5))
@settings(max_examples=12)
def test_every_job_is_done_once_and_only_so_many_at_a_time(turns: list[int], concurrency: int) -> None:
    running, drawn, most = 0, 0, 0

    async def work(turns: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        for _ in range(turns):
            await asyncio.sleep(0)
        running -= 1
        return -turns

    def jobs() -> Any:
        nonlocal drawn
        for turn in turns:
            drawn += 1
            assert drawn - len(done) <= concurrency
            yield turn

    async def run() -> None:
        async for pair in as_done(jobs(), work, concurrency):
            done.append(pair)

    done: list[tuple[int, int]] = []
    asyncio.run(run())
    assert sorted(done) == sorted((turn, -turn) for turn in turns)
    assert most == min(concurrency, len(turns))


def test_an_error_cancels_the_rest_after_the_results_that_are_there() -> None:
    cancelled, done = [], []

    async def work(job: str) -> str:
        if job == "bad":
            raise ValueError(job)
        try:
            await asyncio.sleep(0 if job == "good" else 60)
        except asyncio.CancelledError:
            cancelled.append(job)
            raise
        return job

    async def run() -> None:
        async for job, _ in as_done(["good", "slow", "bad"], work, 3):
            done.append(job)

    with pytest.raises(ValueError, match="bad"):
        asyncio.run(run())
    assert cancelled == ["slow"]
    assert set(done) <= {"good"}
