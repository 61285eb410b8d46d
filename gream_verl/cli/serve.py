"""`gream serve`: a trained recommender as a service."""

from __future__ import annotations

import ipaddress
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


@serve_app.command()
def serve(
    run: Run,
    checkpoint: Annotated[Path | None, Argument(metavar="CHECKPOINT", help=CHECKPOINT)] = None,
    host: Annotated[str, Option(help=f"Address to listen on; beyond this machine it wants {TOKEN}.")] = "127.0.0.1",
    port: Annotated[int, Option(min=1, max=65535, help="Port to listen on.")] = 8080,
    batch: Annotated[int, Option(min=1, help="Most requests computed at once.")] = 32,
    queue: Annotated[int, Option(min=1, help="Most requests that wait; the next one is refused.")] = 256,
    timeout: Annotated[float, Option(min=0.1, help="Seconds until a request is given up.")] = 30.0,
    threads: Annotated[int, Option(min=1, help="Threads of the model without a GPU; more than one seldom helps.")] = 1,
    dataset: Dataset = None,
) -> None:
    """Serve recommendations over HTTP.

    Direct mode: POST /v1/recommend and /v1/score, GET /v1/items and /v1/users; /docs describes them. A client sends the
    value of the environment variable GREAM_TOKEN, where it is set.
    """
    token = os.environ.get(TOKEN) or None
    if not (host == "localhost" or _is_loopback(host)) and token is None:
        raise InputError(f"--host {host}: is open to others; set {TOKEN}, which clients must send then")
    import torch
    import uvicorn

    from gream_verl.serving.recommender import Recommender
    from gream_verl.serving.service import Settings, create_app

    torch.set_num_threads(threads)
    recommender = Recommender(RunFolder.open(run, dataset), checkpoint, batch)
    app = create_app(recommender, Settings(batch=batch, queue=queue, timeout=timeout, token=token))
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    console.print(f"{recommender.folder}: {len(recommender.index):,} items at {address}, described at {address}/docs")
    uvicorn.run(app, host=host, port=port, log_level="warning")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
