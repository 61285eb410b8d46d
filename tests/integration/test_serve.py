"""`gream serve` as a process: it answers, thinks, finishes what has begun, and is open to nobody else."""

from __future__ import annotations

import collections
import itertools
import os
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from assets import make_tiny_model, teach_form
from gream_server import GREAM, call, gream_server
from serving_run import USERS, make_served_run
from vllm_server import vllm_server

from gream_verl.core.semantic_ids import ItemIndex

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]
pytest.importorskip("fastapi", reason="the extra serve is not installed")
REQUESTS, CLIENTS, EVERY = 10_000, 8, 25
"""Requests of the fault test, its clients, and how many direct ones come for one that thinks."""


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose model answers in the right form."""
    run = make_served_run(tmp_path_factory.mktemp("taught") / "run")
    teach_form(run / "sft", ItemIndex.load(run / "data" / "toy.index.json"), steps=100)
    return run


def test_a_stopped_service_answers_what_it_was_asked(tmp_path: Path) -> None:
    run = make_served_run(tmp_path / "run")
    with gream_server(run, tmp_path / "log") as (url, server), ThreadPoolExecutor(USERS) as pool:
        answers = [pool.submit(call, f"{url}/v1/recommend", {"user": str(user)}) for user in range(USERS)]
        while not any(answer.done() for answer in answers):
            time.sleep(0.001)
        server.send_signal(signal.SIGTERM)
        done = [answer for answer in answers if answer.exception() is None]
        refused = [answer.exception() for answer in answers if answer not in done]
        # a connection may come too late to be taken; one that was taken is answered
        assert all(isinstance(error, urllib.error.URLError) and "refused" in str(error) for error in refused), refused
        assert {len(answer.result()["items"]) for answer in done} == {10}
        server.wait(60)
        assert server.returncode in (0, -signal.SIGTERM)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.org"])
def test_it_is_open_to_others_with_a_token_only(tmp_path: Path, host: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "GREAM_TOKEN"}
    command = [*GREAM, str(tmp_path), "--host", host]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "is open to others; set GREAM_TOKEN" in done.stderr


def test_vllm_writes_chains_and_is_started_again_when_it_dies(taught: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    asked = {"user": "3", "mode": "reasoning", "explain": True}
    with gream_server(taught, tmp_path / "log", "--reasoning") as (url, server):
        first = call(f"{url}/v1/recommend", asked)
        assert (first["fallback"], len(first["items"])) == ("", 10)
        assert first["chains"][0]["text"]
        assert call(f"{url}/v1/recommend", asked)["items"] == first["items"]
        assert call(f"{url}/v1/recommend", {**asked, "mode": "merged"})["fallback"] == ""
        # its engine is a process of its own: the direct answer does not depend on it
        (engine,) = [child for child in psutil.Process(server.pid).children() if "EngineCore" in child.name()]
        engine.kill()
        deadline, fallbacks = time.monotonic() + 200, set()
        while (answer := call(f"{url}/v1/recommend", asked))["fallback"]:
            assert time.monotonic() < deadline, (tmp_path / "log").read_text()[-3000:]
            fallbacks.add(answer["fallback"])
            time.sleep(0.5)
        assert answer["items"] == first["items"]
        assert any("vLLM starts again" in why for why in fallbacks)
        assert call(f"{url}/ready") == {"ready": True}


def test_nothing_is_lost_while_checkpoints_change_and_the_server_of_chains_dies(taught: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    make_tiny_model(taught / "other", ItemIndex.load(taught / "data" / "toy.index.json"), seed=7)
    users, numbers = [str(user) for user in range(USERS)], itertools.count()
    expected: dict[tuple[str, str], list[str]] = {}
    seen: collections.Counter[str] = collections.Counter()
    faults: list[Any] = []
    with vllm_server(taught / "sft", tmp_path / "vllm") as endpoint:
        (engine,) = [child for child in psutil.Process().children() if "api_server" in " ".join(child.cmdline())]
        options = ("--endpoint", endpoint, "--queue", "64")
        with gream_server(taught, tmp_path / "log", *options) as (url, _):
            models = set()
            for checkpoint in ("other", "sft"):
                models.add(call(f"{url}/admin/reload", {"checkpoint": checkpoint})["new"]["model"])
                for user in users:
                    answer = call(f"{url}/v1/recommend", {"user": user})
                    expected[answer["model"], user] = [item["id"] for item in answer["items"]]

            def client() -> None:
                while (number := next(numbers)) < REQUESTS:
                    user, mode = users[number % USERS], "direct" if number % EVERY else "reasoning"
                    try:
                        answer = call(f"{url}/v1/recommend", {"user": user, "mode": mode})
                        items = [item["id"] for item in answer["items"]]
                        right = mode == "reasoning" and not answer["fallback"]
                        right |= items == expected[answer["model"], user]
                        seen[f"{mode} {bool(answer['fallback'])}"] += 1
                        if not right:
                            faults.append((number, answer))
                    except Exception as error:  # of any kind: it is one that was lost
                        faults.append((number, error))

            threads = [threading.Thread(target=client) for _ in range(CLIENTS)]
            for thread in threads:
                thread.start()
            for step, checkpoint in enumerate(("other", "sft", "other", "sft", "other")):
                while sum(seen.values()) < (step + 1) * REQUESTS // 7 and not faults:
                    time.sleep(0.05)
                call(f"{url}/admin/reload", {"checkpoint": checkpoint})
                if step == 2:
                    os.killpg(engine.pid, signal.SIGKILL)
            for thread in threads:
                thread.join(300)
            metrics = urllib.request.urlopen(f"{url}/metrics", timeout=20).read().decode()
    assert faults == []
    assert sum(seen.values()) == REQUESTS
    assert seen["direct True"] == 0
    assert min(seen["reasoning True"], seen["reasoning False"]) > 20
    assert f"gream_fallbacks_total {seen['reasoning True']}.0" in metrics
