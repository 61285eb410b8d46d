"""A lock on the checkpoints of a run: two runs in one folder would resume from each other's, and overwrite them."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import ray

from gream_verl.core.errors import InputError
from gream_verl.core.files import hold

_held: list[IO[str]] = []
"""Open until this process ends."""


def hold_checkpoints(folder: Path) -> None:
    """Lock a folder for this Ray job, of whose processes several may train; refuse it while another job holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    job = _ray_job()
    file = (folder / ".lock").open("a+")
    try:
        hold(file, f"{folder}: another run writes its checkpoints there; wait for it, or set trainer.default_local_dir")
    except InputError:
        file.seek(0)
        if not job or file.read() != job:
            raise
    else:
        file.truncate(0)
        file.write(job)
        file.flush()
    _held.append(file)


def _ray_job() -> str:
    """Return what tells this Ray job from all others, "" without one; clusters count their jobs alike."""
    context = ray.get_runtime_context()
    return f"{context.gcs_address} {context.get_job_id()}" if ray.is_initialized() else ""
