"""`gream serve`: a trained recommender as a service."""

from __future__ import annotations

import ipaddress
import logging
import os
from pathlib import Path
from typing import Annotated

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
    if not is_loopback and token is None:
        raise InputError(f"--host {host}: is open to others; set {TOKEN}, which clients must send then")
    import torch
    import uvicorn

    from gream_verl.serving.app import create_app
    from gream_verl.serving.service import Service
    from gream_verl.serving.settings import Settings

    torch.set_num_threads(threads)
    settings = Settings(
        batch=batch, queue=queue, timeout=timeout, reasoning=reasoning, endpoint=endpoint, served_model=served_model,
        chains=chains, token=token, gpu_share=gpu_share, hosts=LOOPBACK if is_loopback else None,
        cors=tuple(cors or ()), log_histories=log_histories, page=True,
    )  # fmt: skip
    service = Service(RunFolder.open(run, dataset), checkpoints, settings)
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    items = len(service.bundle(None).recommender.index)
    console.print(f"{', '.join(service.bundles)}: {items:,} items at {address}, described at {address}/docs")
    logging.basicConfig(format="%(message)s")
    logging.getLogger("gream.serve").setLevel(logging.INFO)
    graceful = int(timeout) + 1
    uvicorn.run(create_app(service), host=host, port=port, log_level="warning", timeout_graceful_shutdown=graceful)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
