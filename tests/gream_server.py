"""`gream serve` as a process, for tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from local_server import free_port, wait_for_health

GREAM = [sys.executable, "-c", "from gream_verl.cli.main import main; main()", "serve"]


def call(url: str, body: Mapping[str, Any] | None = None) -> Any:
    """Return the JSON that a GET, or a POST of a body, is answered with."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)


@contextmanager
def gream_server(run: Path, log_file: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Serve a run on loopback; yield the base URL and the process."""
    port, environment = free_port(), {**os.environ, "GREAM_TOKEN": ""}
    url = f"http://127.0.0.1:{port}"
    with log_file.open("wb") as log:
        command = [*GREAM, str(run), "--port", str(port), *options]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait_for_health(server, url, log_file)
        yield url, server
    finally:
        server.terminate()
        try:
            server.wait(40)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(30)
