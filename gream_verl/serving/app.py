"""The recommender over HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.middleware.trustedhost import TrustedHostMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gream_verl.core.openai_client import as_done
from gream_verl.serving.forms import (
    BatchRequest,
    KnownItem,
    KnownUser,
    Recommendations,
    RecommendRequest,
    ReloadRequest,
    Scored,
    ScoreRequest,
    Subject,
    known,
)  # fmt: skip
from gream_verl.serving.leaving import unless_gone
from gream_verl.serving.openai_shape import openai_routes
from gream_verl.serving.service import RefusedError, Service
from gream_verl.serving.settings import MOST_BYTES

BEARER = HTTPBearer(auto_error=False)  # describes the token, for which the gate asks
NO_TOKEN = "give the token as `Authorization: Bearer TOKEN`"
REQUEST_ID = re.compile("[!#-~]{1,64}")
REFUSED: dict[int | str, dict[str, Any]] = {code: {} for code in (400, 404, 429, 504)}
log = logging.getLogger("gream.serve")


class Gate:
    """Refuse requests without the token and large bodies, unread; count and log every request."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._metrics, self._is_token = app, service.metrics, service.is_token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, headers, status = time.perf_counter(), dict(scope["headers"]), 499  # the client went away
        state = scope.setdefault("state", {})
        given_id = headers.get(b"x-request-id", b"").decode("latin-1")  # a proxy's
        state |= {"request_id": given_id if REQUEST_ID.fullmatch(given_id) else uuid.uuid4().hex, "log": {}}

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", state["request_id"].encode())]
            await send(message)

        length = headers.get(b"content-length", b"")
        is_short = length.isdigit() and len(length) < 12 and int(length) <= MOST_BYTES
        too_large = scope["method"] in ("POST", "PUT", "PATCH") and (not is_short or b"transfer-encoding" in headers)
        app: ASGIApp = self._app
        if scope["path"].removeprefix(scope.get("root_path", "")).startswith(("/v1/", "/admin/")):  # as it is routed
            scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
            if not self._is_token(token if scheme.lower() == b"bearer" else b""):
                app = JSONResponse({"detail": NO_TOKEN}, 401, {"WWW-Authenticate": "Bearer"})
            elif too_large:
                app = JSONResponse({"detail": f"a body of at most {MOST_BYTES:,} bytes, with its Content-Length"}, 413)
        try:
            await app(scope, receive, sending)
        except Exception:
            status = 500 if status == 499 else status
            raise
        finally:
            path = getattr(scope.get("route"), "path", "other")
            seconds = time.perf_counter() - start
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(seconds)
            line = {"time": round(time.time(), 3), "request_id": state["request_id"], "method": scope["method"]}
            line |= {"path": path, "status": status, "milliseconds": round(1000 * seconds, 2), **state["log"]}
            log.info(json.dumps(line))


def create_app(service: Service) -> FastAPI:
    """Return the application; its shutdown answers what waits."""
    settings = service.settings

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await service.close()

    app = FastAPI(title="gream-verl", lifespan=lifespan)
    secured: dict[str, Any] = {"dependencies": [Depends(BEARER)], "responses": {401: {"description": "No token"}}}
    private, admin = APIRouter(prefix="/v1", **secured), APIRouter(prefix="/admin", **secured)
    if settings.hosts is not None:  # a page elsewhere must not reach this machine under another name
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(settings.hosts))
    app.add_middleware(Gate, service=service)
    if settings.cors:  # outside the gate: a page must be able to read its refusals
        open_to: dict[str, Any] = {"allow_origins": settings.cors, "allow_headers": ["*"], "allow_methods": ["*"]}
        app.add_middleware(CORSMiddleware, **open_to, expose_headers=["Retry-After", "X-Request-ID"])

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: Exception) -> Response:
        """Say what is wrong without the input, which may hold what JSON cannot: halves of surrogates, NaN."""
        assert isinstance(error, RequestValidationError)
        faults = [{"loc": list(map(str, one["loc"])), "msg": one["msg"], "type": one["type"]} for one in error.errors()]
        return Response(json.dumps({"detail": faults}), 422, media_type="application/json")

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, RefusedError)
        headers = {"Retry-After": "1"} if error.status == 429 else None
        return Response(json.dumps({"detail": error.reason}), error.status, headers, "application/json")

    @private.post("/recommend", responses=REFUSED)
    async def recommend(given: RecommendRequest, request: Request) -> Recommendations:
        """Recommend the next items."""
        state = request.state
        state.log = {"mode": given.mode, "k": given.k, "model": given.model, "user": given.user}
        if settings.log_histories:
            state.log["history"] = given.history
        answer = await unless_gone(request, service.recommend(given, request_id=state.request_id))
        state.log |= {"fallback": answer.fallback, "unknown": len(answer.unknown), "parts": answer.milliseconds}
        return answer

    @private.post("/batch", response_class=StreamingResponse)
    async def batch(given: BatchRequest) -> StreamingResponse:
        """Answer many questions: a line of JSON for each, with its place among the requests, as it is done."""

        async def one(number: int) -> dict[str, Any]:
            while True:
                try:
                    return (await service.recommend(given.requests[number])).model_dump()
                except RefusedError as error:
                    if error.status != 429:
                        return {"error": error.reason, "status": error.status}
                    await asyncio.sleep(0.05)  # others wait; there is no client to ask again
                except Exception:  # of any kind: the others are answered
                    log.exception("a question of a batch failed")
                    return {"error": "internal error", "status": 500}

        async def lines() -> AsyncIterator[str]:
            async for number, answer in as_done(range(len(given.requests)), one, settings.batch):
                yield json.dumps({"request": number, **answer}) + "\n"

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    @private.post("/score", responses=REFUSED)
    async def score(given: ScoreRequest, request: Request) -> Scored:
        """Score and rank given items."""
        return await unless_gone(request, service.score(given))

    @private.get("/items")
    def search(
        q: Annotated[str, Query(max_length=200)], limit: Annotated[int, Query(ge=1, le=100)] = 20
    ) -> list[KnownItem]:
        """Search items by a part of their titles, the most popular first."""
        catalogue = service.bundle(None).recommender.catalogue
        return [known(item, catalogue) for item in catalogue.search(q, limit)]

    @private.get("/items/{item:path}", responses=REFUSED)
    def look_up_item(item: str) -> KnownItem:
        """Return what is known of an item."""
        catalogue = service.bundle(None).recommender.catalogue
        if item not in catalogue.index.sids:
            raise RefusedError(404, f"no item {item!r}")
        return known(item, catalogue)

    @private.get("/users/{user:path}", responses=REFUSED)
    def look_up_user(user: str) -> KnownUser:
        """Return the history of a user of the data set."""
        bundle = service.bundle(None)
        catalogue = bundle.recommender.catalogue
        items = bundle.recommender.known(service.history_of(Subject(user=user), bundle))[0]
        return KnownUser(id=user, history=[known(item, catalogue) for item in items])

    @admin.post("/reload", responses={**REFUSED, 409: {"description": "A bad checkpoint; the old one goes on"}})
    async def reload(given: ReloadRequest) -> dict[str, Any]:
        """Load a checkpoint, the index and the texts again; no request is dropped."""
        path, root = None, service.run.root.resolve()
        if given.checkpoint is not None:
            path = service.run.root / given.checkpoint.replace("\0", "")
            if not path.resolve().is_relative_to(root):
                raise RefusedError(400, "give a checkpoint inside the run, such as srpo or srpo/global_step_24")
        old, new = await service.reload(given.model, path)
        return {"old": old, "new": new}

    @admin.post("/rollback", responses={**REFUSED, 409: {"description": "Nothing was reloaded"}})
    async def roll_back(given: ReloadRequest) -> dict[str, Any]:
        """Take up what answered before the last reload."""
        old, new = await service.roll_back(given.model)
        return {"old": old, "new": new}

    @app.get("/health")
    def health() -> dict[str, Any]:
        """Say that the process lives and which models answer."""
        models = {name: dict(service.versions(bundle)) for name, bundle in service.bundles.items()}
        return {"status": "ok", "models": models}

    @app.get("/ready", responses={503: {"description": "Not every mode answers"}})
    async def ready() -> Response:
        """Say whether every mode answers now."""
        is_ready = await service.is_ready()
        return JSONResponse({"ready": is_ready}, 200 if is_ready else 503)

    @app.get("/metrics", include_in_schema=False)
    def read_metrics() -> Response:
        return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    private.include_router(openai_routes(service))
    app.include_router(private)
    app.include_router(admin)
    if settings.page:
        from gream_verl.serving.page import add_page

        add_page(app, service)
    return app
