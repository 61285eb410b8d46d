"""Two runs must not share a folder of checkpoints, and a run must not go on with other rows."""

from __future__ import annotations

import pytest

from gream_verl.core.errors import InputError
from gream_verl.plugin import run_lock


def release():
    while run_lock._held:
        run_lock._held.pop().close()


def test_a_folder_is_held_by_one_job(tmp_path, monkeypatch):
    folder = tmp_path / "srpo"
    jobs = iter(["127.0.0.1:1 01", "127.0.0.1:1 01", "127.0.0.1:2 01", "", "127.0.0.1:2 01"])
    monkeypatch.setattr(run_lock, "_ray_job", lambda: next(jobs))
    run_lock.hold_checkpoints(folder, [])
    run_lock.hold_checkpoints(folder, [])  # another process of the job
    for _ in range(2):
        with pytest.raises(InputError, match=r"srpo: another run writes its checkpoints there; wait"):
            run_lock.hold_checkpoints(folder, [])
    release()
    run_lock.hold_checkpoints(folder, [])


def test_a_run_does_not_go_on_with_other_rows(tmp_path):
    rows = tmp_path / "D-rl.parquet"
    rows.write_text("some rows")

    def start(**options):
        run_lock.hold_checkpoints(tmp_path, [rows], **options)
        release()

    start()
    rows.write_text("other rows")
    start()  # there was no checkpoint
    (tmp_path / "global_step_8").mkdir()
    start()
    rows.write_text("fewer")
    with pytest.raises(InputError, match="its checkpoints are of other rows; delete it, or set"):
        start()
    release()
    start(resumes=False)
