"""The same application in several processes, on one machine or many, by Ray Serve.

A request goes from Serve's proxy to a door, and from there to the replica with the shorter queue of two. The door asks
another replica where one dies before it answers.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gream_verl.core.errors import InputError
from gream_verl.core.origin import check_model
from gream_verl.core.ray_cluster import start_ray
from gream_verl.core.run_folder import RunFolder
from gream_verl.serving.settings import MOST_BYTES, Settings

APPLICATION = "gream"
ATTEMPTS = 3
"""Most replicas that are asked; a request that ends every replica must not end them all."""
PORTABLE = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")
"""Parts of an ASGI scope that go to another process."""
ONE_ONLY = "this would reach one replica of several; run `gream serve` with --replicas again, which replaces them all"


class Replica:
    """A process with the models.

    Args:
        run: The run.
        checkpoints: The checkpoints.
        settings: The settings.
    """

    def __init__(self, run: RunFolder, checkpoints: Sequence[Path], settings: Settings) -> None:
        from gream_verl.serving.app import create_app  # here, because a door needs no PyTorch
        from gream_verl.serving.service import Service

        logging.basicConfig(format="%(message)s")  # into the worker's file among Ray's logs
        logging.getLogger("gream.serve").setLevel(logging.INFO)
        self._service = Service(run, checkpoints, settings)
        self._app = create_app(self._service)

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[Message]:
        """Yield the ASGI messages of an answer."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        question: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Message:
            if not question:
                await asyncio.Event().wait()  # Serve cancels this call when the client goes away
            return question.pop()

        task = asyncio.ensure_future(self._app(scope, receive, messages.put))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                yield message
            await task  # raises what it raised
        finally:
            task.cancel()

    async def check_health(self) -> None:
        """Answer a question, past the queue, with every model; Serve replaces a replica that cannot.

        A replica whose vLLM starts again stays: it gives direct answers meanwhile.
        """
        for bundle in self._service.bundles.values():
            await asyncio.to_thread(bundle.recommender.check)

    async def __del__(self) -> None:
        await self._service.close()


class Door:
    """An ASGI application that has a replica answer, and another one where that one dies."""

    def __init__(self, replicas: DeploymentHandle) -> None:
        self._ask = replicas.options(stream=True).answer.remote

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["path"].startswith(("/admin/", "/metrics")):
            return await JSONResponse({"detail": ONE_ONLY}, 400)(scope, receive, send)
        body, more = b"", True
        while more and len(body) <= MOST_BYTES:  # the application refuses a larger one by its headers
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        portable, begun = {key: scope[key] for key in PORTABLE if key in scope}, False
        for left in reversed(range(ATTEMPTS)):
            head: Message | None = None
            try:
                async for message in self._ask(portable, body):
                    if head is None:  # waits for the body: until then, another replica can answer
                        kept = [pair for pair in message.get("headers", ()) if pair[0] != b"x-request-id"]
                        head = {**message, "headers": kept}  # Serve's proxy adds the id
                        continue
                    if not begun:
                        await send(head)
                    begun = True
                    await send(message)
                return None
            except BackPressureError:
                busy = JSONResponse({"detail": "too many requests wait"}, 429, {"Retry-After": "1"})
                return await busy(scope, receive, send)
            except RayActorError:
                if begun or not left:
                    raise
        return None


def make_door() -> ASGIApp:
    """Return the application of a process that holds no model."""
    door = Door(serve.get_deployment_handle(Replica.__name__, APPLICATION))
    return Starlette(routes=[Route("/{path:path}", door)])


def deploy(
    run: RunFolder,
    checkpoints: Sequence[Path] | None,
    settings: Settings,
    *,
    replicas: int,
    most_replicas: int | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
) -> str:
    """Start replicas, or replace running ones one after the other; return Ray's address when all of them answer.

    A replica takes a GPU, or a core where the cluster has no GPU. ``RAY_ADDRESS`` names a running cluster, whose
    machines see the run under the same path; without it, Ray starts on this machine.

    Args:
        run: The run.
        checkpoints: As :class:`Service` has them.
        settings: The settings; there is no page.
        replicas: Number of replicas.
        most_replicas: Most replicas while many requests wait; None for no more.
        host: Address that the proxies listen on; a running Serve keeps its own.
        port: Their port.

    Raises:
        InputError: When a checkpoint does not fit, or the replicas do not start.
    """
    from gream_verl.model.loading import resolve_model

    root = run.root.resolve()  # processes elsewhere have other working directories
    run = RunFolder.open(root, run.data.name)
    paths = [path.resolve() for path in checkpoints or [run.trained]]
    for path in paths:
        check_model(resolve_model(path), run.data.index)
    most = max(replicas, most_replicas or 0)
    kind = start_ray(most, "replicas", may_grow=True)
    scale: dict[str, Any] = {"num_replicas": replicas}
    if most > replicas:
        bounds = {"min_replicas": replicas, "max_replicas": most, "target_ongoing_requests": settings.batch}
        scale = {"autoscaling_config": bounds}
    models = serve.deployment(
        Replica,
        **scale,
        ray_actor_options={"num_cpus": 1, "num_gpus": int(kind == "GPU")},
        max_ongoing_requests=settings.batch + settings.queue,
        max_queued_requests=settings.queue,
        graceful_shutdown_timeout_s=settings.timeout + 10,
        health_check_timeout_s=max(30.0, settings.timeout),
        max_constructor_retry_count=3,
    )
    doors = serve.deployment(
        serve.ingress(make_door)(),
        name=Door.__name__,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=1000,
        graceful_shutdown_timeout_s=settings.timeout + 10,
    )
    serve.start(http_options={"host": host, "port": port})
    quiet = {"log_level": "WARNING", "enable_access_log": False}  # the application writes a line for every request
    settings = settings.model_copy(update={"page": False})
    try:
        serve.run(doors.bind(models.bind(run, paths, settings)), name=APPLICATION, logging_config=quiet)
    except RuntimeError as error:
        reason = serve.status().applications[APPLICATION].deployments[Replica.__name__].message
        raise InputError(f"the new replicas do not start, those that ran go on: {reason}") from error
    return str(ray.get_runtime_context().gcs_address)


def stop() -> None:
    """End the replicas and Ray; what is on its way gets no answer."""
    if ray.is_initialized():  # Serve would start Ray to look for what it could end
        serve.shutdown()
        ray.shutdown()
