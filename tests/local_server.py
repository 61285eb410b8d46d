"""Ports and first answers of servers on loopback, for tests."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path


def free_port() -> int:
    """Return a port that nobody listens on, below those that Linux gives to connections: one of them could take it."""
    for port in random.SystemRandom().sample(range(20000, 32000), 100):
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free")


def wait_for_health(server: subprocess.Popen[bytes], url: str, log_file: Path, seconds: float = 240) -> None:
    """Return when /health answers; fail when the process ends, or takes longer."""
    deadline = time.monotonic() + seconds
    while True:
        assert server.poll() is None, log_file.read_text()[-3000:]
        assert time.monotonic() < deadline, f"the server did not come up\n{log_file.read_text()[-3000:]}"
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
