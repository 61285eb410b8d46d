"""A real vLLM server, for tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from local_server import free_port, wait_for_health

from gream_verl.core.cpu_environment import set_defaults


@contextmanager
def vllm_server(model: Path, log_file: Path, *options: str) -> Iterator[str]:
    """Serve ``model`` as ``tiny`` on loopback and yield the base URL."""
    port, environment = free_port(), dict(os.environ)
    set_defaults(environment)
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)),
        *("--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--enforce-eager", "--uvicorn-log-level", "warning", *options),
    ]
    with log_file.open("wb") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for_health(server, f"http://127.0.0.1:{port}", log_file)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(30)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
