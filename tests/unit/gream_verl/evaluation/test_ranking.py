from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from assets import make_index
from hypothesis import given, settings
from hypothesis import strategies as st

from gream_verl.core.errors import InputError
from gream_verl.core.rsvr import match_score
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.decoding.beam_ranker import shared_prefix
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.prompts import read_prompts
from gream_verl.evaluation.ranking import ItemRanker, encode
from gream_verl.model.loading import load_decoding_config, load_model, load_tokenizer

INSTRUCTION = [4, 9, 11, 30]
SEQUENCES = [INSTRUCTION + [1 + (7 * user + place) % 200 for place in range(1 + user % 4)] for user in range(7)]


def make_ranker(world: Path, prefix: tuple[int, ...] = ()) -> ItemRanker:
    model, tokenizer = load_model(world / "model", inference=True), load_tokenizer(world / "model")
    return ItemRanker(model, tokenizer, make_index(), EvaluationOptions(beams=5, batch_size=3), prefix)


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5))
@settings(max_examples=25)
def test_the_shared_prefix_is_the_longest_that_leaves_each_prompt_a_token(sequences: list[list[int]]) -> None:
    prefix = list(shared_prefix(sequences))
    longest = max(
        length
        for length in range(min(map(len, sequences)))
        if all(sequence[:length] == sequences[0][:length] for sequence in sequences)
    )
    assert prefix == sequences[0][:longest]


def test_a_prefix_computed_once_changes_no_ranking(world: Path) -> None:
    prompts = [(sequence, [str(user)]) for user, sequence in enumerate(SEQUENCES)]
    plain, cached = make_ranker(world), make_ranker(world, shared_prefix(SEQUENCES))
    for ranking, other in zip(plain.rank(prompts), cached.rank(prompts), strict=True):
        assert list(other) == list(ranking)
        assert list(other.values()) == pytest.approx(list(ranking.values()), abs=1e-4)


def test_an_item_that_is_twice_in_a_history_is_not_recommended(world: Path) -> None:
    ranker = make_ranker(world)
    best = next(iter(ranker.rank([(SEQUENCES[0], [])])[0]))
    assert best not in ranker.rank([(SEQUENCES[0], [best, "no such item", best])])[0]


def test_targets_are_scored_as_by_one_pass_per_token(world: Path) -> None:
    ranker, index = make_ranker(world, shared_prefix(SEQUENCES)), make_index()
    items = ["0", "5", "22", "23", "11", "22", "3"]  # 22 and 23 have a collision token
    scores = ranker.score_targets([(sequence, item) for sequence, item in zip(SEQUENCES, items, strict=True)])
    for sequence, item, (expected, logprob) in zip(SEQUENCES, items, scores, strict=True):
        truth, ids, chances, whole = index.sids[item], list(sequence), [], 0.0
        for token in truth:
            with torch.inference_mode():
                log_probs = ranker.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
            ids.append(ranker.token_ids[token])
            chances.append(log_probs[ids[-1]].exp().item())
            whole += log_probs[ids[-1]].item()
        assert logprob == pytest.approx(whole, abs=1e-4)
        reach = [float(np.prod(chances[:depth])) for depth in range(len(truth) + 1)]  # the first tokens are right
        ends = [chance - after for chance, after in zip(reach, [*reach[1:], 0.0], strict=True)]
        pay = [match_score(truth[:depth], truth, index.base_levels) for depth in range(len(truth) + 1)]
        assert expected == pytest.approx(np.dot(ends, pay), rel=1e-4)


def test_the_expected_rsvr_is_the_mean_match_of_sampled_answers(taught: Path) -> None:
    model, tokenizer = load_model(taught / "model", inference=True), load_tokenizer(taught / "model")
    index = make_index()
    ranker = ItemRanker(model, tokenizer, index, EvaluationOptions())
    begun = tokenizer.encode(f"What is next?<|im_end|><think>likes Alien.</think>{index.text('9')}<answer>")
    scores = ranker.score_targets([(begun, item) for item in index.sids])
    (expected, _), truth = max(zip(scores, index.sids.values(), strict=True))  # a likely target
    torch.manual_seed(0)
    answers = torch.tensor([begun] * 1500)
    with torch.inference_mode():
        for _ in truth:
            chances = model(answers, logits_to_keep=1).logits[:, -1].softmax(-1)
            answers = torch.cat([answers, chances.multinomial(1)], dim=1)
    sampled = [tuple(tokenizer.convert_ids_to_tokens(ids)) for ids in answers[:, len(begun) :].tolist()]
    matches = np.array([match_score(answer, truth, index.base_levels) for answer in sampled])
    assert matches.mean() > 0.1, "else this tests nothing"
    assert abs(expected - matches.mean()) < 4 * matches.std() / len(matches) ** 0.5


def test_prompts_that_do_not_fit_are_refused_with_a_remedy(world: Path) -> None:
    tokenizer = load_tokenizer(world / "model")
    config = load_decoding_config(world / "model", tokenizer)
    prompts, _ = read_prompts(world / "tiny-test.parquet", "direct")
    arguments: dict[str, Any] = {"prompts": prompts, "index": make_index(), "tokenizer": tokenizer, "config": config}
    longest = max(map(len, encode(**arguments, room=4)))
    assert encode(**arguments, room=config.max_position_embeddings - longest)
    with pytest.raises(InputError, match="shorter history"):
        encode(**arguments, room=config.max_position_embeddings - longest + 1)
    other = ItemIndex.from_codes([str(item) for item in range(24)], [[9, item] for item in range(24)])
    with pytest.raises(InputError, match=r"in the prompts; make them again with `gream data rl`"):
        encode(**(arguments | {"index": other}), room=4)
    with pytest.raises(InputError, match="chat_template"):
        tokenizer.chat_template = None
        encode(**(arguments | {"prompts": [replace(prompts[0])]}), room=4)
