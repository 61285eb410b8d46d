from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.decoding.answer_automaton import AnswerAutomaton
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.sampling import HuggingFaceSampler, choose
from gream_verl.model.loading import load_model, load_tokenizer

PROMPTS = [[40, 41, 42, 43, 44], [50, 51]]


def token_scores(model: object, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
    """Return the log-probability of every token of a response, by one plain forward pass."""
    with torch.inference_mode():
        log_probs = model(torch.tensor([[*prompt, *response]])).logits[0].float().log_softmax(-1)
    return [log_probs[len(prompt) - 1 + place, token].item() for place, token in enumerate(response)]


@pytest.mark.parametrize("constrained", [False, True])
def test_log_probabilities_are_those_of_the_model_itself(taught: Path, constrained: bool) -> None:
    model, tokenizer = load_model(taught / "model", inference=True), load_tokenizer(taught / "model")
    automaton = AnswerAutomaton.build(ItemIndex.load(taught / "tiny.index.json"), tokenizer) if constrained else None
    options = EvaluationOptions(temperature=0.5, top_p=0.7, max_tokens=40, batch_size=4)
    sampler = HuggingFaceSampler(model, options, tokenizer.eos_token_id, automaton)
    ended = 0
    requests = [(prompt, seed) for prompt in PROMPTS for seed in (None, 1, 2)]
    for (prompt, _), response in zip(requests, sampler.sample(requests), strict=True):
        assert response.logprobs == pytest.approx(token_scores(model, prompt, response.tokens), abs=1e-4)
        assert tokenizer.eos_token_id not in response.tokens[:-1]
        ended += response.tokens[-1] == tokenizer.eos_token_id
    assert ended


def test_a_chain_depends_on_its_seed_only(world: Path) -> None:
    model = load_model(world / "model", inference=True)

    def sample(seeds: Sequence[int], batch_size: int) -> list[Sequence[int]]:
        options = EvaluationOptions(max_tokens=6, batch_size=batch_size)
        requests = [(PROMPTS[row % 2], seed) for row, seed in enumerate(seeds)]
        return [response.tokens for response in HuggingFaceSampler(model, options, 0).sample(requests)]

    together = sample([7, 9, 8, 10], 8)
    assert together[:2] == sample([7, 9], 1)
    assert together[2:] == sample([8, 10], 3)
    assert sample([8, 8, 9, 9], 3) != together


@pytest.mark.parametrize("temperature", [0.1, 2.0])
def test_without_a_seed_the_most_likely_tokens_are_taken(world: Path, temperature: float) -> None:
    model = load_model(world / "model", inference=True)
    options = EvaluationOptions(max_tokens=6, temperature=temperature, top_p=1.0)
    responses = HuggingFaceSampler(model, options, 0).sample([(prompt, None) for prompt in PROMPTS])
    for prompt, response in zip(PROMPTS, responses, strict=True):
        ids = torch.tensor([[*prompt, *response.tokens]])
        with torch.inference_mode():
            likely = model(ids).logits[0].argmax(-1)
        assert response.tokens == likely[len(prompt) - 1 : -1].tolist()


def test_a_logit_that_is_not_a_number_is_refused(world: Path) -> None:
    model = load_model(world / "model", inference=True)
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(InputError, match="the model's output is not a number"):
        HuggingFaceSampler(model, EvaluationOptions(), 0).sample([(PROMPTS[0], 1)])


@given(st.lists(st.floats(-4, 4), min_size=2, max_size=8), st.floats(0.3, 2.0), st.floats(0.05, 1.0))
@settings(max_examples=20, deadline=None)
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
