"""Reasoning mode with real vLLM: its offline engine, and its server."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluation_files import make_taught_run
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_server import vllm_server

from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.evaluation import reasoning
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.prompts import read_prompts
from gream_verl.evaluation.reasoning import evaluate_reasoning
from gream_verl.evaluation.results import Evaluation
from gream_verl.evaluation.sampling import Response, VllmSampler

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]
pytest.importorskip("vllm", reason="vLLM is not installed")

LEAKING = {"do_sample": True, "temperature": 0.01, "top_k": 1, "repetition_penalty": 9.0}
ENDS = {"eos_token_id": list(range(500))}
"""Every token of the text vocabulary ends a response."""
USERS = 9


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The taught model, with a hostile generation config."""
    folder = tmp_path_factory.mktemp("taught")
    make_taught_run(folder, USERS)
    (folder / "model" / "generation_config.json").write_text(json.dumps(LEAKING | ENDS))
    return folder


def evaluate(folder: Path, index: str = "tiny.index.json", **options: Any) -> Evaluation:
    prompts, _ = read_prompts(folder / "tiny-test.parquet", "reasoning")
    sampled: dict[str, Any] = {"chains": 4, "max_tokens": 40, "temperature": 0.8, "top_p": 0.95, "beams": 5}
    sampled |= {"engine": "vllm", "constrained": True}
    chosen = EvaluationOptions(**(sampled | options))
    with tempfile.TemporaryDirectory() as temporary:
        progress = Path(temporary) / "progress.jsonl"
        return evaluate_reasoning(folder / "model", prompts, ItemIndex.load(folder / index), chosen, progress)


def without_scores(rows: Any) -> list[Any]:
    return [
        [{name: value for name, value in chain.items() if not name.endswith("_score")} for chain in row["chains"]]
        for row in rows
    ]


class RecordingSampler(VllmSampler):
    """vLLM's sampler, which keeps what it sampled."""

    kept: list[tuple[list[int], Response]] = []  # noqa: RUF012 - the test empties it

    def sample(self, requests: Any) -> list[Response]:
        sampled = super().sample(requests)
        self.kept.extend((list(sequence), response) for (sequence, _), response in zip(requests, sampled, strict=True))
        return sampled


def test_answers_by_the_engine_and_by_the_server(taught: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RecordingSampler.kept.clear()
    monkeypatch.setattr(reasoning, "VllmSampler", RecordingSampler)
    offline = evaluate(taught, ranking="reference")
    assert {len(row["chains"]) for row in offline.rows} == {4}
    # Greedy decoding and a first token that ends the response would show; SID tokens survive decoding.
    assert len({chain["text"] for row in offline.rows for chain in row["chains"]}) > USERS
    assert any("<|a_" in chain["text"] for row in offline.rows for chain in row["chains"])

    # The log-probabilities are those of a plain forward pass: temperature 1, whole vocabulary, no constraint.
    model = AutoModelForCausalLM.from_pretrained(taught / "model", dtype=torch.float32).eval()
    eos = AutoTokenizer.from_pretrained(taught / "model").eos_token_id
    for prompt, response in RecordingSampler.kept:
        with torch.inference_mode():
            log_probs = model(torch.tensor([[*prompt, *response.tokens]])).logits[0].log_softmax(-1)
        plain = [log_probs[len(prompt) - 1 + place, token].item() for place, token in enumerate(response.tokens)]
        assert response.logprobs == pytest.approx(plain, abs=1e-3)
        assert eos not in response.tokens[:-1]
    assert len(RecordingSampler.kept) == 5 * USERS  # with the most likely response

    formed = [chain for row in offline.rows for chain in row["chains"] if chain["format"]]
    assert len(formed) > USERS
    assert all(chain["valid_item"] for chain in formed)
    assert max(len(row["recommended"]) for row in offline.rows) > 1

    constraint = {"gream": {"index_file": str(taught / "tiny.index.json"), "mode": "off"}}
    options = [
        *("--logits-processors", "gream_verl.decoding.vllm_processor:ConstrainedAnswer"),
        *("--additional-config", json.dumps(constraint), "--max-num-seqs", "16", "--max-model-len", "512"),
    ]  # and without --generation-config vllm: the server believes the file
    with vllm_server(taught / "model", taught / "server.log", *options) as url:
        served = evaluate(taught, ranking="reference", engine="server", endpoint=url)
        assert without_scores(served.rows) == without_scores(offline.rows)
        assert [row["greedy_rsvr"] for row in served.rows] == [row["greedy_rsvr"] for row in offline.rows]
        for row, other in zip(served.rows, offline.rows, strict=True):
            assert row["recommended"] == other["recommended"]
            assert row["scores"] == pytest.approx(other["scores"], abs=1e-3)

        searched = evaluate(taught, engine="server", endpoint=url, constrained=False)
        assert any(chain["format"] and not chain["valid_item"] for row in searched.rows for chain in row["chains"])
        assert {len(row["recommended"]) for row in searched.rows} == {5}
