from __future__ import annotations

import json
from pathlib import Path

import pytest
from assets import make_index, make_tiny_model
from evaluation_files import write_prompts

from gream_verl.evaluation.reasoning import evaluate_reasoning

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


def test_vllm_samples_what_the_settings_say_and_nothing_of_the_generation_config(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    index = make_index()
    index.save(tmp_path / "tiny.index.json")
    model = make_tiny_model(tmp_path / "model", index)
    prompts = write_prompts(tmp_path / "tiny-test.parquet", index, 9)

    def evaluate(**options: object) -> list[dict[str, object]]:
        arguments = {"chains": 2, "max_tokens": 12, "beams": 5, "batch_size": 8} | options
        return list(evaluate_reasoning(model, prompts, tmp_path / "tiny.index.json", **arguments).rows)

    rows = evaluate(progress_file=tmp_path / "progress.jsonl")
    assert len(rows) == 9
    assert len((tmp_path / "progress.jsonl").read_text().splitlines()) == 10
    for row in rows:
        assert len(row["chains"]) == 2
        assert row["chains"][0]["text"] != row["chains"][1]["text"]
        assert all(chain["tokens"] <= 12 for chain in row["chains"])
        assert len(row["recommended"]) == 5
    # SID tokens are ordinary tokens and must survive decoding: a random model of this size emits some.
    assert any("<|a_" in chain["text"] or "<|b_" in chain["text"] for row in rows for chain in row["chains"])

    leaking = {"do_sample": True, "temperature": 0.01, "top_k": 1, "repetition_penalty": 9.0, "max_new_tokens": 1}
    (model / "generation_config.json").write_text(json.dumps(leaking))
    again = evaluate(batch_size=32)
    assert [row["chains"] for row in again] == [row["chains"] for row in rows]
    assert [row["chains"] for row in evaluate(seed=1)] != [row["chains"] for row in rows]
