from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from assets import TITLES, make_index, make_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gream_verl.core.errors import InputError
from gream_verl.model.answer_judge import AnswerJudge

INDEX = make_index()
ITEMS = list(INDEX.sids)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("judge") / "model", INDEX)


def slow_score(folder: Path, prompt: str, chain: str, sid: tuple[str, ...]) -> float:
    """Ask the model for one token after the other, without a batch."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = tokenizer.encode(prompt) + tokenizer.encode(f"{chain}<answer>")
    score = 0.0
    for token in tokenizer.convert_tokens_to_ids(list(sid)):
        with torch.no_grad():
            score += float(model(torch.tensor([ids])).logits[0, -1].double().log_softmax(dim=-1)[token])
        ids.append(token)
    return score


def test_the_score_is_the_log_probability_of_the_sid_after_the_chain(folder: Path) -> None:
    prompts = [f"{title} {title * n}" for n, title in enumerate(TITLES[:7])]
    items = [*ITEMS[:5], ITEMS[-1], ITEMS[-2]]  # the last two have a collision token
    chains = [f"<think>{' '.join(TITLES[: 7 - n])}</think>{INDEX.text(ITEMS[n])}" for n in range(7)]
    responses = [f"{chain}<answer>{INDEX.text(item)}</answer>" for chain, item in zip(chains, items, strict=True)]
    expected = [
        slow_score(folder, prompt, chain, INDEX.sids[item])
        for prompt, chain, item in zip(prompts, chains, items, strict=True)
    ]
    for size in (3, 32):
        np.testing.assert_allclose(AnswerJudge(folder, size)(prompts, responses), expected, rtol=1e-4)


def test_a_judge_of_another_index_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"<\|a_99\|> is not one token of the tokenizer; run `gream model extend`"):
        AnswerJudge(folder)(["x"], ["<think></think><answer><|a_99|></answer>"])
