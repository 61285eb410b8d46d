"""`gream serve` as a process, for tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, environment = f"http://127.0.0.1:{port}", {**os.environ, "GREAM_TOKEN": ""}
    with log_file.open("wb") as log:
        command = [*GREAM, str(run), "--port", str(port), *options]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 240
        while True:
            assert server.poll() is None, log_file.read_text()[-3000:]
            assert time.monotonic() < deadline, f"the service did not come up\n{log_file.read_text()[-3000:]}"
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(0.2)
        yield url, server
    finally:
        server.terminate()
        try:
            server.wait(40)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait(30)
