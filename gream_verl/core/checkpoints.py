"""The checkpoints that the Trainer of transformers, and so LLaMA-Factory, leaves in its output folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path


def newest_checkpoint(output: Path) -> Path | None:
    """Return the checkpoint from which the trainer goes on, None when there is none."""
    return max(_checkpoints(output), key=lambda path: int(path.name[11:]), default=None)


def drop_torn_checkpoints(output: Path) -> None:
    """Remove the checkpoints that a kill or a full disk cut short: the trainer fails to go on from them."""
    for checkpoint in _checkpoints(output):
        if not is_whole(checkpoint):
            shutil.rmtree(checkpoint)


def is_whole(checkpoint: Path) -> bool:
    """Return whether the trainer finished writing a checkpoint: its state is the last file."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _checkpoints(output: Path) -> list[Path]:
    """Return the folders ``checkpoint-<step>``, not those that a user gave a similar name."""
    return [path for path in output.glob("checkpoint-*") if path.is_dir() and path.name[11:].isdecimal()]
