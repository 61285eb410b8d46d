"""Real HTTP servers for tests of clients: one answers by a script, one puts faults before another server."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import ClientSession, web

GARBAGE = (
    b"<html><body>Bad gateway</body></html>",
    b'{"choices": [{"message": {"role": "assistant", "content": "FAULT half of an ans',
    b'{"error": "FAULT"}',
    b'{"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 0}}',
)
Reply = web.StreamResponse | None
"""None: the connection is reset."""


def answer(text: str, finish: str = "stop", prompt_tokens: int = 10, completion_tokens: int = 5) -> web.Response:
    """Return a chat completion."""
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    return web.json_response({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage})


class HttpServer:
    """An HTTP server on loopback, in a thread.

    Args:
        handle: Returns the reply to the JSON body of a request; may wait.
        close: Called when the server stops.
    """

    def __init__(
        self,
        handle: Callable[[dict[str, Any]], Awaitable[Reply]],
        close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._handle = handle
        self._close = close
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    def __enter__(self) -> HttpServer:
        self._thread.start()
        self.url = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(30)
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()

    async def _start(self) -> str:
        app = web.Application(client_max_size=1 << 24)
        app.router.add_post("/v1/chat/completions", self._reply)
        self._runner = web.AppRunner(app, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    async def _stop(self) -> None:
        await self._runner.cleanup()
        if self._close:
            await self._close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _reply(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.requests.append(body)
        self.keys.append(request.headers.get("Authorization"))
        reply = await self._handle(body)
        if reply is None:
            assert request.transport is not None
            request.transport.abort()
            raise web.HTTPInternalServerError
        return reply


def scripted(script: Callable[[dict[str, Any]], Reply]) -> HttpServer:
    """Return a server whose replies a function writes."""

    async def handle(body: dict[str, Any]) -> Reply:
        return script(body)

    return HttpServer(handle)


class FaultyProxy:
    """Puts faults before another server: 429, 500, resets, slow answers, bodies that are no answer.

    Args:
        upstream: Base URL of the server.
        share: Share of requests with a fault.
        slow: Seconds that a slow answer takes.
        seed: Draws the faults.

    Attributes:
        delivered: How often each request, by the hash of its body, got the upstream's answer.
        faults: How many faults of each kind there were.
    """

    def __init__(self, upstream: str, *, share: float, slow: float, seed: int) -> None:
        self.upstream, self.share, self.slow = upstream, share, slow
        self.delivered: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._session: ClientSession | None = None
        self.server = HttpServer(self._handle, self._close)

    async def _handle(self, body: dict[str, Any]) -> Reply:
        if self._random.random() < self.share:
            fault = self._random.choices(("429", "500", "reset", "garbage", "slow"), (4, 3, 3, 3, 0.3))[0]
            self.faults[fault] += 1
            if fault == "429":
                return web.Response(status=429, headers={"Retry-After": "0.1"}, text="{}")
            if fault == "500":
                return web.Response(status=500, text="oops")
            if fault == "reset":
                return None
            if fault == "garbage":
                return web.Response(body=self._random.choice(GARBAGE), content_type="application/json")
            await asyncio.sleep(self.slow)
        if self._session is None:
            self._session = ClientSession()
        async with self._session.post(f"{self.upstream}/chat/completions", json=body) as response:
            content, status = await response.read(), response.status
        if status == 200:
            self.delivered[hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()] += 1
        return web.Response(body=content, status=status, content_type="application/json")

    async def _close(self) -> None:
        if self._session is not None:
            await self._session.close()
