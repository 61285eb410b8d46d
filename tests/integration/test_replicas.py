"""`gream serve --replicas` under load: one replica is killed, then all are replaced, and no request is lost."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from assets import make_index, make_tiny_model
from local_server import free_port
from serving_run import ITEMS, USERS, make_served_run

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
pytest.importorskip("fastapi", reason="the extra serve is not installed")
pytest.importorskip("ray.serve", reason="the extra replicas is not installed")
CLIENTS, BUSY = 4, 100


@dataclass
class Answered:
    user: int
    sent: float
    version: str
    items: list[str]


def ask(url: str, user: int) -> Answered:
    sent, body = time.monotonic(), json.dumps({"user": str(user)}).encode()
    request = urllib.request.Request(f"{url}/v1/recommend", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        given = json.load(answer)
        assert answer.headers.get_all("x-request-id") == [given["request_id"]]
    return Answered(user, sent, given["model"], [item["id"] for item in given["items"]])


@contextmanager
def load(url: str) -> Iterator[list[Answered | Exception]]:
    """Ask all the time; no client asks again."""
    answers: list[Answered | Exception] = []
    stop = threading.Event()

    def client(number: int) -> None:
        while not stop.is_set():
            try:
                answers.append(ask(url, number % USERS))
            except Exception as error:
                answers.append(error)
            number += 1
            time.sleep(0.0 if len(answers) < BUSY else 0.5)  # after the kill, processes that start need the cores

    threads = [threading.Thread(target=client, args=(3 * number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    try:
        yield answers
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)


def wait(until: Callable[[], bool], state: Callable[[], object], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < deadline, f"it did not come: {state()}"
        time.sleep(0.1)


def replica_processes() -> set[int]:
    """Return the replicas of this process's own Ray."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if "ray::ServeReplica:gream:Replica" in " ".join(process.cmdline()):
                found.add(process.pid)
        except psutil.Error:
            pass
    return found


def status() -> Any:
    """Return what Serve says of the replicas: their states, and why there are fewer than asked for."""
    from ray import serve

    return serve.status().applications["gream"].deployments["Replica"]


def test_no_request_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gream_verl.core.run_folder import RunFolder
    from gream_verl.serving.recommender import Ask, Recommender
    from gream_verl.serving.replicas import deploy, stop
    from gream_verl.serving.settings import Settings

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = RunFolder.open(make_served_run(tmp_path / "run"))
    other = make_tiny_model(tmp_path / "run" / "other", make_index(ITEMS), seed=1)
    right: dict[str, dict[int, list[str]]] = {}
    for path in (run.sft, other):
        recommender = Recommender(run, path)
        histories = recommender.catalogue.histories
        asks = [Ask(tuple(histories[str(user)])) for user in range(USERS)]
        lists = [list(answer.scores) for answer in recommender.recommend(asks)]
        right[recommender.version["model"]] = dict(enumerate(lists))
    old, new = right
    port = free_port()
    url, settings = f"http://127.0.0.1:{port}", Settings(page=True)
    try:
        deploy(run, [run.sft], settings, replicas=2, port=port)
        first = replica_processes()
        assert len(first) == 2
        with load(url) as answers:
            wait(lambda: len(answers) > BUSY // 2, lambda: answers)
            killed = first.pop()
            os.kill(killed, signal.SIGKILL)
            wait(
                lambda: len(replica_processes() - {killed}) == 2 and status().replica_states.get("RUNNING") == 2, status
            )
            deploy(run, [other], settings, replicas=2, port=port)
            changed, count = time.monotonic(), len(answers)
            wait(lambda: len(answers) > count + 50, lambda: answers[count:])
        lost = [answer for answer in answers if isinstance(answer, Exception)]
        assert not lost, f"{len(lost)} of {len(answers)}: {lost[0]!r}"
        given = [answer for answer in answers if isinstance(answer, Answered)]
        assert all(answer.items == right[answer.version][answer.user] for answer in given)
        assert {answer.version for answer in given} == {old, new}
        assert {answer.version for answer in given if answer.sent > changed} == {new}
        with pytest.raises(urllib.error.HTTPError, match="400") as refused:
            urllib.request.urlopen(urllib.request.Request(f"{url}/admin/reload", b"{}"), timeout=60)
        assert "--replicas" in refused.value.read().decode()
    finally:
        stop()
