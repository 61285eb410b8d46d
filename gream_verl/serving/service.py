"""The recommender as an HTTP service."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from queue import Full
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, model_validator

from gream_verl.core.errors import InputError
from gream_verl.serving.batcher import Batcher
from gream_verl.serving.recommender import Answer, Ask, Recommender

MOST_HISTORY, MOST_ITEMS, MOST_K, MOST_BYTES = 1000, 10_000, 100, 1 << 20
BEARER = HTTPBearer(auto_error=False)
UNKNOWN: dict[str, Any] = {"description": "Unknown"}
Id = Annotated[str, Field(min_length=1, max_length=200)]


class Settings(BaseModel):
    """Settings of a service.

    Attributes:
        batch: Most questions computed at once.
        window: Seconds that a lonely question waits for others.
        queue: Most questions that wait; the next one is refused (429).
        timeout: Seconds after which a request is given up (504).
        token: What a client must send as ``Authorization: Bearer TOKEN``; None asks for nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: int = Field(default=32, ge=1)
    window: float = Field(default=0.002, ge=0)
    queue: int = Field(default=256, ge=1)
    timeout: float = Field(default=30.0, gt=0)
    token: str | None = None


class Subject(BaseModel):
    """For whom: a history of item ids, oldest first, or a user of the data set."""

    model_config = ConfigDict(extra="forbid")

    history: list[Id] | None = Field(default=None, max_length=MOST_HISTORY)
    user: Id | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Subject:
        if (self.history is None) == (self.user is None):
            raise ValueError("give history or user, one of both")
        return self


class RecommendRequest(Subject):
    """A question for the next items."""

    k: int = Field(default=10, ge=1, le=MOST_K, strict=True)
    exclude: list[Id] = Field(default=[], max_length=MOST_ITEMS)
    allow: list[Id] | None = Field(default=None, max_length=MOST_ITEMS, description="Only these items.")
    categories: list[Id] | None = Field(default=None, max_length=100, description="Only items in one of these.")


class ScoreRequest(Subject):
    """Items to score for a history."""

    items: list[Id] = Field(min_length=1, max_length=MOST_K)


class ScoredItem(BaseModel):
    """An item of an answer; the score is a log-probability in nats, of a fallback a number of interactions."""

    rank: int
    id: str
    title: str
    sid: str
    score: float


class Scored(BaseModel):
    """Items with scores, the best first."""

    items: list[ScoredItem]
    unknown: list[str] = Field(
        description="Ids of the history, or of the items to score, that the index does not hold."
    )
    model: str
    index: str


class Recommendations(Scored):
    """The answer to a question for the next items."""

    fallback: str = Field(description="Why the model did not answer, empty where it did.")
    shortage: str = Field(description="Why there are fewer items than asked for, empty where there are enough.")
    request_id: str
    milliseconds: float


class KnownItem(BaseModel):
    """What is known of an item."""

    id: str
    title: str
    description: str
    brand: str
    categories: list[str]
    sid: str


class KnownUser(BaseModel):
    """A user of the data set, and the items before the one that is held out for the test."""

    id: str
    history: list[KnownItem]


class Metrics:
    """What Prometheus reads."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("gream_requests", "Requests", ["path", "status"], registry=registry)
        self.seconds = Histogram("gream_request_seconds", "Latency", ["path"], registry=registry)
        self.batches = Histogram("gream_batch_size", "Batches", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry)
        self.fallbacks = Counter("gream_fallbacks", "Answers that are not the model's", registry=registry)
        self.queue = Gauge("gream_queue", "Questions that wait", registry=registry)


def create_app(recommender: Recommender, settings: Settings | None = None) -> FastAPI:
    """Return the application; its shutdown answers what waits."""
    settings, metrics = settings or Settings(), Metrics()
    batcher: Batcher[Ask, Answer] = Batcher(
        recommender.recommend, most=settings.batch, window=settings.window, queue=settings.queue,
        observe=metrics.batches.observe,
    )  # fmt: skip
    metrics.queue.set_function(batcher.waiting.qsize)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(batcher.close)

    def authorised(given: Annotated[HTTPAuthorizationCredentials | None, Depends(BEARER)]) -> None:
        token = (given.credentials if given else "").encode("latin-1")  # the bytes that came: headers are read so
        if settings.token is not None and not hmac.compare_digest(token, settings.token.encode()):
            raise HTTPException(401, "give the token as `Authorization: Bearer TOKEN`", {"WWW-Authenticate": "Bearer"})

    app = FastAPI(title="gream-verl", lifespan=lifespan)
    index, texts = recommender.index, recommender.texts
    private = APIRouter(prefix="/v1", dependencies=[Depends(authorised)], responses={401: {"description": "No token"}})

    @app.exception_handler(RequestValidationError)
    async def refused(_: Request, error: Exception) -> Response:
        """Say what is wrong without the input, which may hold what JSON cannot: halves of surrogates, NaN."""
        assert isinstance(error, RequestValidationError)
        faults = [{"loc": list(map(str, one["loc"])), "msg": one["msg"]} for one in error.errors()]
        return Response(json.dumps({"detail": faults}), 422, media_type="application/json")

    @app.middleware("http")
    async def measured(request: Request, proceed: Callable[[Request], Awaitable[Response]]) -> Response:
        start, length = time.perf_counter(), request.headers.get("content-length", "")
        if request.method == "POST" and not (length.isdecimal() and int(length) <= MOST_BYTES):
            response = Response(f"a body of at most {MOST_BYTES:,} bytes, with its Content-Length", 413)
        else:
            response = await proceed(request)
        path = getattr(request.scope.get("route"), "path", "other")
        metrics.requests.labels(path, str(response.status_code)).inc()
        metrics.seconds.labels(path).observe(time.perf_counter() - start)
        return response

    def history_of(subject: Subject) -> list[str]:
        if subject.user is None:
            return subject.history or []
        if subject.user not in recommender.histories:
            raise HTTPException(404, f"no user {subject.user!r}")
        return recommender.histories[subject.user]

    def known(item: str) -> KnownItem:
        text = texts[item]
        categories = list(text.categories)
        described = {"title": text.title, "description": text.description, "brand": text.brand}
        return KnownItem(id=item, sid=index.text(item), categories=categories, **described)

    def listed(scores: dict[str, float]) -> list[ScoredItem]:
        return [
            ScoredItem(rank=rank, id=item, title=texts[item].title, sid=index.text(item), score=round(score, 5))
            for rank, (item, score) in enumerate(scores.items(), 1)
        ]

    @private.post(
        "/recommend", responses={404: UNKNOWN, 429: {"description": "Busy"}, 504: {"description": "Too slow"}}
    )
    async def recommend(given: RecommendRequest) -> Recommendations:
        """Recommend the next items."""
        start = time.perf_counter()
        allow = None if given.allow is None else frozenset(given.allow)
        if given.categories is not None:
            some = recommender.in_categories(given.categories)
            allow = some if allow is None else allow & some
        ask = Ask(tuple(history_of(given)), given.k, frozenset(given.exclude), allow)
        try:
            answer = await asyncio.wait_for(asyncio.wrap_future(batcher.submit(ask)), settings.timeout)
        except Full:
            raise HTTPException(429, "too many requests wait", {"Retry-After": "1"}) from None
        except TimeoutError:
            raise HTTPException(504, f"no answer within {settings.timeout:g} s") from None
        metrics.fallbacks.inc(bool(answer.fallback))
        return Recommendations(
            items=listed(answer.scores), unknown=list(answer.unknown), fallback=answer.fallback,
            shortage=answer.shortage, request_id=uuid.uuid4().hex,
            milliseconds=round(1000 * (time.perf_counter() - start), 2), **recommender.version,
        )  # fmt: skip

    @private.post("/score", responses={404: UNKNOWN})
    def score(given: ScoreRequest) -> Scored:
        """Score and rank given items."""
        items = [item for item in dict.fromkeys(given.items) if item in index.sids]
        try:
            scores = recommender.score(history_of(given), items)
        except InputError as error:
            raise HTTPException(404, str(error)) from error
        unknown = [item for item in given.items if item not in index.sids]
        return Scored(items=listed(scores), unknown=unknown, **recommender.version)

    @private.get("/items")
    def search(
        q: Annotated[str, Query(max_length=200)], limit: Annotated[int, Query(ge=1, le=100)] = 20
    ) -> list[KnownItem]:
        """Search items by a part of their titles, the most popular first."""
        wanted = q.casefold()
        found = (item for item in recommender.popularity if wanted in texts[item].title.casefold())
        return [known(item) for item, _ in zip(found, range(limit), strict=False)]

    @private.get("/items/{item}", responses={404: UNKNOWN})
    def look_up_item(item: str) -> KnownItem:
        """Return what is known of an item."""
        if item not in index.sids:
            raise HTTPException(404, f"no item {item!r}")
        return known(item)

    @private.get("/users/{user}", responses={404: UNKNOWN})
    def look_up_user(user: str) -> KnownUser:
        """Return the history of a user of the data set."""
        return KnownUser(
            id=user, history=[known(item) for item in history_of(Subject(user=user)) if item in index.sids]
        )

    @app.get("/health")
    def health() -> dict[str, str]:
        """Say that the process lives and which model answers."""
        return {"status": "ok", **recommender.version}

    @app.get("/metrics", include_in_schema=False)
    def read_metrics() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    app.include_router(private)
    return app
