"""Two runs must not share a folder of checkpoints."""

from __future__ import annotations

import pytest

from gream_verl.core.errors import InputError
from gream_verl.plugin import run_lock


def test_a_folder_is_held_by_one_job(tmp_path, monkeypatch):
    folder = tmp_path / "srpo"
    jobs = iter(["127.0.0.1:1 01", "127.0.0.1:1 01", "127.0.0.1:2 01", ""])
    monkeypatch.setattr(run_lock, "_ray_job", lambda: next(jobs))
    run_lock.hold_checkpoints(folder)
    run_lock.hold_checkpoints(folder)  # another process of the job
    for _ in range(2):
        with pytest.raises(InputError, match=r"srpo: another run writes its checkpoints there; wait"):
            run_lock.hold_checkpoints(folder)
    while run_lock._held:
        run_lock._held.pop().close()
    monkeypatch.setattr(run_lock, "_ray_job", lambda: "127.0.0.1:2 01")
    run_lock.hold_checkpoints(folder)
    run_lock._held.pop().close()
