from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3Config, Qwen3ForCausalLM

from gream_verl.core.errors import InputError
from gream_verl.decoding.beam_search import Prefix, Score, _Head, beam_search, check_output_layer
from gream_verl.decoding.prefix_tree import ROOT, PrefixTree

VOCABULARY = 60
FIRST_SID_TOKEN = 20


def tiny_model(seed: int, attention: str = "sdpa", scale: float = 0.3) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=scale,
        max_position_embeddings=128,
        attn_implementation=attention,
    )
    return Qwen3ForCausalLM(config).eval()


def random_paths(seed: int, levels: int, codes: int, items: int, collisions: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(codes**levels, generator=generator)[:items]
    paths = [
        [FIRST_SID_TOKEN + level * codes + int(c) // codes**level % codes for level in range(levels)] for c in chosen
    ]
    if not collisions:
        return torch.tensor(paths)
    extra = FIRST_SID_TOKEN + levels * codes
    long = [[*path, extra + member] for path in paths[::3] for member in range(2)]
    return torch.tensor([[*path, -1] for path in paths if path not in paths[::3]] + long)


def random_prompts(seed: int, users: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 9, (users,), generator=generator)
    ids = torch.randint(1, FIRST_SID_TOKEN, (users, int(lengths.max())), generator=generator)
    mask = (torch.arange(ids.shape[1]) >= ids.shape[1] - lengths[:, None]).long()
    return ids * mask, mask


def beginning(users: int, length: int) -> torch.Tensor:
    """Return the same tokens for every user."""
    return torch.arange(1, length + 1).expand(users, -1)


def with_prefix(ids: torch.Tensor, mask: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Put a beginning before prompts, behind their padding, as Hugging Face wants it."""
    padding = ids.shape[1] - mask.sum(dim=1)
    width = ids.shape[1] + length
    long_ids, long_mask = torch.zeros(len(ids), width, dtype=torch.long), torch.zeros(len(ids), width, dtype=torch.long)
    for user, pad in enumerate(padding.tolist()):
        long_ids[user, pad:] = torch.cat([beginning(1, length)[0], ids[user, pad:]])
        long_mask[user, pad:] = 1
    return long_ids, long_mask


def hugging_face(
    model: Qwen3ForCausalLM,
    ids: torch.Tensor,
    mask: torch.Tensor,
    paths: torch.Tensor,
    beams: int,
    score: Score = "vocabulary",
) -> list[list[tuple[int, float]]]:
    rows = {tuple(path): row for row, path in enumerate(paths.tolist())}
    allowed: dict[tuple[int, ...], set[int]] = {}
    for path in rows:
        for level, token in enumerate(path):
            allowed.setdefault(path[:level], set()).add(token)
    length, levels = ids.shape[1], paths.shape[1]
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=levels,
        do_sample=False,
        length_penalty=0.0,
        early_stopping=False,
        renormalize_logits=score == "items",
        pad_token_id=0,
        eos_token_id=None,
        prefix_allowed_tokens_fn=lambda _, sequence: sorted(allowed[tuple(sequence[length:].tolist())]),
        return_dict_in_generate=True,
        output_scores=True,
    )
    found: list[list[tuple[int, float]]] = [[] for _ in range(len(ids))]
    for number, (sequence, score) in enumerate(
        zip(output.sequences[:, length:].tolist(), output.sequences_scores.tolist(), strict=True)
    ):
        if score > -1e8:  # Hugging Face fills missing beams with copies at -1e9
            found[number // beams].append((rows[tuple(sequence)], score))
    return found


@torch.inference_mode()
def brute_force(
    model: Qwen3ForCausalLM, ids: torch.Tensor, mask: torch.Tensor, paths: torch.Tensor, score: Score = "vocabulary"
) -> list[list[tuple[int, float]]]:
    result = []
    real_paths = [tuple(token for token in path if token >= 0) for path in paths.tolist()]
    for prompt, real in zip(ids, mask, strict=True):
        scored = []
        for row, path in enumerate(paths):
            path = path[path >= 0]
            sequence = torch.cat([prompt[real.bool()], path])[None]
            logits = model(sequence).logits[0, -len(path) - 1 : -1]
            if score == "items":
                for level in range(len(path)):
                    prefix = tuple(path[:level].tolist())
                    allowed = {real[level] for real in real_paths if real[:level] == prefix and len(real) > level}
                    logits[level, [token for token in range(VOCABULARY) if token not in allowed]] = -math.inf
            log_probs = logits.log_softmax(-1)
            scored.append((row, log_probs[torch.arange(len(path)), path].sum().item()))
        result.append(sorted(scored, key=lambda pair: -pair[1]))
    return result


def ours(
    model: Qwen3ForCausalLM,
    ids: torch.Tensor,
    mask: torch.Tensor,
    paths: torch.Tensor,
    beams: int,
    exclude: torch.Tensor | None = None,
    score: Score = "vocabulary",
    shared: int = 0,
) -> list[list[tuple[int, float]]]:
    prefix = Prefix(model, ids[0, :shared].tolist())
    tree = PrefixTree.from_paths(paths.numpy())
    items, scores = beam_search(
        model, ids[:, shared:], mask[:, shared:], tree, beams, exclude, score=score, prefix=prefix
    )
    assert items.shape == scores.shape == (len(ids), beams)
    assert torch.equal(items < 0, scores == -math.inf)
    return [
        [(item, score) for item, score in zip(row, row_scores, strict=True) if item >= 0]
        for row, row_scores in zip(items.tolist(), scores.tolist(), strict=True)
    ]


def assert_same(left: list[list[tuple[int, float]]], right: list[list[tuple[int, float]]]) -> None:
    assert [[item for item, _ in row] for row in left] == [[item for item, _ in row] for row in right]
    for left_row, right_row in zip(left, right, strict=True):
        assert [score for _, score in left_row] == pytest.approx([score for _, score in right_row], abs=1e-4)


@given(
    seed=st.integers(0, 10_000),
    levels=st.integers(1, 4),
    codes=st.integers(2, 6),
    share=st.floats(0.05, 1.0),
    users=st.integers(1, 4),
    beams=st.integers(2, 12),
    score=st.sampled_from(get_args(Score)),
    shared=st.integers(0, 3),
)
@settings(max_examples=20, deadline=None)
def test_equals_hugging_face_on_random_models_trees_and_prompts(
    seed: int, levels: int, codes: int, share: float, users: int, beams: int, score: Score, shared: int
) -> None:
    model = tiny_model(seed)
    paths = random_paths(seed, levels, codes, max(1, min(200, int(share * codes**levels))))
    ids, mask = random_prompts(seed, users)
    expected = hugging_face(model, *with_prefix(ids, mask, shared), paths, beams, score)
    together = torch.cat([beginning(users, shared), ids], dim=1), torch.cat([torch.ones(users, shared).long(), mask], 1)
    assert_same(ours(model, *together, paths, beams, score=score, shared=shared), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("collisions", [False, True])
@pytest.mark.parametrize("score", get_args(Score))
@pytest.mark.parametrize("seed", range(2))
def test_is_the_exact_ranking_when_there_is_a_beam_for_every_item(
    attention: str, collisions: bool, score: Score, seed: int
) -> None:
    model = tiny_model(seed, attention)
    paths = random_paths(seed, 3, 4, 18, collisions)
    ids, mask = random_prompts(seed, 3)
    found = ours(model, ids, mask, paths, len(paths) + 3, score=score)
    assert_same(found, brute_force(model, ids, mask, paths, score))
    if score == "items":  # the probabilities of all items are those of the answers that can be given
        assert [sum(math.exp(value) for _, value in row) for row in found] == pytest.approx([1.0] * 3, abs=1e-4)


@pytest.mark.parametrize("beams", [2, 5, 40])
def test_excluded_items_never_appear_and_change_nothing_else(beams: int) -> None:
    model = tiny_model(1)
    paths = random_paths(1, 3, 4, 30, collisions=True)
    ids, mask = random_prompts(1, 3)
    exclude = [[0, 3, 4], [], list(range(len(paths) - 2))]
    padded = torch.full((3, len(paths)), -1)
    for user, rows in enumerate(exclude):
        padded[user, : len(rows)] = torch.tensor(rows, dtype=torch.long)
    found = ours(model, ids, mask, paths, beams, padded)
    for user, rows in enumerate(exclude):
        kept = [row for row in range(len(paths)) if row not in rows]
        without = ours(model, ids[user : user + 1], mask[user : user + 1], paths[kept], beams)[0]
        assert_same([found[user]], [[(kept[item], score) for item, score in without]])


def test_the_generation_config_of_the_model_changes_nothing() -> None:
    model = tiny_model(2)
    paths = random_paths(2, 3, 4, 30)
    ids, mask = random_prompts(2, 3)
    before = ours(model, ids, mask, paths, 5)
    model.generation_config.update(
        do_sample=True, temperature=0.1, top_k=1, top_p=0.1, num_beams=1, max_new_tokens=1, repetition_penalty=9.0
    )
    assert ours(model, ids, mask, paths, 5) == before


def test_a_user_gets_the_same_items_alone_and_in_a_batch() -> None:
    model = tiny_model(3)
    paths = random_paths(3, 3, 5, 60, collisions=True)
    ids, mask = random_prompts(3, 6)
    alone = [ours(model, i[m.bool()][None], m[m.bool()][None], paths, 7)[0] for i, m in zip(ids, mask, strict=True)]
    assert_same(ours(model, ids, mask, paths, 7), alone)


def test_a_model_that_does_more_than_its_output_layer_is_not_scored_by_items_alone() -> None:
    tree = PrefixTree.from_paths(random_paths(4, 2, 4, 10).numpy())
    model = tiny_model(4)
    check_output_layer(model, tree)
    model.register_forward_hook(lambda _, __, output: setattr(output, "logits", 3 * torch.tanh(output.logits / 3)))
    with pytest.raises(InputError, match="use the score 'vocabulary'"):
        check_output_layer(model, tree)


def test_an_output_layer_with_a_bias_is_scored_with_it() -> None:
    torch.manual_seed(5)
    model = tiny_model(5)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(VOCABULARY))
    paths = random_paths(5, 3, 4, 20, collisions=True)
    ids, mask = random_prompts(5, 2)
    assert_same(ours(model, ids, mask, paths, 40, score="items"), brute_force(model, ids, mask, paths, "items"))


@torch.inference_mode()
def one_by_one(
    model: Qwen3ForCausalLM, ids: torch.Tensor, mask: torch.Tensor, paths: torch.Tensor, beams: int, score: Score
) -> list[list[tuple[int, float]]]:
    """Return what beam search is by definition: prefixes as tuples, one forward pass for each."""
    rows = {tuple(token for token in path if token >= 0): row for row, path in enumerate(paths.tolist())}
    result = []
    for prompt, real in zip(ids, mask, strict=True):
        running: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
        found: list[tuple[tuple[int, ...], float]] = []
        while running:
            candidates = []
            for prefix, value in running:
                sequence = torch.cat([prompt[real.bool()], torch.tensor(prefix, dtype=torch.long)])
                logits = model(sequence[None]).logits[0, -1].float()
                allowed = sorted({path[len(prefix)] for path in rows if path[: len(prefix)] == prefix != path})
                if score == "items":
                    logits[[token for token in range(VOCABULARY) if token not in allowed]] = -math.inf
                log_probs = logits.log_softmax(-1)
                candidates += [((*prefix, token), value + log_probs[token].item()) for token in allowed]
            candidates.sort(key=lambda pair: -pair[1])
            found = sorted(found + [pair for pair in candidates if pair[0] in rows], key=lambda pair: -pair[1])[:beams]
            running = [pair for pair in candidates if pair[0] not in rows][:beams]
        result.append([(rows[path], value) for path, value in found])
    return result


@pytest.mark.parametrize("score", get_args(Score))
@pytest.mark.parametrize(("seed", "beams"), [(0, 1), (1, 3), (2, 7)])
def test_sids_of_many_lengths_are_found_as_by_the_definition(seed: int, beams: int, score: Score) -> None:
    model = tiny_model(seed)
    short = [[FIRST_SID_TOKEN + 14 + item, -1, -1, -1] for item in range(3)]
    paths = torch.tensor(random_paths(seed, 3, 4, 30, collisions=True).tolist() + short)
    ids, mask = random_prompts(seed, 3)
    found = ours(model, ids, mask, paths, beams, score=score)
    assert_same(found, one_by_one(model, ids, mask, paths, beams, score))


def test_many_rows_of_logits_are_normalised_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(6)
    paths = random_paths(6, 3, 4, 40)
    ids, mask = random_prompts(6, 4)
    expected = ours(model, ids, mask, paths, 7)
    monkeypatch.setattr("gream_verl.decoding.beam_search.ROWS_AT_ONCE", 3)
    assert_same(ours(model, ids, mask, paths, 7), expected)


@pytest.mark.parametrize("score", get_args(Score))
def test_logits_in_half_precision_are_normalised_in_single(score: Score) -> None:
    model = tiny_model(7).to(torch.bfloat16)
    tree = PrefixTree.from_paths(random_paths(7, 1, 6, 6).numpy())
    edges, there = tree.children(torch.tensor([[ROOT]]))
    head = _Head(model, tree, score)
    logits = head(input_ids=torch.tensor([[3]]))
    assert logits.dtype == torch.bfloat16
    exact = logits.double()[0, 0].log_softmax(dim=0)[head.columns]
    assert head.log_probabilities(logits, edges, there)[0, 0].tolist() == pytest.approx(exact.tolist(), abs=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("score", get_args(Score))
def test_a_model_that_gives_no_numbers_is_refused(value: float, score: Score) -> None:
    model = tiny_model(8)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(VOCABULARY).index_fill(0, torch.tensor([30]), value))
    ids, mask = random_prompts(8, 2)
    with pytest.raises(InputError, match="not a number"):
        ours(model, ids, mask, random_paths(8, 2, 6, 30), 4, score=score)


def test_items_of_no_probability_are_not_found() -> None:
    model = tiny_model(9)
    paths = random_paths(9, 2, 3, 9)
    bias = torch.zeros(VOCABULARY)
    bias[FIRST_SID_TOKEN + 3 : FIRST_SID_TOKEN + 6] = -math.inf  # no second token can come
    model.lm_head.bias = torch.nn.Parameter(bias)
    ids, mask = random_prompts(9, 2)
    for score in get_args(Score):
        assert ours(model, ids, mask, paths, 4, score=score) == [[], []]
