"""A lock on the folder of checkpoints: one run at a time, always on the same rows.

Two runs in a folder would resume from each other's and overwrite them. With fewer rows than before, verl's data loader
ends in a bare StopIteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO

import ray

from gream_verl.core.errors import InputError
from gream_verl.core.files import hold, read_json, write_json
from gream_verl.core.origin import mark

_held: list[IO[str]] = []
"""Open until this process ends."""


def hold_checkpoints(folder: Path, rows: Sequence[Path], resumes: bool = True) -> None:
    """Lock a folder for this Ray job; several of its processes may hold it.

    Refuse it while another job holds it, and where a run that ``resumes`` would go on from checkpoints of other rows.
    """
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
        stamp, now = folder / "rows.json", {path.name: mark(path) for path in rows}
        if resumes and stamp.is_file() and list(folder.glob("global_step_*")) and read_json(stamp) != now:
            raise InputError(
                f"{folder}: its checkpoints are of other rows; delete it, or set trainer.default_local_dir"
            )
        write_json(stamp, now)
    _held.append(file)


def _ray_job() -> str:
    """Return what tells this Ray job from all others, "" without one; clusters count their jobs alike."""
    context = ray.get_runtime_context()
    return f"{context.gcs_address} {context.get_job_id()}" if ray.is_initialized() else ""
