from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from assets import make_index, make_tiny_model
from evaluation_files import write_prompts
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from gream_verl.evaluation import reasoning
from gream_verl.evaluation.ranking import merge_rankings
from gream_verl.evaluation.reasoning import evaluate_reasoning, up_to_answer
from gream_verl.evaluation.results import Evaluation, ProgressFile
from gream_verl.evaluation.sampling import SamplingSettings, choose
from gream_verl.files import InputError
from gream_verl.semantic_ids import ItemIndex

USERS = 7


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reasoning")
    index = make_index()
    index.save(folder / "tiny.index.json")
    make_tiny_model(folder / "model", index)
    write_prompts(folder / "tiny-test.parquet", index, USERS)
    return folder


def evaluate(world: Path, **options: object) -> Evaluation:
    arguments = {"engine": "hf", "max_tokens": 6, "beams": 30, "batch_size": 4} | options
    return evaluate_reasoning(world / "model", world / "tiny-test.parquet", world / "tiny.index.json", **arguments)


class ScriptedSampler:
    """Answers with given texts, so that a random model can be seen to finish."""

    def __init__(self, tokenizer: object, texts: Sequence[str]) -> None:
        self.responses = [tokenizer(text)["input_ids"] for text in texts]

    def sample(self, sequences: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[list[int]]]:
        return [self.responses for _ in sequences]


@pytest.mark.parametrize(
    ("response", "kept", "reached"),
    [
        ("<think>a</think>b<answer>c</answer>", "<think>a</think>b<answer>", True),
        ("<think>a</think>b<answer>", "<think>a</think>b<answer>", True),
        ("<think>a</think>b<answ", "<think>a</think>b<answ<answer>", False),
        ("<think>a", "<think>a</think><answer>", False),
        ("<think><answer>x</answer>", "<think><answer>x</answer></think><answer>", False),
        ("a", "a<answer>", False),
        ("", "<answer>", False),
    ],
)
def test_a_chain_is_kept_up_to_its_answer_and_closed_when_it_has_none(response: str, kept: str, reached: bool) -> None:
    assert up_to_answer(response) == (kept, reached)


@given(st.text(alphabet="ab<>/", max_size=6), st.text(alphabet="ab<>/", max_size=6))
def test_what_is_kept_always_ends_in_one_answer_tag_after_the_thinking(thought: str, rest: str) -> None:
    for response in (
        thought,
        f"<think>{thought}",
        f"<think>{thought}</think>{rest}",
        f"{thought}</think>{rest}<answer>",
    ):
        kept, _ = up_to_answer(response)
        assert kept.endswith("<answer>")
        assert kept.startswith(response) or response.startswith(kept)
        assert kept.count("<think>") <= kept.count("</think>")


def test_the_second_stage_ranks_real_items_given_the_chain_and_merges_chains(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = ItemIndex.load(world / "tiny.index.json")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32).eval()
    target = index.text("5")  # the target of user 0
    texts = [f"<think>likes it</think><answer>{target}</answer>", "<think>cut sho"]
    monkeypatch.setattr(reasoning, "HuggingFaceSampler", lambda *_: ScriptedSampler(tokenizer, texts))
    evaluation = evaluate(world, chains=2)
    row = evaluation.rows[0]
    assert row["target"] == "5"
    assert [chain["rsvr"] for chain in row["chains"]] == [1.0, 0.0]
    assert [chain["reached_answer"] for chain in row["chains"]] == [1.0, 0.0]
    assert row["rsvr"] == 0.5

    prompt = "<|im_start|>system\nRecommend.<|im_end|>\n<|im_start|>user\n"
    prompt += index.text("0") + " Next?<|im_end|>\n<|im_start|>assistant\n"
    probability = {}
    for item in index.sids:
        sid = tokenizer(index.text(item))["input_ids"]
        total = 0.0
        for kept in ("<think>likes it</think><answer>", "<think>cut sho</think><answer>"):
            ids = tokenizer(prompt + kept)["input_ids"]
            with torch.inference_mode():
                log_probs = model(torch.tensor([ids + sid])).logits[0].log_softmax(-1)
            total += np.exp(sum(log_probs[len(ids) - 1 + place, token].item() for place, token in enumerate(sid)))
        probability[item] = total / 2
    del probability["0"]  # the history
    expected = sorted(probability, key=lambda item: -probability[item])
    assert row["recommended"] == expected
    assert row["scores"] == pytest.approx([np.log(probability[item]) for item in expected], abs=1e-4)

    assert evaluation.metrics["format"] == evaluation.metrics["valid_item"] == 0.5
    assert evaluation.metrics["reached_answer"] == 0.5
    hits = sum(row["target"] == "5" for row in evaluation.rows) / USERS
    assert evaluation.metrics["pass@1"] == pytest.approx(hits / 2)
    assert evaluation.metrics["pass@2"] == pytest.approx(hits)


def test_the_batch_size_changes_nothing_and_the_seed_does(world: Path) -> None:
    expected = evaluate(world, batch_size=4, chains=2)
    assert len(expected.rows) == USERS
    for batch_size in (1, 64):
        found = evaluate(world, batch_size=batch_size, chains=2)
        for row, other in zip(expected.rows, found.rows, strict=True):
            assert [chain["text"] for chain in row["chains"]] == [chain["text"] for chain in other["chains"]]
            assert row["recommended"] == other["recommended"]
    other = evaluate(world, chains=2, seed=1)
    assert [row["chains"] for row in other.rows] != [row["chains"] for row in expected.rows]
    texts = [chain["text"] for row in expected.rows for chain in row["chains"]]
    assert len(set(texts)) > USERS


def test_the_generation_config_in_the_folder_changes_nothing(world: Path) -> None:
    expected = evaluate(world)
    file = world / "model" / "generation_config.json"
    before = file.read_text()
    leaking = {"do_sample": True, "temperature": 0.01, "top_k": 1, "repetition_penalty": 9.0, "max_new_tokens": 1}
    file.write_text(json.dumps(json.loads(before) | leaking))
    try:
        assert evaluate(world).rows == expected.rows
    finally:
        file.write_text(before)


def test_without_beams_only_the_free_answers_are_scored(world: Path) -> None:
    evaluation = evaluate(world, beams=0)
    assert "recommended" not in evaluation.rows[0]
    assert "recall@10" not in evaluation.metrics
    assert 0 <= evaluation.metrics["rsvr"] <= 1


def test_a_killed_run_goes_on_where_it_stopped(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = evaluate(world)
    progress = tmp_path / "progress.jsonl"
    evaluate(world, progress_file=progress)
    lines = progress.read_text().splitlines(keepends=True)
    assert len(lines) == USERS + 1
    progress.write_text("".join(lines[:5]) + lines[5][:20])  # killed while writing the fifth user

    computed: list[str] = []
    whole = reasoning._recommend

    def counted(prompts: Sequence[reasoning.Prompt], *arguments: object) -> list[dict[str, object]]:
        computed.extend(prompt.user for prompt in prompts)
        return whole(prompts, *arguments)

    monkeypatch.setattr(reasoning, "_recommend", counted)
    resumed = evaluate(world, progress_file=progress)
    assert computed == ["4", "5", "6"]
    assert [row["user"] for row in resumed.rows] == [row["user"] for row in expected.rows]
    assert [row["recommended"] for row in resumed.rows] == [row["recommended"] for row in expected.rows]

    computed.clear()
    assert evaluate(world, progress_file=progress).rows == resumed.rows
    assert computed == []
    evaluate(world, progress_file=progress, temperature=1.0)
    assert len(computed) == USERS


def test_a_progress_file_of_other_settings_is_begun_anew(tmp_path: Path) -> None:
    ProgressFile(tmp_path / "p.jsonl", {"seed": 0}).add([{"user": "a"}])
    assert ProgressFile(tmp_path / "p.jsonl", {"seed": 0}).rows == {"a": {"user": "a"}}
    assert ProgressFile(tmp_path / "p.jsonl", {"seed": 1}).rows == {}


@given(
    st.lists(st.floats(-4, 4), min_size=2, max_size=8),
    st.floats(0.3, 2.0),
    st.floats(0.05, 1.0),
)
@settings(deadline=None)
def test_draws_follow_the_nucleus_of_the_distribution(logits: list[float], temperature: float, top_p: float) -> None:
    probabilities = torch.tensor(logits).div(temperature).softmax(-1).tolist()
    order = sorted(range(len(logits)), key=lambda token: -probabilities[token])
    nucleus: dict[int, float] = {}
    for token in order:
        if sum(nucleus.values()) >= top_p - 1e-6:
            break
        nucleus[token] = probabilities[token]
    draws = 2000
    uniforms = (torch.arange(draws) + 0.5) / draws
    drawn = choose(torch.tensor(logits).expand(draws, -1), uniforms, temperature, top_p)
    share = torch.bincount(drawn, minlength=len(logits)) / draws
    edge = abs(sum(list(nucleus.values())) - top_p) < 1e-5  # the last token may or may not belong
    for token in range(len(logits)):
        expected = nucleus.get(token, 0.0) / sum(nucleus.values())
        assert share[token].item() == pytest.approx(expected, abs=2 / draws) or edge


def test_a_draw_of_the_largest_number_stays_inside_the_nucleus() -> None:
    largest = torch.tensor([1.0 - 2**-24])
    assert choose(torch.tensor([[0.0, 5.0, -50.0]]), largest, 1.0, 1.0).item() in (0, 1)
    assert choose(torch.tensor([[0.0, 5.0, 1.0]]), largest, 1.0, 0.5).item() == 1


def test_merged_scores_are_the_mean_probability_over_chains() -> None:
    merged = merge_rankings([{"a": np.log(0.5), "b": np.log(0.1)}, {"b": np.log(0.7), "c": np.log(0.2)}], 2)
    assert list(merged) == ["b", "a"]
    assert np.exp(list(merged.values())) == pytest.approx([0.4, 0.25])


@pytest.mark.parametrize(
    "wrong", [{"chains": 0}, {"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_tokens": 0}]
)
def test_settings_that_cannot_be_sampled_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="cannot sample"):
        SamplingSettings(**({"chains": 1, "temperature": 1.0, "top_p": 1.0, "max_tokens": 9} | wrong))
