"""Reasoning mode with real vLLM: its offline engine, and its server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from assets import make_index, make_tiny_model, rl_rows, teach_form
from evaluation_files import write_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_server import vllm_server

from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.evaluation import reasoning
from gream_verl.evaluation.prompts import read_prompts
from gream_verl.evaluation.reasoning import evaluate_reasoning
from gream_verl.evaluation.results import Evaluation
from gream_verl.evaluation.sampling import Response, SamplingSettings, VllmSampler
from gream_verl.evaluation.server import Connection, ServerSampler

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]
pytest.importorskip("vllm", reason="vLLM is not installed")

LEAKING = {"do_sample": True, "temperature": 0.01, "top_k": 1, "repetition_penalty": 9.0}
ENDS = {"eos_token_id": list(range(500))}
"""Every token of the text vocabulary ends a response."""
USERS = 9


def test_vllm_samples_what_the_settings_say_and_nothing_of_the_generation_config(tmp_path: Path) -> None:
    index = make_index()
    index.save(tmp_path / "tiny.index.json")
    model = make_tiny_model(tmp_path / "model", index)
    prompts, _ = read_prompts(write_prompts(tmp_path / "tiny-test.parquet", index, USERS), "reasoning")

    def evaluate(**options: object) -> list[dict[str, object]]:
        arguments = {"chains": 2, "max_tokens": 12, "beams": 5, "batch_size": 8} | options
        return list(evaluate_reasoning(model, prompts, tmp_path / "tiny.index.json", **arguments).rows)

    rows = evaluate(progress_file=tmp_path / "progress.jsonl")
    assert len(rows) == USERS
    assert len((tmp_path / "progress.jsonl").read_text().splitlines()) == USERS + 1
    for row in rows:
        assert len(row["chains"]) == 2
        assert row["chains"][0]["text"] != row["chains"][1]["text"]
        assert all(chain["tokens"] <= 12 for chain in row["chains"])
        assert len(row["recommended"]) == 5
    # SID tokens are ordinary tokens and must survive decoding: a random model of this size emits some.
    assert any("<|a_" in chain["text"] or "<|b_" in chain["text"] for row in rows for chain in row["chains"])

    (model / "generation_config.json").write_text(json.dumps(LEAKING | ENDS | {"max_new_tokens": 1}))
    again = evaluate(batch_size=32)
    assert without_scores(again) == without_scores(rows)
    assert without_scores(evaluate(seed=1)) != without_scores(rows)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers in the right form, of which most items have left the catalogue."""
    folder = tmp_path_factory.mktemp("taught")
    known, index = make_index(), make_index(items=12)
    index.save(folder / "tiny.index.json")
    make_tiny_model(folder / "model", known)
    teach_form(folder / "model", known, steps=150)
    (folder / "model" / "generation_config.json").write_text(json.dumps(LEAKING | ENDS))
    pl.DataFrame(rl_rows(index, USERS)).write_parquet(folder / "tiny-test.parquet")
    return folder


def evaluate_answers(folder: Path, **options: Any) -> Evaluation:
    prompts, _ = read_prompts(folder / "tiny-test.parquet", "reasoning")
    arguments = {"ranking": "answers", "chains": 4, "max_tokens": 40, "temperature": 0.8, "top_p": 0.95} | options
    return evaluate_reasoning(folder / "model", prompts, folder / "tiny.index.json", **arguments)


def without_scores(rows: Any) -> list[Any]:
    return [
        [{name: value for name, value in chain.items() if not name.endswith("_score")} for chain in row["chains"]]
        for row in rows
    ]


class RecordingSampler(VllmSampler):
    """vLLM's sampler, which keeps what it sampled."""

    kept: list[tuple[list[int], Response]] = []  # noqa: RUF012 - the test empties it

    def sample(self, sequences: Any, seeds: Any) -> list[list[Response]]:
        sampled = super().sample(sequences, seeds)
        for sequence, responses in zip(sequences, sampled, strict=True):
            self.kept.extend((list(sequence), response) for response in responses)
        return sampled


def test_answers_by_the_engine_and_by_the_server(taught: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    RecordingSampler.kept.clear()
    monkeypatch.setattr(reasoning, "VllmSampler", RecordingSampler)
    offline = evaluate_answers(taught)

    # The log-probabilities are those of a plain forward pass: temperature 1, whole vocabulary, no constraint.
    model = AutoModelForCausalLM.from_pretrained(taught / "model", dtype=torch.float32).eval()
    eos = AutoTokenizer.from_pretrained(taught / "model").eos_token_id
    for prompt, response in RecordingSampler.kept:
        with torch.inference_mode():
            log_probs = model(torch.tensor([[*prompt, *response.tokens]])).logits[0].log_softmax(-1)
        plain = [log_probs[len(prompt) - 1 + place, token].item() for place, token in enumerate(response.tokens)]
        assert response.logprobs == pytest.approx(plain, abs=1e-3)
        assert eos not in response.tokens[:-1]
    assert len(RecordingSampler.kept) == 4 * USERS

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
        served = evaluate_answers(taught, engine="server", endpoint=url)
        assert without_scores(served.rows) == without_scores(offline.rows)
        for row, other in zip(served.rows, offline.rows, strict=True):
            assert row["recommended"] == other["recommended"]
            assert row["scores"] == pytest.approx(other["scores"], abs=1e-3)

        free = evaluate_answers(taught, engine="server", endpoint=url, constrained=False)
        assert any(chain["format"] and not chain["valid_item"] for row in free.rows for chain in row["chains"])

        # A server that constrains to other items is found out before anything is sampled.
        index, known = ItemIndex.load(taught / "tiny.index.json"), make_index()
        others = ItemIndex({item: sid for item, sid in known.sids.items() if sid not in index.items})
        tokenizer = AutoTokenizer.from_pretrained(taught / "model")
        with pytest.raises(InputError, match="does not constrain answers"):
            ServerSampler(Connection(url), SamplingSettings(1, 1.0, 1.0, 8), tokenizer, others)
