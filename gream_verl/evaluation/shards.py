"""An evaluation in pieces: in this process, or by Ray workers on one machine or many.

The pieces do not depend on the number of workers, so the result does not either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from gream_verl.core.cpu_environment import set_defaults
from gream_verl.core.errors import InputError
from gream_verl.core.ray_cluster import start_ray

Piece = TypeVar("Piece")
Result = TypeVar("Result")
RESTARTS = 3  # of a worker that was killed from outside; an error of its own ends the evaluation at once


def in_shards(
    make_worker: Callable[[], Callable[[Piece], Result]], pieces: Sequence[Piece], shards: int = 1
) -> Iterator[Result]:
    """Yield the result of every piece as soon as it is done, in any order.

    One shard works in this process. Several are Ray actors with one GPU each, or one core where the cluster has no GPU.
    ``RAY_ADDRESS`` names a running cluster; without it, Ray starts on this machine. A killed worker is started again
    and its piece is done again. Each worker, perhaps on another machine, calls ``make_worker`` once for its function.
    """
    if shards == 1:
        yield from map(make_worker(), pieces)
        return
    import ray
    from ray.util import ActorPool

    shards, started_here = min(shards, len(pieces)), not ray.is_initialized()
    try:
        kind = start_ray(shards, "shards")
        again = {"max_restarts": RESTARTS, "max_task_retries": RESTARTS}
        remote = ray.remote(_Actor).options(num_cpus=1, num_gpus=int(kind == "GPU"), **again)
        pool = ActorPool([remote.remote(make_worker, kind) for _ in range(shards)])
        yield from pool.map_unordered(lambda actor, piece: actor.work.remote(piece), list(pieces))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from (None if isinstance(error.cause, InputError) else error)
    except ray.exceptions.RayActorError as error:
        raise InputError(f"a Ray worker died ({error}), maybe for lack of memory; ask for fewer shards") from error
    finally:
        if started_here:
            ray.shutdown()


class _Actor:
    """A worker in a Ray process; made at the first piece, so that its errors are those of a piece."""

    def __init__(self, make_worker: Callable[[], Callable[[Any], Any]], kind: str) -> None:
        self.make_worker, self.kind = make_worker, kind
        self.worker: Callable[[Any], Any] | None = None

    def work(self, piece: Any) -> Any:
        """Return the result of a piece."""
        if self.kind == "CPU":
            set_defaults()  # one thread each
        self.worker = self.worker or self.make_worker()
        return self.worker(piece)
