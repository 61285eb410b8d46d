"""The teacher against a real vLLM server, after a proxy that puts faults before it, killed and called again."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from assets import make_index, make_tiny_model
from teacher_server import FaultyProxy
from vllm_server import vllm_server

from data_processing.teacher.templates import read_prompts
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.files import write_json

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

QUESTIONS = int(os.environ.get("GREAM_TEACHER_QUESTIONS", "200"))
SHARE = 0.2
TEXTS = ("Good to have at home.", "Made for rainy days.", "Small, loud and cheap.")
CHOICES = [*(json.dumps({"description": text}) for text in TEXTS), "I enjoy high-quality items."]
"""The answers that the server may give; the last cannot be used."""
CONCURRENCY = 24
SETTINGS = {"model": "tiny", "max_tokens": 200, "temperature": 1, "concurrency": CONCURRENCY, "timeout": 8}
CHOOSE = {"structure": "none", "extra": {"structured_outputs": {"choice": CHOICES}}}


@pytest.fixture(scope="module")
def vllm_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    folder = tmp_path_factory.mktemp("server")
    words = [f"{prompt.system} {prompt.user}" for prompt in read_prompts().values()] + CHOICES
    make_tiny_model(folder / "model", make_index(), texts=words, vocabulary=1024)
    options = ("--max-num-seqs", "64", "--generation-config", "vllm")
    with vllm_server(folder / "model", folder / "log", *options) as url:
        yield url


def _command(run: Path, count: int, url: str, **settings: Any) -> list[str]:
    """Write a data set of so many items; return the command that asks a server about them."""
    folder = DataFolder(run / "data", "many")
    write_json(folder.item, {str(number): {"title": f"Item {number}"} for number in range(count)})
    write_json(folder.inter, {"0": ["0", "1", "2"]})
    (run / "teacher.yaml").write_text(yaml.safe_dump(SETTINGS | {"endpoint": url} | settings))
    return [
        sys.executable,
        "-m",
        "gream_verl.cli.main",
        "data",
        "enrich",
        str(run),
        "items",
        "-c",
        f"{run}/teacher.yaml",
    ]


def _call(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _answers(folder: DataFolder) -> list[tuple[str, str, str]]:
    """Return item, text and finish of every stored answer, in the order in which they came."""
    with closing(sqlite3.connect(folder.teacher)) as store:
        return store.execute("SELECT subject, text, finish FROM answers ORDER BY rowid").fetchall()


def test_nothing_is_lost_or_doubled_after_faults_and_kills(vllm_url: str, tmp_path: Path) -> None:
    proxy = FaultyProxy(vllm_url, share=SHARE, slow=10, seed=0)
    folder = DataFolder(tmp_path / "data", "many")
    with proxy.server as server:
        command = _command(tmp_path, QUESTIONS, server.url, **CHOOSE)
        for share in (0.3, 0.7):
            run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            while len(proxy.delivered) < share * QUESTIONS:
                assert run.poll() is None, run.stderr and run.stderr.read().decode()[-3000:]
                time.sleep(0.05)
            run.kill()
            run.wait(30)
            assert not folder.enriched.exists()
        before = len(_answers(folder))
        printed = _call(command)
        answered, asked = _answers(folder), len(server.requests)
        _call(command)
        assert len(server.requests) == asked, "an answer was asked for again"

    print(f"\n{QUESTIONS} questions, {len(answered)} answers, {asked} attempts, faults {dict(proxy.faults)}")
    print(printed[-1500:])
    assert set(proxy.faults) >= {"429", "500", "reset", "garbage"}
    # Every answer is kept once. The server answers twice what was in flight at a kill, or came after the timeout.
    lost = 2 * CONCURRENCY + proxy.faults["slow"]
    assert len(answered) <= len(proxy.delivered) <= len(answered) + lost
    assert sum(count - 1 for count in proxy.delivered.values()) <= lost
    assert before >= 0.7 * QUESTIONS - lost
    # Only what the server can say is an answer, and only what can be used is text.
    assert {text for _, text, _ in answered} <= set(CHOICES)
    enriched = json.loads(folder.enriched.read_text())
    assert {fields["description"] for fields in enriched.values()} == set(TEXTS)
    # A question is asked again while its answer cannot be used, three times at most; no other is left without a text.
    rounds: dict[str, list[str]] = defaultdict(list)
    for item, text, _ in answered:
        rounds[item].append(text)
    assert len(rounds) == QUESTIONS
    for item, texts in rounds.items():
        assert set(texts[:-1]) <= {CHOICES[-1]}
        assert (item in enriched) == (texts[-1] != CHOICES[-1])
        assert item in enriched or len(texts) == 3


def test_the_server_keeps_to_the_schema_of_an_answer(vllm_url: str, tmp_path: Path) -> None:
    """A random model under the schema writes a description and no more, in any Unicode; a cut one is not used."""
    _call(_command(tmp_path, 8, vllm_url))
    folder = DataFolder(tmp_path / "data", "many")
    answered = _answers(folder)
    assert answered
    assert all(text.startswith("{") for _, text, _ in answered)
    assert {finish for *_, finish in answered} <= {"stop", "length"}
    whole = {item: text for item, text, finish in answered if finish == "stop"}
    form = re.compile(r'\{\s*"description"\s*:\s*".*"\s*\}', re.DOTALL)
    assert all(form.fullmatch(text) for text in whole.values())
    assert set(json.loads(folder.enriched.read_text()) if folder.enriched.exists() else {}) <= set(whole)
