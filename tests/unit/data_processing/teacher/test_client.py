from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web
from teacher_server import GARBAGE, Server, answer, scripted

from data_processing.teacher import client
from data_processing.teacher.client import Connection, FailedError, RefusedError, Teacher
from data_processing.teacher.store import Answer
from gream_verl.core.errors import InputError

REQUEST = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "temperature": 0.0}


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.02)


def ask(*urls: str, request: dict[str, Any] = REQUEST, **options: Any) -> tuple[Answer, dict[str, int]]:
    async def run() -> tuple[Answer, dict[str, int]]:
        async with Teacher(Connection(urls, **options)) as teacher:
            return await teacher.ask(request), teacher.retried

    return asyncio.run(run())


def flaky(faults: list[Any]) -> Server:
    """Return a server that shows the faults one after the other, then answers."""
    left = list(faults)
    return scripted(lambda body: left.pop(0) if left else answer("fine", prompt_tokens=7, completion_tokens=3))


def test_an_answer_has_text_end_and_tokens_and_the_request_arrives_as_it_is() -> None:
    with scripted(lambda body: answer("hi", "length", 12, 5)) as server:
        made, retried = ask(server.url, api_key="secret", request=REQUEST | {"extra_body": {"top_k": 3}})
    assert made == Answer("hi", "length", 12, 5)
    assert retried == {}
    assert server.requests == [REQUEST | {"top_k": 3}]
    assert server.keys == ["Bearer secret"]


def test_what_passes_is_asked_again() -> None:
    busy = [web.Response(status=429, headers={"Retry-After": "0"}), web.Response(status=503), None]
    garbage = [web.Response(body=body, content_type="application/json") for body in GARBAGE[:3]]
    with flaky([*busy, *garbage, web.Response(body=GARBAGE[0], content_type="text/html")]) as server:
        made, retried = ask(server.url)
    assert made == Answer("fine", "stop", 7, 3)
    assert len(server.requests) == 8
    assert retried == {"status 429": 1, "status 503": 1, "connection": 1, "no answer in the body": 4}


def test_a_server_that_says_when_is_not_asked_sooner() -> None:
    with flaky([web.Response(status=429, headers={"Retry-After": "0.4"})]) as server:
        began = asyncio.run(_clock())
        ask(server.url)
        assert asyncio.run(_clock()) - began >= 0.4


async def _clock() -> float:
    return asyncio.get_running_loop().time()


def test_an_answer_that_drips_is_given_up() -> None:
    async def drip(body: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(5)
        return answer("late")

    with Server(drip) as server, pytest.raises(FailedError, match=r"no answer within 0\.2 seconds"):
        ask(server.url, timeout=0.2, attempts=2)
    assert len(server.requests) == 2


def test_attempts_end() -> None:
    with (
        scripted(lambda body: web.Response(status=500)) as server,
        pytest.raises(FailedError, match=r"/v1/chat/completions: 500$"),
    ):
        ask(server.url, attempts=3)
    assert len(server.requests) == 3


def test_a_request_at_fault_is_refused_at_once_with_the_reason() -> None:
    reply = {"error": {"message": "the prompt is longer than the model can read"}}
    with (
        scripted(lambda body: web.json_response(reply, status=400)) as server,
        pytest.raises(RefusedError, match=r"400 .*longer than the model can read"),
    ):
        ask(server.url)
    assert len(server.requests) == 1


@pytest.mark.parametrize(("status", "remedy"), [(401, "MY_KEY"), (403, "MY_KEY"), (404, "--endpoint")])
def test_a_wrong_key_or_address_ends_everything(status: int, remedy: str) -> None:
    with (
        scripted(lambda body: web.Response(status=status)) as server,
        pytest.raises(InputError, match=remedy),
    ):
        ask(server.url, key_variable="MY_KEY")
    assert len(server.requests) == 1


def test_requests_spread_over_endpoints_and_pass_over_one_that_fails() -> None:
    async def slowly(body: dict[str, Any]) -> web.StreamResponse:
        await asyncio.sleep(0.05)
        return answer(json.dumps(body["messages"]))

    async def run(urls: list[str], count: int) -> None:
        async with Teacher(Connection(tuple(urls))) as teacher:
            await asyncio.gather(*(teacher.ask(REQUEST) for _ in range(count)))
            for _ in range(count):
                await teacher.ask(REQUEST)

    with Server(slowly) as first, Server(slowly) as second:
        asyncio.run(run([first.url, second.url], 10))
        assert len(first.requests) >= 5
        assert len(second.requests) >= 5
    with Server(slowly) as well, scripted(lambda body: web.Response(status=500)) as ill:
        asyncio.run(run([ill.url, well.url], 10))
        assert len(ill.requests) <= 6
        assert len(well.requests) == 20


def test_an_answer_may_be_empty_but_has_to_count_its_tokens() -> None:
    def reply(choice: dict[str, Any], **usage: int) -> web.Response:
        return web.json_response({"choices": [{"index": 0, **choice}], **({"usage": usage} if usage else {})})

    tokens = {"prompt_tokens": 9, "completion_tokens": 5}
    thought = {"message": {"role": "assistant", "content": None}, "finish_reason": "length"}
    with scripted(lambda body: reply(thought, **tokens)) as server:
        assert ask(server.url)[0] == Answer("", "length", 9, 5)
    with scripted(lambda body: reply({"message": {"content": "hi"}, "finish_reason": None}, **tokens)) as server:
        assert ask(server.url)[0] == Answer("hi", "stop", 9, 5)
    with scripted(lambda body: reply({"message": {"content": "hi"}})) as server:
        with pytest.raises(InputError, match="does not say how many tokens"):
            ask(server.url)
        assert len(server.requests) == 1


def test_another_endpoint_answers_while_one_asks_to_wait() -> None:
    busy = web.Response(status=429, headers={"Retry-After": "30"})
    with scripted(lambda body: busy) as first, scripted(lambda body: answer("fine")) as second:
        began = asyncio.run(_clock())
        assert ask(first.url, second.url)[0].text == "fine"
        assert asyncio.run(_clock()) - began < 10
    assert (len(first.requests), len(second.requests)) == (1, 1)


def test_a_server_that_is_not_there_is_named_with_the_reason() -> None:
    with pytest.raises(FailedError, match=r"http://127\.0\.0\.1:9/v1/chat/completions: .*"):
        ask("http://127.0.0.1:9/v1", attempts=1)


@pytest.mark.parametrize("url", ["127.0.0.1:8000/v1", "ftp://x", "", "http://127.0.0.1:99999/v1", "http://"])
def test_an_endpoint_is_a_url(url: str) -> None:
    with pytest.raises(InputError, match="expected a URL"):
        Connection((url,))
    with pytest.raises(InputError, match="--endpoint"):
        Connection(())
    with pytest.raises(InputError, match="MY_KEY holds a letter"):
        Connection(("http://x",), "MY_KEY", "schlüssel")
