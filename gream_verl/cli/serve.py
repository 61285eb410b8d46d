"""`gream serve`: a trained recommender as a service."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option, Typer

from gream_verl.cli.common import Dataset, Run, console
from gream_verl.cli.evaluate import CHECKPOINT
from gream_verl.core.errors import InputError
from gream_verl.core.run_folder import RunFolder

serve_app = Typer()
TOKEN = "GREAM_TOKEN"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


@serve_app.command()
def serve(
    run: Run,
    checkpoints: Annotated[
        list[Path] | None, Argument(metavar="[CHECKPOINT]...", help=f"{CHECKPOINT} Several are served side by side.")
    ] = None,
    reasoning: Annotated[bool, Option("--reasoning", help="Also write chains of thought, by vLLM.")] = False,
    endpoint: Annotated[str | None, Option(help="Have an OpenAI-compatible server write them.")] = None,
    served_model: Annotated[str | None, Option(help="Name of the model on that server.")] = None,
    chains: Annotated[int, Option(min=1, max=16, help="Chains of thought for a question.")] = 1,
    host: Annotated[str, Option(help=f"Address to listen on; beyond this machine it wants {TOKEN}.")] = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65535, help="Port to listen on.")] = 8080,
    batch: Annotated[int, Option(min=1, help="Most requests computed at once.")] = 32,
    queue: Annotated[int, Option(min=1, help="Most requests that wait; the next one is refused.")] = 256,
    timeout: Annotated[float, Option(min=0.1, help="Seconds until a request is given up.")] = 30.0,
    replicas: Annotated[int, Option(min=0, help="Processes of the same, by Ray Serve; 0 for this one alone.")] = 0,
    most_replicas: Annotated[int | None, Option(min=1, help="Most of them, while many requests wait.")] = None,
    threads: Annotated[int, Option(min=1, help="Threads of the model without a GPU; more than one seldom helps.")] = 1,
    gpu_share: Annotated[float, Option(min=0.01, max=0.9, help="Share of the GPU's memory for vLLM.")] = 0.3,
    cors: Annotated[list[str] | None, Option(metavar="ORIGIN", help="Pages that may call; none without.")] = None,
    log_histories: Annotated[bool, Option("--log-histories", help="Write histories into the log.")] = False,
    dataset: Dataset = None,
) -> None:
    """Serve recommendations over HTTP, with a page to look at them.

    /docs describes the calls. A client sends the value of the environment variable GREAM_TOKEN, where it is set.
    """
    token, is_loopback = os.environ.get(TOKEN) or None, host == "localhost" or _is_loopback(host)
    if token is None and not is_loopback:
        raise InputError(f"--host {host}: is open to others; set {TOKEN}, which clients must send then")
    if token is None and replicas and "RAY_ADDRESS" in os.environ:
        raise InputError(f"RAY_ADDRESS: the service there may be open to others; set {TOKEN}, which clients must send")
    import torch
    import uvicorn

    from gream_verl.serving.app import create_app
    from gream_verl.serving.service import Service
    from gream_verl.serving.settings import Settings

    folder, address = RunFolder.open(run, dataset), f"http://{f'[{host}]' if ':' in host else host}:{port}"
    settings = Settings(
        batch=batch, queue=queue, timeout=timeout, reasoning=reasoning, endpoint=endpoint, served_model=served_model,
        chains=chains, token=token, gpu_share=gpu_share, hosts=(*LOOPBACK, host) if is_loopback else None,
        cors=tuple(cors or ()), log_histories=log_histories, page=True,
    )  # fmt: skip
    if replicas:
        given = {"replicas": replicas, "most_replicas": most_replicas, "host": host, "port": port}
        _serve_by_ray(address, run=folder, checkpoints=checkpoints, settings=settings, **given)
        return
    torch.set_num_threads(threads)
    service = Service(folder, checkpoints, settings)
    items = len(service.bundle(None).recommender.index)
    console.print(f"{', '.join(service.bundles)}: {items:,} items at {address}, described at {address}/docs")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("gream.serve").setLevel(logging.INFO)
    graceful = int(timeout) + 1
    uvicorn.run(create_app(service), host=host, port=port, log_level="warning", timeout_graceful_shutdown=graceful)


def _serve_by_ray(address: str, **given: Any) -> None:
    """Start replicas, and end them with this process; those of a running cluster stay."""
    from gream_verl.serving.replicas import deploy, start_ray, stop

    is_ours = "RAY_ADDRESS" not in os.environ
    try:
        start_ray(max(given["replicas"], given["most_replicas"] or 0))
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # in the place of Ray's, which aborts
        ray_address = deploy(**given)
        console.print(f"{given['replicas']} replicas at {address}")
        if is_ours:
            console.print(f"RAY_AUTH_MODE=token RAY_ADDRESS={ray_address} gream serve ... replaces them")
            signal.pause()
    finally:
        if is_ours:
            stop()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
