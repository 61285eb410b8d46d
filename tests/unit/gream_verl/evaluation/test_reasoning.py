from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from assets import make_index, make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.evaluation import reasoning
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.prompts import read_prompts
from gream_verl.evaluation.reasoning import evaluate_reasoning
from gream_verl.evaluation.results import Evaluation
from gream_verl.evaluation.sampling import Response

SAMPLED = {"chains": 4, "max_tokens": 32, "batch_size": 28}


def evaluate(folder: Path, progress: Path | None = None, **options: object) -> Evaluation:
    prompts, _ = read_prompts(folder / "tiny-test.parquet", "reasoning")
    chosen = EvaluationOptions(**({"engine": "hf", "max_tokens": 6, "batch_size": 4} | options))
    index = ItemIndex.load(folder / "tiny.index.json")
    with tempfile.TemporaryDirectory() as temporary:
        file = progress or Path(temporary) / "progress.jsonl"
        return evaluate_reasoning(folder / "model", prompts, index, chosen, file)


def token_scores(model: object, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
    """Return the log-probability of every token of a response, by one plain forward pass."""
    with torch.inference_mode():
        log_probs = model(torch.tensor([[*prompt, *response]])).logits[0].float().log_softmax(-1)
    return [log_probs[len(prompt) - 1 + place, token].item() for place, token in enumerate(response)]


class ScriptedSampler:
    """Answers each prompt with given tokens, the first also as the most likely, so that a random model finishes."""

    def __init__(self, responses: Sequence[Sequence[int]]) -> None:
        self.responses = [Response(tokens, [-1.0] * len(tokens)) for tokens in (responses[0], *responses)]

    def sample(self, requests: Sequence[object]) -> list[Response]:
        return self.responses * (len(requests) // len(self.responses))


@pytest.mark.parametrize("letter_by_letter", [False, True])
def test_items_are_ranked_given_the_sampled_tokens_and_chains_are_merged(
    world: Path, monkeypatch: pytest.MonkeyPatch, letter_by_letter: bool
) -> None:
    index = ItemIndex.load(world / "tiny.index.json")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32).eval()
    target = index.text("5")  # the target of user 0
    begun = ["<think>likes it</think><answer>", "<think>cut sho"]
    parts = [list(text) if letter_by_letter else [text] for text in begun]
    tokens = [[token for part in some for token in tokenizer.encode(part)] for some in parts]
    scripted = ScriptedSampler([[*tokens[0], *tokenizer.encode(f"{target}</answer>")], tokens[1]])
    monkeypatch.setattr(reasoning, "HuggingFaceSampler", lambda *_: scripted)
    evaluation = evaluate(world, chains=2, max_tokens=60)
    row = evaluation.rows[0]
    assert row["target"] == "5"
    assert [chain["rsvr"] for chain in row["chains"]] == [1.0, 0.0]
    assert [chain["reached_answer"] for chain in row["chains"]] == [1.0, 0.0]
    assert [chain["item"] for chain in row["chains"]] == ["5", None]
    assert (row["rsvr"], row["greedy_rsvr"]) == (0.5, 1.0)

    prompt = "<|im_start|>system\nRecommend.<|im_end|>\n<|im_start|>user\n"
    prompt += index.text("0") + " Next?<|im_end|>\n<|im_start|>assistant\n"
    closed = [tokens[0], [*tokens[1], *tokenizer.encode("</think><answer>")]]
    probability = {}
    for item in index.sids:
        sid = tokenizer.encode(index.text(item))
        scores = [sum(token_scores(model, [*tokenizer.encode(prompt), *chain], sid)) for chain in closed]
        probability[item] = sum(map(np.exp, scores)) / 2
    del probability["0"]  # the history
    expected = sorted(probability, key=lambda item: -probability[item])
    assert row["recommended"] == expected
    assert row["scores"] == pytest.approx([np.log(probability[item]) for item in expected], abs=1e-4)

    assert evaluation.metrics["format"] == evaluation.metrics["valid_item"] == 0.5
    hits = sum(row["target"] == "5" for row in evaluation.rows) / len(evaluation.rows)
    assert evaluation.metrics["pass@1"] == pytest.approx(hits / 2)
    assert evaluation.metrics["pass@2"] == pytest.approx(hits)


def test_chains_are_measured_by_the_target_after_them(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = ItemIndex.load(world / "tiny.index.json")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32).eval()
    responses = ["<think>likes it</think><answer>", "<think>cut", "so<think>likes it</think><answer>"]
    tokens = [tokenizer.encode(text) for text in responses]
    scripted = ScriptedSampler([[*some, *tokenizer.encode(index.text("5"))] for some in tokens])
    monkeypatch.setattr(reasoning, "HuggingFaceSampler", lambda *_: scripted)
    evaluation = evaluate(world, chains=3, beams=0, max_tokens=60)
    row, shown = evaluation.rows[0], index.text("0")
    prompt = f"<|im_start|>system\nRecommend.<|im_end|>\n<|im_start|>user\n{shown} Next?<|im_end|>\n"
    plain = f"<|im_start|>user\nHistory: {shown} Next item?<|im_end|>\n"
    start, sid = "<|im_start|>assistant\n", tokenizer.encode(index.text("5"))
    closed = ["", *responses]
    closed[2] += index.text("5") + "</think><answer>"
    scores = [
        token_scores(model, tokenizer.encode((prompt if chain else plain) + start + chain), sid) for chain in closed
    ]
    p = np.exp(scores[1])  # of the only well-formed chain
    expected = p[0] * (1 - p[1]) * (1 / 3) ** 0.5 + p[0] * p[1] * (1 - p[2]) * (2 / 3) ** 0.5 + p.prod()
    alone, *after = map(sum, scores)
    assert row["expected_rsvr"] == pytest.approx(expected / 3, abs=1e-4)
    assert row["target_logprob_without_chain"] == pytest.approx(alone, abs=1e-3)
    of_mean = np.log(np.mean(np.exp(after)))
    assert row["target_logprob"] == pytest.approx(of_mean, abs=1e-3)
    assert row["chain_gain"] == pytest.approx(of_mean - alone, abs=1e-3)
    for name in ("expected_rsvr", "target_logprob", "chain_gain"):
        assert evaluation.metrics[name] == pytest.approx(np.mean([row[name] for row in evaluation.rows]))


def test_answers_are_ranked_as_the_authors_do(taught: Path) -> None:
    evaluation = evaluate(taught, ranking="reference", temperature=0.9, top_p=0.95, **SAMPLED)
    index = ItemIndex.load(taught / "tiny.index.json")
    tokenizer = AutoTokenizer.from_pretrained(taught / "model")
    model = AutoModelForCausalLM.from_pretrained(taught / "model", dtype=torch.float32).eval()
    prompts, _ = read_prompts(taught / "tiny-test.parquet", "reasoning")
    lengths = []
    for prompt, row in zip(prompts, evaluation.rows, strict=True):
        text = tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, tokenize=False)
        best: dict[str, float] = {}
        for chain in row["chains"]:
            items = [item for item in index.sids if f"<answer>{index.text(item)}</answer>" in chain["text"]]
            tokens = tokenizer(chain["text"])["input_ids"]
            ended = [tokenizer.eos_token_id] * (len(tokens) < SAMPLED["max_tokens"])
            score = sum(token_scores(model, tokenizer(text)["input_ids"], [*tokens, *ended]))
            assert chain["response_score"] == pytest.approx(score, abs=1e-3)
            for item in set(items) - set(prompt.history):
                best[item] = max(score, best.get(item, -np.inf))
        assert row["recommended"] == sorted(best, key=lambda item: -best[item])
        assert row["scores"] == pytest.approx([best[item] for item in row["recommended"]], abs=1e-3)
        lengths.append(len(best))
    assert max(lengths) > 1


def test_constrained_answers_are_items_and_free_ones_need_not_be(taught: Path) -> None:
    index = ItemIndex.load(taught / "tiny.index.json")
    for constrained in (True, False):
        rows = evaluate(taught, beams=0, constrained=constrained, **SAMPLED).rows
        formed = [chain for row in rows for chain in row["chains"] if chain["format"]]
        assert len(formed) > len(rows)
        assert all(chain["valid_item"] for chain in formed) == constrained
        for chain in formed:
            assert (chain["item"] is not None) == bool(chain["valid_item"])
            if chain["item"] is not None:
                assert chain["text"].endswith(f"<answer>{index.text(chain['item'])}</answer>")
        assert "recommended" not in rows[0]


def test_the_batch_size_changes_nothing_and_the_seed_does(taught: Path) -> None:
    options = {"chains": 2, "max_tokens": 32, "temperature": 1.2, "top_p": 1.0, "constrained": True}
    expected, found, other = (
        evaluate(taught, **options, batch_size=size, seed=seed).rows for size, seed in ((4, 0), (64, 0), (64, 1))
    )
    for row, same in zip(expected, found, strict=True):
        assert [chain["text"] for chain in row["chains"]] == [chain["text"] for chain in same["chains"]]
        assert row["recommended"] == same["recommended"]
    assert [row["chains"] for row in other] != [row["chains"] for row in expected]
    assert len({chain["tokens"] for row in expected for chain in row["chains"]}) > 3


def test_at_temperature_0_the_chain_is_that_of_the_most_likely_tokens(taught: Path) -> None:
    drawn = {"max_tokens": 32, "batch_size": 28, "constrained": True}
    likely, again = (evaluate(taught, temperature=0.0, seed=seed, **drawn) for seed in (0, 7))
    assert likely.rows == again.rows
    sampled = evaluate(taught, temperature=0.8, **drawn)
    for row, other in zip(likely.rows, sampled.rows, strict=True):
        assert row["rsvr"] == row["greedy_rsvr"] == other["greedy_rsvr"]
        assert len(row["chains"]) == 1
    assert likely.rows != sampled.rows


def test_pass_at_k_for_every_k_up_to_the_chains(world: Path) -> None:
    for chains, expected in ((1, ["pass@1"]), (7, ["pass@1", "pass@5", "pass@7"])):
        metrics = evaluate(world, chains=chains, beams=0, max_tokens=2).metrics
        assert [name for name in metrics if name.startswith("pass@")] == expected
        assert "recall@10" not in metrics


def test_the_generation_config_in_the_folder_changes_nothing(taught: Path) -> None:
    short = {"chains": 2, "max_tokens": 8}
    expected = evaluate(taught, **short)
    file = taught / "model" / "generation_config.json"
    before = file.read_text()
    leaking = {"do_sample": True, "temperature": 0.01, "top_k": 1, "repetition_penalty": 9.0, "max_new_tokens": 1}
    ends = [*range(500)]  # every token of the text vocabulary ends a response
    file.write_text(json.dumps(json.loads(before) | leaking | {"eos_token_id": ends}))
    try:
        assert evaluate(taught, **short).rows == expected.rows
    finally:
        file.write_text(before)


def test_a_run_that_was_cut_anywhere_goes_on_to_the_same_rows(world: Path, tmp_path: Path) -> None:
    progress = tmp_path / "progress.jsonl"
    options = {"chains": 2, "batch_size": 6}  # pieces of two users, and one of the last
    expected = evaluate(world, progress, **options)
    assert expected.settings["users_from_progress"] == 0
    whole = progress.read_bytes()
    lines = whole.splitlines(keepends=True)
    for done in (0, 3, 7):
        progress.write_bytes(b"".join(lines[: 1 + done]) + b'{"user": "cut sh')
        resumed = evaluate(world, progress, **options)
        assert resumed.rows == expected.rows
        assert resumed.settings["users_from_progress"] == done
        assert sorted(progress.read_bytes().splitlines()) == sorted(whole.splitlines())
    evaluate(world, progress, **options, concurrency=3, timeout=9)  # which decide no row
    assert progress.read_bytes().count(b"\n") == 8


def other_weights(folder: Path) -> None:
    make_tiny_model(folder / "model", make_index(), seed=1)


def other_template(folder: Path) -> None:
    file = folder / "model" / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_start|>", "<think>"))


def other_end(folder: Path) -> None:
    file = folder / "model" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<|a_1|>"}))


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (nothing, {"drop_history": False}),
        (nothing, {"score": "items"}),
        (nothing, {"merge": "max"}),
        (nothing, {"ranking": "reference"}),
        (nothing, {"constrained": True}),
        (nothing, {"beams": 4}),
        (nothing, {"chains": 3}),
        (nothing, {"temperature": 0.5}),
        (nothing, {"top_p": 0.5}),
        (nothing, {"max_tokens": 5}),
        (nothing, {"seed": 1}),
        (other_weights, {}),
        (other_template, {}),
        (other_end, {}),
    ],
)
def test_a_run_is_not_gone_on_with_when_anything_that_decides_a_row_differs(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None],
    options: dict[str, object],
) -> None:  # fmt: skip
    folder, progress = shutil.copytree(world, tmp_path / "world"), tmp_path / "progress.jsonl"

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reasoning, "in_shards", stop)
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, progress)
    change(folder)
    with pytest.raises(InputError, match="replace them with --overwrite"):
        evaluate(folder, progress, **options)
    with pytest.raises(KeyboardInterrupt):
        evaluate(folder, progress, **options, overwrite=True)
