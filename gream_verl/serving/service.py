"""The served models: questions in, recommendations out, and other checkpoints taken up while they go on."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
import uuid
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import Full
from typing import Any, TypeVar

from gream_verl.core.errors import InputError
from gream_verl.core.run_folder import RunFolder
from gream_verl.decoding.chains import in_turn
from gream_verl.serving.batcher import Batcher
from gream_verl.serving.forms import (
    Recommendations,
    RecommendRequest,
    Scored,
    ScoreRequest,
    Subject,
    Versions,
    listed,
    read_chain,
)  # fmt: skip
from gream_verl.serving.recommender import Answer, Ask, Recommender
from gream_verl.serving.settings import Metrics, Settings
from gream_verl.serving.thinker import ServerThinker, Thinker, ThinkingError, ThinkingOptions, VllmThinker

Result = TypeVar("Result")
Write = Callable[[int, str], object]
"""Receives the number of a chain and the text added to it."""


class RefusedError(Exception):
    """A question that gets no answer.

    Args:
        status: Its HTTP status.
        reason: Why, in a sentence.
    """

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class Bundle:
    """A checkpoint that answers: the recommender, its queue, and the engine of its chains; open while it has users."""

    def __init__(
        self, path: Path, recommender: Recommender, thinker: Thinker | None, settings: Settings, metrics: Metrics
    ) -> None:
        self.path, self.recommender, self.thinker, self.users = path, recommender, thinker, 0
        sizes: dict[str, Any] = {"most": settings.batch, "window": settings.window, "queue": settings.queue}
        self.batcher = Batcher(recommender.recommend, observe=metrics.batches.observe, **sizes)
        self.scorer = Batcher(recommender.score, **sizes)

    async def close(self) -> None:
        """Answer those who use it, then end its threads and processes."""
        while self.users:
            await asyncio.sleep(0.02)
        for batcher in (self.batcher, self.scorer):
            await asyncio.to_thread(batcher.close)
        if self.thinker is not None:
            await self.thinker.close()


class Service:
    """Answer from the checkpoints of a run.

    Args:
        run: The run.
        checkpoints: Hugging Face folders, or verl's folders of checkpoints; None for the newest of the run.
        settings: The settings.

    Attributes:
        bundles: The served checkpoints by name, the default one first.
    """

    def __init__(
        self, run: RunFolder, checkpoints: Sequence[Path] | None = None, settings: Settings | None = None
    ) -> None:
        self.run, self.settings, self.metrics = run, settings or Settings(), Metrics()
        paths = list(checkpoints or [run.trained])
        if len({path.name for path in paths}) < len(paths):
            raise InputError(f"{', '.join(map(str, paths))}: two with one name; give one of them another name")
        self.bundles = {path.name: self._load(path) for path in paths}
        self._previous: dict[str, Bundle] = {}
        self._reloading = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()
        kept = self.settings.model_dump(include={"chains", "reasoning", "endpoint", "served_model"})
        self._version = hashlib.sha256(repr(sorted(kept.items())).encode()).hexdigest()[:12]
        self.metrics.queue.set_function(lambda: sum(some.batcher.waiting.qsize() for some in self.bundles.values()))
        for found in ("kept", "made"):
            self.metrics.trees.labels(found).set_function(partial(self._trees, found))

    def _load(self, path: Path) -> Bundle:
        settings = self.settings
        thinking = ThinkingOptions(chains=settings.chains, at_once=settings.batch, gpu_share=settings.gpu_share)
        recommender = Recommender(self.run, path, settings.batch)
        recommender.check()
        thinker: Thinker | None = None
        if settings.endpoint:
            thinker = ServerThinker(settings.endpoint, settings.served_model, thinking, recommender.tokenizer)
        elif settings.reasoning:
            thinker = VllmThinker(recommender.folder, thinking, recommender.model.config.max_position_embeddings)
        return Bundle(path, recommender, thinker, settings, self.metrics)

    def bundle(self, name: str | None) -> Bundle:
        """Return a served checkpoint, the default one without a name."""
        return self.bundles[self._name(name)]

    def versions(self, bundle: Bundle) -> Versions:
        """Return what answers."""
        return Versions(**bundle.recommender.version, settings=self._version)

    def is_token(self, given: bytes) -> bool:
        """Return whether a client may ask, in a time that says nothing about the token."""
        wanted = self.settings.token
        return wanted is None or hmac.compare_digest(given, wanted.encode())

    async def is_ready(self) -> bool:
        """Return whether every checkpoint can answer in every mode; a dead engine is started again meanwhile."""
        thinkers = [bundle.thinker for bundle in self.bundles.values() if bundle.thinker is not None]
        return all([await thinker.wake() for thinker in thinkers])

    def history_of(self, subject: Subject, bundle: Bundle) -> list[str]:
        """Return the history of a request."""
        if subject.user is None:
            return subject.history or []
        histories = bundle.recommender.catalogue.histories
        if subject.user not in histories:
            raise RefusedError(404, f"no user {subject.user!r}")
        return histories[subject.user]

    async def recommend(
        self, given: RecommendRequest, write: Write = lambda chain, text: None, request_id: str = ""
    ) -> Recommendations:
        """Answer a question.

        Args:
            given: The question.
            write: Receives the chains as they are written.
            request_id: Comes back in the answer.

        Raises:
            RefusedError: When there is no answer.
        """
        start, bundle = time.perf_counter(), self.checked(given)
        catalogue = bundle.recommender.catalogue
        allow = None if given.allow is None else frozenset(given.allow)
        if given.categories is not None:
            some = catalogue.in_categories(given.categories)
            allow = some if allow is None else allow & some
        ask = Ask(tuple(self.history_of(given, bundle)), given.k, frozenset(given.exclude), allow)
        seconds: dict[str, float] = {}
        async with self._limited(bundle):
            answer, chains = await self._answer(bundle, ask, given, write, seconds)
        seconds["total"] = time.perf_counter() - start
        for part, taken in seconds.items():
            self.metrics.parts.labels(part).observe(taken)
        self.metrics.fallbacks.inc(bool(answer.fallback))
        return Recommendations(
            items=listed(answer.scores, catalogue, given.explain), unknown=list(answer.unknown),
            fallback=answer.fallback, shortage=answer.shortage, mode=given.mode,
            chains=[read_chain(chain, catalogue) for chain in chains] if given.explain else [],
            request_id=request_id or uuid.uuid4().hex,
            milliseconds={part: round(1000 * taken, 2) for part, taken in seconds.items()},
            **dict(self.versions(bundle)),
        )  # fmt: skip

    async def score(self, given: ScoreRequest) -> Scored:
        """Score given items.

        Raises:
            RefusedError: When there is no answer.
        """
        bundle = self.bundle(given.model)
        recommender, history = bundle.recommender, self.history_of(given, bundle)
        known, unknown = recommender.known(history)
        if not known:
            raise RefusedError(404, "no item of the history is known")
        items, others = recommender.known(given.items)
        async with self._limited(bundle):
            future = bundle.scorer.submit((tuple(known), tuple(dict.fromkeys(items))))
            scores = await asyncio.wrap_future(future)
        return Scored(
            items=listed(scores, recommender.catalogue), unknown=[*unknown, *others], **dict(self.versions(bundle))
        )

    def checked(self, given: RecommendRequest) -> Bundle:
        """Return what answers a question; raise RefusedError for what cannot be answered."""
        bundle = self.bundle(given.model)
        self.history_of(given, bundle)
        if given.mode != "direct" and bundle.thinker is None:
            raise RefusedError(400, "this service does not think; start it with --reasoning or --endpoint")
        return bundle

    @asynccontextmanager
    async def _limited(self, bundle: Bundle) -> AsyncIterator[None]:
        """Keep a bundle open, for as long as a request may take."""
        bundle.users += 1
        try:
            async with asyncio.timeout(self.settings.timeout):
                yield
        except Full:
            raise RefusedError(429, "too many requests wait") from None
        except TimeoutError:
            raise RefusedError(504, f"no answer within {self.settings.timeout:g} s") from None
        finally:
            bundle.users -= 1

    async def _answer(
        self, bundle: Bundle, ask: Ask, given: RecommendRequest, write: Write, seconds: dict[str, float]
    ) -> tuple[Answer, Sequence[str]]:
        """Return the answer, and the chains that led to it."""
        known, _ = bundle.recommender.known(ask.history)
        if given.mode == "direct" or not known:
            return await _timed("search", seconds, _search(bundle, ask)), ()
        # Where thinking may take too long, or both modes are asked for, the direct answer is computed meanwhile.
        early = given.mode == "merged" or given.budget_ms is not None
        direct = asyncio.ensure_future(_search(bundle, ask)) if early else None
        if direct is not None:
            direct.add_done_callback(lambda done: done.cancelled() or done.exception())  # nobody may ask for it
        most = self.settings.timeout
        limit = min(given.budget_ms / 1000, 0.9 * most) if given.budget_ms else most / 2
        try:
            async with asyncio.timeout(limit):
                chains = await _timed("think", seconds, self._think(bundle, known, write))
                reasoned = await _timed("search", seconds, _search(bundle, replace(ask, chains=chains)))
            if given.mode == "reasoning" or direct is None:
                return reasoned, chains
            return _in_turn(await direct, reasoned, ask.k), chains
        except (TimeoutError, ThinkingError) as error:
            why = str(error) or f"thinking took more than {1000 * limit:.0f} ms"
            answer = await (direct or _search(bundle, ask))
            return replace(answer, fallback=f"{why}: this is the direct answer"), ()
        finally:
            if direct is not None:
                direct.cancel()

    async def _think(self, bundle: Bundle, known: Sequence[str], write: Write) -> tuple[str, ...]:
        """Return chains of thought for known items."""
        thinker = bundle.thinker
        assert thinker is not None
        prompt = bundle.recommender.prompt(known, "reasoning")
        seed = zlib.crc32(repr(prompt).encode())

        async def chain(number: int) -> str:
            text = ""
            async for piece in thinker.think(prompt, seed + number):
                text += piece
                write(number, piece)
            return text

        tasks = [asyncio.ensure_future(chain(number)) for number in range(self.settings.chains)]
        try:
            return tuple(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def reload(self, name: str | None, checkpoint: Path | None = None) -> tuple[Versions, Versions]:
        """Load a checkpoint and the files of the run again, and return the versions before and after.

        The old one answers until the new one has been tried, and is kept for :meth:`roll_back`.
        """
        async with self._reloading:
            old = self.bundle(name)
            try:
                new = await asyncio.to_thread(self._load, checkpoint or old.path)
            except Exception as error:  # of any kind: a bad bundle must not end a good one
                reason = str(error) if isinstance(error, InputError) else repr(error)
                raise RefusedError(409, f"{checkpoint or old.path}: {reason}; the old one goes on") from error
            return self._swap(self._name(name), new)

    async def roll_back(self, name: str | None) -> tuple[Versions, Versions]:
        """Take up what answered before the last reload."""
        async with self._reloading:
            key = self._name(name)
            if key not in self._previous:
                raise RefusedError(409, f"{key}: nothing was reloaded")
            return self._swap(key, self._previous.pop(key))

    def _trees(self, found: str) -> int:
        return sum(bundle.recommender.trees[found] for bundle in self.bundles.values())

    def _name(self, name: str | None) -> str:
        if name is not None and name not in self.bundles:
            raise RefusedError(404, f"no model {name!r} but {', '.join(self.bundles)}")
        return name or next(iter(self.bundles))

    def _swap(self, name: str, new: Bundle) -> tuple[Versions, Versions]:
        old, self.bundles[name] = self.bundles[name], new
        oldest = self._previous.get(name)
        self._previous[name] = old
        if oldest is not None:
            task = asyncio.create_task(oldest.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
        return self.versions(old), self.versions(new)

    async def close(self) -> None:
        """Answer what waits, and end."""
        every = [*self.bundles.values(), *self._previous.values()]
        await asyncio.gather(*self._closing, *(bundle.close() for bundle in every))


async def _search(bundle: Bundle, ask: Ask) -> Answer:
    return await asyncio.wrap_future(bundle.batcher.submit(ask))


async def _timed(part: str, seconds: dict[str, float], work: Awaitable[Result]) -> Result:
    start = time.perf_counter()
    try:
        return await work
    finally:
        seconds[part] = time.perf_counter() - start


def _in_turn(direct: Answer, reasoned: Answer, k: int) -> Answer:
    """Return the items of both in turn, each once, with the score of direct mode, else of the other."""
    scores = {**reasoned.scores, **direct.scores}
    return replace(direct, scores={item: scores[item] for item in in_turn(direct.scores, reasoned.scores, k)})
