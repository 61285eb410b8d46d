"""The settings of a service, and what it counts."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from pydantic import BaseModel, ConfigDict, Field

MOST_BYTES = 1 << 20
"""Most bytes of a request's body."""


class Settings(BaseModel):
    """Settings of a service.

    Attributes:
        batch: Most questions computed at once.
        window: Seconds that the first of several questions waits for the others.
        queue: Most questions that wait; the next one is refused.
        timeout: Seconds after which a request is given up; without a budget, thinking may take half of them.
        reasoning: Whether chains of thought are written, by vLLM where there is no ``endpoint``.
        endpoint: URL of an OpenAI-compatible server that writes chains.
        served_model: Name of the model there; None for its only one.
        chains: Chains of thought for a question.
        threads: Threads of the models without a GPU; on busy cores two are slower than one.
        gpu_share: Share of the GPU's memory that vLLM takes; a reload needs it twice, and the beam search the rest.
        token: What a client must send as ``Authorization: Bearer TOKEN``; None asks for nothing.
        hosts: Names under which clients may call; None for any.
        cors: Origins whose pages may call.
        log_histories: Whether histories stand in the log.
        page: Whether there is a page at ``/``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch: int = Field(default=32, ge=1)
    window: float = Field(default=0.002, ge=0)
    queue: int = Field(default=256, ge=1)
    timeout: float = Field(default=30.0, gt=0)
    reasoning: bool = False
    endpoint: str | None = None
    served_model: str | None = None
    chains: int = Field(default=1, ge=1, le=16)
    threads: int = Field(default=1, ge=1)
    gpu_share: float = Field(default=0.3, gt=0, le=0.9)
    token: str | None = Field(default=None, min_length=1)
    hosts: tuple[str, ...] | None = None
    cors: tuple[str, ...] = ()
    log_histories: bool = False
    page: bool = False


class Metrics:
    """What Prometheus reads."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("gream_requests", "Requests", ["path", "status"], registry=registry)
        self.seconds = Histogram("gream_request_seconds", "Latency", ["path"], registry=registry)
        self.parts = Histogram("gream_part_seconds", "Latency by part", ["part"], registry=registry)
        self.batches = Histogram("gream_batch_size", "Batches", buckets=(1, 2, 4, 8, 16, 32, 64), registry=registry)
        self.fallbacks = Counter("gream_fallbacks", "Answers that are not what was asked for", registry=registry)
        self.queue = Gauge("gream_queue", "Questions that wait", registry=registry)
        self.trees = Gauge("gream_trees", "Trees of allowed items, kept and made", ["found"], registry=registry)
