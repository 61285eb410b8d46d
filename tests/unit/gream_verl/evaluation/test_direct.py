from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.evaluation.direct import evaluate_direct
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.prompts import Prompt, read_prompts
from gream_verl.evaluation.results import Evaluation


def prompts_of(world: Path) -> list[Prompt]:
    return read_prompts(world / "tiny-test.parquet", "direct")[0]


def evaluate(world: Path, **options: object) -> Evaluation:
    index = ItemIndex.load(world / "tiny.index.json")
    return evaluate_direct(world / "model", prompts_of(world), index, EvaluationOptions(**options))


def brute_force(model: Any, tokenizer: Any, index: ItemIndex, prompt: Prompt) -> list[str]:
    """Rank all items but the history, by one plain forward pass for each."""
    text = "<|im_start|>system\nRecommend.<|im_end|>\n<|im_start|>user\n"
    text += "".join(index.texts(prompt.history)) + " Next?<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text)["input_ids"]
    scores = {}
    for item in index.sids:
        sid = tokenizer(index.text(item))["input_ids"]
        with torch.inference_mode():
            log_probs = model(torch.tensor([ids + sid])).logits[0].log_softmax(-1)
        scores[item] = sum(log_probs[len(ids) - 1 + place, token].item() for place, token in enumerate(sid))
    return [item for item in sorted(scores, key=lambda item: -scores[item]) if item not in prompt.history]


def test_all_items_but_the_history_are_ranked_as_brute_force_ranks_them(world: Path) -> None:
    evaluation = evaluate(world)
    index = ItemIndex.load(world / "tiny.index.json")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32).eval()
    for prompt, row in zip(prompts_of(world), evaluation.rows, strict=True):
        assert (row["user"], row["target"]) == (prompt.user, prompt.target)
        assert row["recommended"] == brute_force(model, tokenizer, index, prompt)
        found = dict(zip(row["recommended"], row["scores"], strict=True))
        assert row["target_logprob"] == pytest.approx(found.get(row["target"], row["target_logprob"]), abs=1e-3)
        assert 0 < row["expected_rsvr"] < 1
    hits = sum(1 <= rank <= 10 for rank in evaluation.ranks)
    assert evaluation.metrics["recall@10"] == pytest.approx(hits / len(evaluation.rows))
    for name in ("rsvr", "expected_rsvr", "target_logprob"):
        assert evaluation.metrics[name] == pytest.approx(sum(row[name] for row in evaluation.rows) / 7)


def test_the_history_stays_when_it_is_not_dropped(world: Path) -> None:
    assert all(len(row["recommended"]) == 24 for row in evaluate(world, drop_history=False).rows)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_batch_size_changes_nothing(world: Path, batch_size: int) -> None:
    expected, found = evaluate(world, batch_size=3, beams=5), evaluate(world, batch_size=batch_size, beams=5)
    assert [row["recommended"] for row in found.rows] == [row["recommended"] for row in expected.rows]
    assert found.metrics == expected.metrics


def test_the_generation_config_in_the_folder_changes_nothing(world: Path) -> None:
    expected = evaluate(world)
    file = world / "model" / "generation_config.json"
    before = file.read_text()
    leaking = {"do_sample": True, "temperature": 0.1, "top_k": 1, "num_beams": 1, "max_new_tokens": 1}
    file.write_text(json.dumps(json.loads(before) | leaking))
    try:
        assert evaluate(world).rows == expected.rows
    finally:
        file.write_text(before)


def test_an_index_with_unknown_tokens_is_refused(world: Path) -> None:
    [prompt, *_] = prompts_of(world)
    sids = ItemIndex.load(world / "tiny.index.json").sids
    index = ItemIndex({**sids, "new": ("<|a_1|>", "<|b_1|>", "<|c_77|>")})
    with pytest.raises(InputError, match=r"<\|c_77\|> is not one token.*gream model extend"):
        evaluate_direct(world / "model", [prompt], index, EvaluationOptions())
