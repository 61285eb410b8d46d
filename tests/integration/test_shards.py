from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from assets import make_index, make_tiny_model
from evaluation_files import write_prompts
from local_server import free_port

from gream_verl.core.cpu_environment import set_defaults
from gream_verl.core.errors import InputError
from gream_verl.evaluation.direct import evaluate_direct
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.prompts import read_prompts
from gream_verl.evaluation.reasoning import evaluate_reasoning
from gream_verl.evaluation.shards import in_shards

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

Worker = Callable[[int], tuple[int, int]]


def squares(folder: Path | None = None) -> Callable[[], Worker]:
    """Return what makes a worker; it is defined in here, so that workers need not import this file."""

    def square(number: int) -> tuple[int, int]:
        if number == 13:
            raise InputError("13: cannot be squared; take another number")
        if number == 16:
            raise LookupError("16")
        if number == 6 and folder is not None and not (folder / "killed").exists():
            (folder / "killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01 * (number % 3))
        return number * number, os.getpid()

    return lambda: square


@pytest.fixture(scope="module")
def started():
    """Start Ray once for the tests that do not ask how it is started."""
    set_defaults()
    import ray

    ray.init(address="local", num_cpus=5, include_dashboard=False, log_to_driver=False, logging_level="warning")
    yield
    ray.shutdown()


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize(("count", "shards"), [(7, 1), (7, 3), (2, 5), (1, 2)])
def test_every_piece_is_done_once_by_as_many_processes_as_asked(count: int, shards: int) -> None:
    found = list(in_shards(squares(), range(count), shards))
    assert sorted(square for square, _ in found) == [number * number for number in range(count)]
    processes = {process for _, process in found}
    assert processes == {os.getpid()} if shards == 1 else os.getpid() not in processes
    assert len(processes) <= min(count, shards)


@pytest.mark.usefixtures("started")
def test_a_worker_that_is_killed_is_started_again_and_nothing_is_lost(tmp_path: Path) -> None:
    found = list(in_shards(squares(tmp_path), range(10), 2))
    assert (tmp_path / "killed").exists()
    assert sorted(square for square, _ in found) == [number * number for number in range(10)]


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize("shards", [1, 2])
def test_an_error_of_a_worker_is_the_sentence_it_is(shards: int) -> None:
    with pytest.raises(InputError, match=r"^13: cannot be squared; take another number$"):
        list(in_shards(squares(), range(15), shards))
    with pytest.raises(LookupError, match="16"):
        list(in_shards(squares(), [16, 16], shards))


@pytest.mark.usefixtures("started")
def test_the_number_of_shards_changes_no_row(tmp_path: Path) -> None:
    index = make_index()
    index.save(tmp_path / "tiny.index.json")
    model = make_tiny_model(tmp_path / "model", index)
    file, options = write_prompts(tmp_path / "tiny-test.parquet", index, 7), {"engine": "hf", "max_tokens": 6}
    alone, sharded = (EvaluationOptions(**options, batch_size=3, beams=5, shards=shards) for shards in (1, 2))
    direct, reasoning = (read_prompts(file, mode)[0] for mode in ("direct", "reasoning"))
    progress = tmp_path / "progress.jsonl"
    assert evaluate_direct(model, direct, index, sharded).rows == evaluate_direct(model, direct, index, alone).rows
    expected = evaluate_reasoning(model, reasoning, index, alone, tmp_path / "alone.jsonl").rows
    assert evaluate_reasoning(model, reasoning, index, sharded, progress).rows == expected
    assert progress.read_bytes().count(b"\n") == 8


@pytest.fixture
def cluster(tmp_path: Path):
    """Start a cluster of Ray's with two slots in processes of its own, as a user would; yield its address."""
    port, ray = free_port(), str(Path(sys.executable).parent / "ray")
    subprocess.run([ray, "get-auth-token", "--generate"], check=True, timeout=120, capture_output=True)
    command = [ray, "start", "--head", "--num-cpus=2", f"--port={port}"]
    command += ["--include-dashboard=false", "--node-ip-address=127.0.0.1", "--block", "--disable-usage-stats"]
    # In its own folder (of a short name, for sockets): in the usual one every Ray of this machine would find it.
    folder = tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True)
    command.append(f"--temp-dir={folder.name}")
    with (tmp_path / "ray.log").open("wb") as log:
        head = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while b"Ray runtime started" not in (tmp_path / "ray.log").read_bytes():
            assert time.monotonic() < deadline, (tmp_path / "ray.log").read_text()
            assert head.poll() is None, (tmp_path / "ray.log").read_text()
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
    finally:
        head.terminate()
        try:
            head.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(head.pid, signal.SIGKILL)
        folder.cleanup()


def test_an_existing_cluster_is_used_and_left_running(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")  # not Ray's default where it joins a cluster
    import ray

    ray.shutdown()
    for _ in range(2):
        assert len(list(in_shards(squares(), range(5), 2))) == 5
    with pytest.raises(InputError, match="shards: 3: Ray has 2 CPUs"):
        list(in_shards(squares(), range(5), 3))
