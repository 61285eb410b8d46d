"""The checkpoints that LLaMA-Factory leaves in its output folder, and goes on from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def newest_checkpoint(output: Path) -> Path | None:
    """Return the checkpoint from which LLaMA-Factory would go on, None when there is none."""
    return max(_checkpoints(output), key=lambda path: int(path.name[11:]), default=None)


def _checkpoints(output: Path) -> list[Path]:
    """Return LLaMA-Factory's checkpoints, not what a user called by a similar name."""
    return [path for path in output.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdecimal()]


def is_whole(checkpoint: Path) -> bool:
    """Return whether no kill and no full disk cut the checkpoint short: the trainer's state is its last file."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def drop_torn_checkpoints(output: Path) -> None:
    """Remove the checkpoints that were cut short: LLaMA-Factory would fail to go on from them."""
    for checkpoint in _checkpoints(output):
        if not is_whole(checkpoint):
            shutil.rmtree(checkpoint)
