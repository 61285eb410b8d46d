"""`gream serve`: a trained recommender as a service."""

from __future__ import annotations

import ipaddress
import logging
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option, Typer

from gream_verl.cli.common import Dataset, Run, console
from gream_verl.cli.evaluate import CHECKPOINT
from gream_verl.core.errors import InputError
from gream_verl.core.options import file_options
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
    reasoning: Annotated[bool | None, Option("--reasoning", help="Also write chains of thought, by vLLM.")] = None,
    endpoint: Annotated[str | None, Option(help="URL of an OpenAI-compatible server that writes the chains.")] = None,
    chains: Annotated[int | None, Option(help="Chains of thought for a question. Default: 1.")] = None,
    host: Annotated[str, Option(help=f"Address to listen on; one open to others requires {TOKEN}.")] = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65535, help="Port to listen on.")] = 8080,
    batch: Annotated[int | None, Option(help="Most requests computed at once. Default: 32.")] = None,
    queue: Annotated[int | None, Option(help="Most requests that wait; the next is refused. Default: 256.")] = None,
    timeout: Annotated[float | None, Option(help="Seconds until a request is given up. Default: 30.")] = None,
    replicas: Annotated[int, Option(min=0, help="Replicas of the service, by Ray Serve; 0: this process alone.")] = 0,
    most_replicas: Annotated[int | None, Option(min=1, help="Most replicas while many requests wait.")] = None,
    config: Annotated[Path | None, Option("--config", "-c", help="YAML file with these and further settings.")] = None,
    dataset: Dataset = None,
) -> None:
    """Serve recommendations over HTTP, and as a page.

    /docs describes the calls. A client sends the value of the environment variable GREAM_TOKEN, where it is set.
    """
    token, is_loopback = os.environ.get(TOKEN) or None, host == "localhost"
    with suppress(ValueError):
        is_loopback = ipaddress.ip_address(host).is_loopback
    if token is None and not is_loopback:
        raise InputError(f"--host {host}: is open to others; set {TOKEN}, which clients must send then")
    if token is None and replicas and "RAY_ADDRESS" in os.environ:
        raise InputError(f"RAY_ADDRESS: the service there may be open to others; set {TOKEN}, which clients must send")
    if most_replicas is not None and not replicas:
        raise InputError("--most-replicas: give --replicas, too")
    import torch
    import uvicorn

    from gream_verl.serving.app import create_app
    from gream_verl.serving.service import Service
    from gream_verl.serving.settings import Settings

    folder, address = RunFolder.open(run, dataset), f"http://{f'[{host}]' if ':' in host else host}:{port}"
    hosts = (*LOOPBACK, host) if token is None else None  # with a token, any name of this machine may be used
    line: dict[str, Any] = {"reasoning": reasoning, "endpoint": endpoint, "chains": chains, "batch": batch}
    line |= {"queue": queue, "timeout": timeout, "token": token, "hosts": hosts, "page": True}
    settings = file_options(Settings, config, line, "gream serve")
    if replicas:
        given = {"replicas": replicas, "most_replicas": most_replicas, "host": host, "port": port}
        _serve_by_ray(address, run=folder, checkpoints=checkpoints, settings=settings, **given)
        return
    torch.set_num_threads(settings.threads)
    service = Service(folder, checkpoints, settings)
    items = len(service.bundle(None).recommender.index)
    console.print(f"{', '.join(service.bundles)}: {items:,} items at {address}, described at {address}/docs")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("gream.serve").setLevel(logging.INFO)
    graceful = int(settings.timeout) + 1
    uvicorn.run(create_app(service), host=host, port=port, log_level="warning", timeout_graceful_shutdown=graceful)


def _serve_by_ray(address: str, **given: Any) -> None:
    """Start replicas, and end them with this process; those of a running cluster stay."""
    from gream_verl.core.ray_cluster import start_ray
    from gream_verl.serving.replicas import deploy, stop

    is_ours = "RAY_ADDRESS" not in os.environ
    try:
        start_ray(max(given["replicas"], given["most_replicas"] or 0), "replicas", may_grow=True)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # in the place of Ray's, which aborts
        ray_address = deploy(**given)
        console.print(f"{given['replicas']} replicas at {address}")
        if is_ours:
            console.print(f"{TOKEN}=... RAY_AUTH_MODE=token RAY_ADDRESS={ray_address} gream serve ... replaces them")
            signal.pause()
    finally:
        if is_ours:
            stop()
