"""Constrained beam search: ours against Hugging Face ``generate`` with a prefix function, in one run.

Both get the same random model, prompts and catalogue; the run fails when items or scores differ. The prefix function
is a dictionary look-up, as cheap as one can be.

    python benchmarks/beam_search.py                      # a tiny model: seconds
    python benchmarks/beam_search.py --model 135m         # the shape of a 135 M model: minutes
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from gream_verl.decoding.beam_search import beam_search
from gream_verl.decoding.prefix_tree import PrefixTree

LEVELS, CODES, TEXT_TOKENS = 4, 256, 2048
SHAPES = {  # the second is that of SmolLM2-135M
    "tiny": {
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": TEXT_TOKENS + LEVELS * CODES,
    },
    "135m": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49_152,
    },
}
MISSING = -1e8
"""Hugging Face fills missing beams with copies at -1e9."""

Ranking = list[list[tuple[int, float]]]


def make_world(options: argparse.Namespace) -> tuple[Qwen3ForCausalLM, Tensor, Tensor, np.ndarray]:
    torch.manual_seed(options.seed)
    config = Qwen3Config(**SHAPES[options.model], max_position_embeddings=1024, tie_word_embeddings=True)
    model = Qwen3ForCausalLM(config).float().eval()
    generator = np.random.default_rng(options.seed)
    codes = generator.choice(CODES**LEVELS, size=options.items, replace=False)
    paths = np.stack([codes // CODES**level % CODES + TEXT_TOKENS + level * CODES for level in range(LEVELS)], axis=1)
    lengths = torch.from_numpy(generator.integers(options.prompt * 3 // 4, options.prompt + 1, options.users))
    mask = (torch.arange(options.prompt) >= options.prompt - lengths[:, None]).long()
    ids = torch.from_numpy(generator.integers(1, TEXT_TOKENS, mask.shape)) * mask
    return model, ids, mask, paths


def with_hugging_face(model: Qwen3ForCausalLM, ids: Tensor, mask: Tensor, paths: np.ndarray, beams: int) -> Ranking:
    rows = {tuple(path): row for row, path in enumerate(paths.tolist())}
    allowed: dict[tuple[int, ...], set[int]] = {}
    for path in rows:
        for level, token in enumerate(path):
            allowed.setdefault(path[:level], set()).add(token)
    lists = {prefix: sorted(tokens) for prefix, tokens in allowed.items()}
    length = ids.shape[1]
    output = model.generate(
        input_ids=ids,
        attention_mask=mask,
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=LEVELS,
        do_sample=False,
        length_penalty=0.0,
        early_stopping=False,
        pad_token_id=0,
        eos_token_id=None,
        prefix_allowed_tokens_fn=lambda _, sequence: lists[tuple(sequence[length:].tolist())],
        return_dict_in_generate=True,
        output_scores=True,
    )
    found: Ranking = [[] for _ in range(len(ids))]
    sequences = output.sequences[:, length:].tolist()
    for place, (sequence, score) in enumerate(zip(sequences, output.sequences_scores.tolist(), strict=True)):
        if score > MISSING:
            found[place // beams].append((rows[tuple(sequence)], score))
    return found


def with_ours(model: Qwen3ForCausalLM, ids: Tensor, mask: Tensor, tree: PrefixTree, beams: int) -> Ranking:
    items, scores = beam_search(model, ids, mask, tree, beams)
    return [
        [(item, score) for item, score in zip(row, values, strict=True) if item >= 0]
        for row, values in zip(items.tolist(), scores.tolist(), strict=True)
    ]


def timed(work: Callable[[], Ranking], repeats: int) -> tuple[Ranking, float]:
    result = work()
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begin)
    return result, statistics.median(seconds)


def largest_difference(left: Ranking, right: Ranking) -> float:
    """Return the largest difference of scores; raise when the items differ."""
    if [[item for item, _ in row] for row in left] != [[item for item, _ in row] for row in right]:
        raise SystemExit("the two return different items")
    pairs = zip((pair for row in left for pair in row), (pair for row in right for pair in row), strict=True)
    return max(abs(ours - theirs) for (_, ours), (_, theirs) in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="tiny")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--beams", type=int, default=10)
    parser.add_argument("--prompt", type=int, default=150, help="tokens of the longest prompt")
    parser.add_argument("--items", type=int, default=12_101)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    model, ids, mask, paths = make_world(options)
    begin = time.perf_counter()
    tree = PrefixTree.from_paths(paths)
    built = time.perf_counter() - begin
    ours, our_seconds = timed(lambda: with_ours(model, ids, mask, tree, options.beams), options.repeats)
    theirs, their_seconds = timed(lambda: with_hugging_face(model, ids, mask, paths, options.beams), options.repeats)
    difference = largest_difference(ours, theirs)

    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{options.model} ({parameters / 1e6:.1f} M parameters), {options.users} users, {options.beams} beams, "
        f"prompts of up to {options.prompt} tokens, {options.items:,} items, {torch.get_num_threads()} thread(s), "
        f"seed {options.seed}"
    )
    print(f"tree built in           {built:8.3f} s")
    print(f"Hugging Face generate   {their_seconds:8.3f} s")
    print(f"ours                    {our_seconds:8.3f} s")
    print(
        f"same items in the same order; scores within {difference:.1e}; {their_seconds / our_seconds:.1f} times faster"
    )


if __name__ == "__main__":
    main()
