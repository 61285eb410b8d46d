"""The OpenAI shape of the service: models are checkpoint and mode, choices are items."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from pydantic import BaseModel, Field, ValidationError

from gream_verl.core.semantic_ids import find_sids
from gream_verl.serving.forms import MOST_HISTORY, MOST_K, Recommendations, RecommendRequest, ServedMode
from gream_verl.serving.leaving import unless_gone
from gream_verl.serving.service import RefusedError, Service

MODES: tuple[ServedMode, ...] = ("direct", "reasoning", "merged")


class Turn(BaseModel):
    """A message of the conversation; only the last one of the user counts."""

    role: str
    content: str | list[dict[str, Any]] = Field(max_length=200_000)

    @property
    def text(self) -> str:
        """The content, or the texts of its parts."""
        parts = [{"text": self.content}] if isinstance(self.content, str) else self.content
        return "".join(str(part.get("text", "")) for part in parts)


class ChatRequest(BaseModel):
    """What an OpenAI client sends; what it sends besides is passed over."""

    model: str = Field(max_length=200)
    messages: list[Turn] = Field(min_length=1, max_length=100)
    n: int | None = Field(default=10, ge=1, le=MOST_K)
    stream: bool | None = False


def openai_routes(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter()

    def question(given: ChatRequest) -> RecommendRequest:
        """Return the question: the last message of the user is JSON as for /v1/recommend, or holds semantic IDs."""
        name, _, mode = given.model.rpartition("-")
        if name not in service.bundles or mode not in MODES:
            raise RefusedError(404, f"no model {given.model!r}; GET /v1/models lists them")
        content = next((turn.text for turn in reversed(given.messages) if turn.role == "user"), "")
        if content.lstrip().startswith("{"):
            try:
                asked = json.loads(content)
                return RecommendRequest(**{"k": given.n or 10, **asked, "model": name, "mode": mode})
            except (ValueError, RecursionError) as error:
                kinds = error.errors()[0]["msg"] if isinstance(error, ValidationError) else "not JSON"
                raise RefusedError(400, f"the message of the user: {kinds}") from error
        items = service.bundle(name).recommender.index.items
        history = [items[sid] for sid in find_sids(content) if sid in items]
        return RecommendRequest(history=history[-MOST_HISTORY:], k=given.n or 10, model=name, mode=mode)

    @router.get("/models")
    def models() -> dict[str, Any]:
        """List each served checkpoint in each of its modes."""
        rows = [
            {"id": f"{name}-{mode}", "object": "model", "created": 0, "owned_by": "gream-verl"}
            for name, bundle in service.bundles.items()
            for mode in (MODES if bundle.thinker else MODES[:1])
        ]
        return {"object": "list", "data": rows}

    @router.post("/chat/completions", response_model=None)
    async def complete(given: ChatRequest, request: Request) -> Response:
        """Return n items as choices, or stream the chain and then the items."""
        asked = question(given)
        asked.explain = asked.mode != "direct"
        service.checked(asked)  # a stream has its status before its first word
        shared = {"id": f"chatcmpl-{request.state.request_id}", "created": int(time.time()), "model": given.model}
        if not given.stream:
            answer = await unless_gone(request, service.recommend(asked, request_id=request.state.request_id))
            thought = "\n\n".join(chain.text for chain in answer.chains)
            choices = [
                {"index": item["index"], "finish_reason": "stop", "logprobs": None,
                 "message": {"role": "assistant", "reasoning_content": thought or None, **item["delta"]}}
                for item in _choices(answer)
            ]  # fmt: skip
            usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
            return JSONResponse(
                {**shared, "object": "chat.completion", "choices": choices, "usage": usage, "gream": _about(answer)}
            )

        async def events() -> AsyncIterator[str]:
            pieces: asyncio.Queue[tuple[int, str] | None] = asyncio.Queue()
            answering = asyncio.ensure_future(
                service.recommend(asked, lambda chain, text: pieces.put_nowait((chain, text)))
            )
            answering.add_done_callback(lambda _: pieces.put_nowait(None))
            chunk = {**shared, "object": "chat.completion.chunk"}
            try:
                while (piece := await pieces.get()) is not None:
                    if piece[0] == 0:  # the first chain alone is shown as it is written
                        delta = {"role": "assistant", "reasoning_content": piece[1]}
                        yield _event({**chunk, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
                try:
                    answer = await answering
                except RefusedError as error:
                    yield _event({"error": {"message": error.reason, "code": error.status}})
                    return
                for item in _choices(answer):
                    yield _event({**chunk, "choices": [{**item, "finish_reason": "stop"}], "gream": _about(answer)})
                yield "data: [DONE]\n\n"
            finally:
                answering.cancel()

        return StreamingResponse(events(), media_type="text/event-stream")

    return router


def _choices(answer: Recommendations) -> list[dict[str, Any]]:
    return [
        {"index": item.rank - 1, "delta": {"content": item.title, "item": item.model_dump(exclude={"path"})}}
        for item in answer.items
    ]


def _about(answer: Recommendations) -> dict[str, Any]:
    """Return what the OpenAI shape has no place for."""
    return answer.model_dump(include={"fallback", "shortage", "unknown", "milliseconds", "model", "index", "settings"})


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"
