"""An evaluation in pieces: done in this process, or by workers of Ray's on one machine or many.

The pieces are the same however many workers there are, so the result is, too.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar

from gream_verl.core.cpu_environment import set_defaults
from gream_verl.core.errors import InputError

Piece = TypeVar("Piece")
Result = TypeVar("Result")

RESTARTS = 3
"""Of a worker that was killed from outside; an error of its own ends the evaluation at once."""
AHEAD = 2
"""Pieces that a worker has at a time, so that it never waits for the next."""


def in_shards(
    make_worker: Callable[[], Callable[[Piece], Result]], pieces: Sequence[Piece], shards: int = 1
) -> Iterator[tuple[int, Result]]:
    """Yield the number and the result of every piece, each once, as soon as it is there.

    With one shard all is done in this process. Otherwise each shard is an actor of Ray's with one GPU, or one core
    where the cluster has no GPU. The address of a running cluster is taken from ``RAY_ADDRESS``; without it, Ray is
    started on this machine. A worker that is killed is started anew and its pieces are done again.

    Args:
        make_worker: Makes what does a piece; called once in every worker, which may be on another machine.
        pieces: What is to be done.
        shards: How many workers there shall be.

    Yields:
        The number of a piece, from 0, and its result. Pieces come in any order.

    Raises:
        InputError: When a worker raises it, or when there are too few GPUs or cores for the shards, or workers die.
    """
    if shards == 1:
        worker = make_worker()
        for number, piece in enumerate(pieces):
            yield number, worker(piece)
        return
    yield from _with_ray(make_worker, pieces, min(shards, len(pieces)))


def _with_ray(make_worker: Callable[[], Callable[[Any], Any]], pieces: Sequence[Any], shards: int) -> Iterator[Any]:
    import torch

    cluster = "RAY_ADDRESS" in os.environ
    if not cluster and not torch.cuda.is_available():
        set_defaults()
    import ray

    started_here = not ray.is_initialized()
    if started_here:
        where = {} if cluster else {"address": "local", "num_cpus": max(shards, os.cpu_count() or 1)}
        if cluster:
            _check_address(os.environ["RAY_ADDRESS"])
        ray.init(**where, include_dashboard=False, log_to_driver=False, logging_level="warning")
    try:
        resources = ray.cluster_resources()
        kind = "GPU" if resources.get("GPU") else "CPU"
        if shards > resources.get(kind, 0):
            raise InputError(
                f"--shards {shards}: Ray has {resources.get(kind, 0):.0f} {kind}s, and a shard takes one; ask for fewer"
            )
        remote = ray.remote(_Actor).options(
            num_cpus=1, num_gpus=int(kind == "GPU"), max_restarts=RESTARTS, max_task_retries=RESTARTS
        )
        actors = [remote.remote(make_worker, kind) for _ in range(shards)]
        waiting = iter(enumerate(pieces))
        running = {}

        def hand_out(actor: Any) -> None:
            for number, piece in waiting:
                running[actor.work.remote(piece)] = number, actor
                return

        for actor in actors * AHEAD:
            hand_out(actor)
        while running:
            [done], _ = ray.wait(list(running), num_returns=1)
            number, actor = running.pop(done)
            yield number, ray.get(done)
            hand_out(actor)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from (None if isinstance(error.cause, InputError) else error)
    except ray.exceptions.RayActorError as error:
        cause = getattr(error, "cause", None)
        raise InputError(
            f"a worker of Ray's died ({cause or error}); it may have run out of memory: ask for fewer --shards"
        ) from error
    finally:
        if started_here:
            ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse an address where nobody answers: Ray itself would try for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():
        return  # such as "auto", which Ray looks up
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise InputError(
            f"RAY_ADDRESS {address}: no cluster answers there ({error}); start one with `ray start --head`, or unset it"
        ) from None


class _Actor:
    """A worker in a process of Ray's."""

    def __init__(self, make_worker: Callable[[], Callable[[Any], Any]], kind: str) -> None:
        self.make_worker = make_worker
        self.kind = kind

    @cached_property
    def worker(self) -> Callable[[Any], Any]:
        """The worker; not made before the first piece, so that its errors are those of a piece."""
        if self.kind == "CPU":
            set_defaults()  # one thread each
        return self.make_worker()

    def work(self, piece: Any) -> Any:
        """Do a piece."""
        return self.worker(piece)
