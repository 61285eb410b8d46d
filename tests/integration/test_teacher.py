"""The teacher against a real vLLM server, behind proxies that put faults before it, killed and called again."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from assets import make_index, make_tiny_model
from teacher_server import FaultyProxy
from vllm_server import vllm_server

from data_processing.teacher.templates import read_prompts
from gream_verl.core.data_folder import DataFolder, Item
from gream_verl.core.files import write_json

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1200)]

QUESTIONS = int(os.environ.get("GREAM_TEACHER_QUESTIONS", "800"))
"""Questions of the long test; the closing notes state a run with 10,000."""
SHARE = 0.2
TEXTS = ("Good to have at home.", "Made for rainy days.", "Small, loud and cheap.")
CHOICES = [*(json.dumps({"description": text}) for text in TEXTS), "I enjoy high-quality items."]
"""What the server may answer: the last cannot be used."""
CONCURRENCY = 24


@pytest.fixture(scope="module")
def vllm_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    folder = tmp_path_factory.mktemp("server")
    words = [f"{prompt.system} {prompt.user}" for prompt in read_prompts().values()] + CHOICES
    make_tiny_model(folder / "model", make_index(), texts=words, vocabulary=1024)
    options = ("--max-num-seqs", "64", "--generation-config", "vllm")
    with vllm_server(folder / "model", folder / "log", *options) as url:
        yield url


def _catalogue(root: Path, count: int) -> DataFolder:
    folder = DataFolder(root, "many")
    write_json(folder.item, {str(number): vars(Item(f"Item {number}")) for number in range(count)})
    write_json(folder.inter, {"0": ["0", "1", "2"]})
    return folder


def _enrich(folder: DataFolder, *urls: str) -> list[str]:
    extra = json.dumps({"structured_outputs": {"choice": CHOICES}})
    return [
        *(sys.executable, "-m", "gream_verl.cli.main", "data", "enrich", "items", "--model", "tiny"),
        *("--data", str(folder.root), "--dataset", folder.name, "--structure", "none", "--extra", extra),
        *("--max-tokens", "200", "--temperature", "1", "--concurrency", str(CONCURRENCY), "--timeout", "8"),
        *(word for url in urls for word in ("--endpoint", url)),
    ]


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _answers(path: Path) -> list[dict[str, Any]]:
    """Return what is stored. Only a newline ends an answer: a text may hold U+0085, at which str.splitlines cuts."""
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def test_nothing_is_lost_or_doubled_behind_faults_and_after_kills(vllm_url: str, tmp_path: Path) -> None:
    folder = _catalogue(tmp_path, QUESTIONS)
    proxies = [FaultyProxy(vllm_url, share=SHARE, slow=10, seed=seed) for seed in (0, 1)]
    with proxies[0].server as first, proxies[1].server as second:
        command = _enrich(folder, first.url, second.url)
        for share in (0.3, 0.7):
            run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            while _lines(folder.teacher) < share * QUESTIONS:
                assert run.poll() is None, run.stderr and run.stderr.read().decode()[-3000:]
                time.sleep(0.05)
            run.kill()
            run.wait(30)
            assert not folder.enriched.exists()
        before = _lines(folder.teacher)
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        answered = _answers(folder.teacher)
        faults = proxies[0].faults + proxies[1].faults
        delivered = proxies[0].delivered + proxies[1].delivered
        asked = len(first.requests) + len(second.requests)

        again = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert again.returncode == 0, again.stderr[-3000:]
        assert len(first.requests) + len(second.requests) == asked, "an answer was asked for again"

    print(f"\n{QUESTIONS} questions, {len(answered)} answers, {asked} attempts, faults {dict(faults)}")
    print(done.stdout[-1500:])
    assert set(faults) >= {"429", "500", "reset", "garbage"}
    # Every answer is kept once; what the server answered twice was under way when a run was killed.
    assert len({row["key"] for row in answered}) == len(answered)
    twice = sum(count - 1 for count in delivered.values())
    slow = faults["slow"]  # answered after the client had given up
    assert len(answered) <= len(delivered) <= len(answered) + 2 * CONCURRENCY + slow
    assert twice <= 2 * CONCURRENCY + slow
    # Only what the server can say is an answer, and only what can be used is text.
    assert {row["text"] for row in answered} <= set(CHOICES)
    enriched = json.loads(folder.enriched.read_text())
    assert {fields["description"] for fields in enriched.values()} == set(TEXTS)
    # A question is asked again while its answer cannot be used, three times at most; no other is left without a text.
    rounds: dict[str, list[str]] = defaultdict(list)
    for row in answered:
        rounds[row["about"]].append(row["text"])
    assert len(rounds) == QUESTIONS
    for item, texts in rounds.items():
        assert set(texts[:-1]) <= {CHOICES[-1]}
        assert (item in enriched) == (texts[-1] != CHOICES[-1])
        assert item in enriched or len(texts) == 3
    assert before >= 0.7 * QUESTIONS


def test_the_server_keeps_to_the_schema_of_an_answer(vllm_url: str, tmp_path: Path) -> None:
    """A random model, told the schema, writes a description and no more, in any Unicode; a cut one is not used."""
    folder = _catalogue(tmp_path, 8)
    command = _enrich(folder, vllm_url)
    del command[command.index("--structure") : command.index("--max-tokens")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    answered = _answers(folder.teacher)
    whole = [row for row in answered if row["finish"] == "stop"]
    assert answered
    assert all(row["text"].startswith("{") for row in answered)
    assert {row["finish"] for row in answered} <= {"stop", "length"}
    assert all(re.fullmatch(r'\{\s*"description"\s*:\s*".*"\s*\}', row["text"], re.DOTALL) for row in whole)
    enriched = json.loads(folder.enriched.read_text()) if folder.enriched.exists() else {}
    assert set(enriched) <= {row["about"] for row in whole}
