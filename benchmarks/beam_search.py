"""Constrained beam search: ours against Hugging Face ``generate`` with a prefix function, in one run.

All get the same model, prompts and catalogue; the run fails when items or scores differ. The prefix function is a
dictionary look-up, as cheap as one can be. The last line is vLLM's own beam search, which knows no
catalogue: seconds, and how many of its answers are items.

    python benchmarks/beam_search.py                     # a tiny random model: a minute
    python benchmarks/beam_search.py --model 135m         # the shape of a 135 M model: ten minutes
    python benchmarks/beam_search.py --checkpoint runs/quickstart/sft --data runs/quickstart/data --dataset ml-100k
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from gream_verl.core.cpu_environment import set_defaults
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.decoding.batches import pad_left
from gream_verl.decoding.beam_ranker import shared_prefix
from gream_verl.decoding.beam_search import Prefix, Score, beam_search
from gream_verl.decoding.prefix_tree import PrefixTree, sid_ids
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.prompts import read_prompts
from gream_verl.evaluation.ranking import encode
from gream_verl.model.loading import load_decoding_config, load_model, load_tokenizer
from gream_verl.model.tiny_model import train_tokenizer

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


@dataclass
class World:
    """The input of both sides.

    Attributes:
        name: Shown in the heading.
        folder: The model as a folder, for vLLM.
        model: The model.
        prompts: Token ids of every prompt.
        paths: int64 [items, depth]; the token ids of every item, -1 after its end.
    """

    name: str
    folder: Path
    model: Qwen3ForCausalLM
    prompts: list[list[int]]
    paths: np.ndarray


def random_world(options: argparse.Namespace, folder: Path) -> World:
    torch.manual_seed(options.seed)
    config = Qwen3Config(**SHAPES[options.model], max_position_embeddings=1024, tie_word_embeddings=True)
    model = Qwen3ForCausalLM(config).float().eval()
    model.save_pretrained(folder)
    train_tokenizer(["vLLM wants a tokenizer"], 300).save_pretrained(folder)
    generator = np.random.default_rng(options.seed)
    codes = generator.choice(CODES**LEVELS, size=options.items, replace=False)
    paths = np.stack([codes // CODES**level % CODES + TEXT_TOKENS + level * CODES for level in range(LEVELS)], axis=1)
    instruction = generator.integers(1, TEXT_TOKENS, options.instruction).tolist()
    lengths = generator.integers(options.prompt * 3 // 4, options.prompt + 1, options.users) - options.instruction
    prompts = [instruction + generator.integers(1, TEXT_TOKENS, length).tolist() for length in lengths]
    return World(f"{options.model}, random", folder, model, prompts, paths)


def real_world(options: argparse.Namespace) -> World:
    model, tokenizer = load_model(options.checkpoint, inference=True), load_tokenizer(options.checkpoint)
    data, dataset = Path(options.data), options.dataset
    index = ItemIndex.load(data / f"{dataset}.index.json")
    ids = sid_ids(index, tokenizer, options.checkpoint)
    paths = np.full((len(index), max(map(len, index.sids.values()))), -1)
    for row, sid in enumerate(index.sids.values()):
        paths[row, : len(sid)] = [ids[token] for token in sid]
    sample = EvaluationOptions(limit=options.users, seed=options.seed)
    prompts, _ = read_prompts(data / f"{dataset}-test.parquet", "direct", sample)
    config = load_decoding_config(options.checkpoint, tokenizer)
    sequences = sorted(encode(prompts, index, tokenizer, config, paths.shape[1]), key=len, reverse=True)
    return World(options.checkpoint, Path(options.checkpoint), model, sequences, paths)


def with_hugging_face(world: World, beams: int, score: Score) -> Callable[[], Ranking]:
    rows = {tuple(path): row for row, path in enumerate(world.paths.tolist())}
    allowed: dict[tuple[int, ...], set[int]] = {}
    for path in rows:
        for level, token in enumerate(path):
            allowed.setdefault(path[:level], set()).add(token)
    if (world.paths < 0).any():
        raise SystemExit("SIDs of several lengths: Hugging Face would have to score an end; take an index without")
    lists = {prefix: sorted(tokens) for prefix, tokens in allowed.items()}
    ids, mask = pad_left(world.prompts)
    length = ids.shape[1]

    def work() -> Ranking:
        output = world.model.generate(
            input_ids=ids,
            attention_mask=mask,
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=world.paths.shape[1],
            do_sample=False,
            length_penalty=0.0,
            early_stopping=False,
            renormalize_logits=score == "items",
            pad_token_id=0,
            eos_token_id=None,
            prefix_allowed_tokens_fn=lambda _, sequence: lists[tuple(sequence[length:].tolist())],
            return_dict_in_generate=True,
            output_scores=True,
        )
        found: Ranking = [[] for _ in range(len(ids))]
        sequences = output.sequences[:, length:].tolist()
        for place, (sequence, value) in enumerate(zip(sequences, output.sequences_scores.tolist(), strict=True)):
            if value > MISSING:
                found[place // beams].append((rows[tuple(sequence)], value))
        return found

    return work


def with_ours(world: World, beams: int, score: Score, prefix_tokens: Sequence[int]) -> Callable[[], Ranking]:
    tree = PrefixTree.from_paths(world.paths)
    prefix = Prefix(world.model, prefix_tokens)
    ids, mask = pad_left([prompt[len(prefix_tokens) :] for prompt in world.prompts])

    def work() -> Ranking:
        items, scores = beam_search(world.model, ids, mask, tree, beams, score=score, prefix=prefix)
        return [
            [(item, value) for item, value in zip(row, values, strict=True) if item >= 0]
            for row, values in zip(items.tolist(), scores.tolist(), strict=True)
        ]

    return work


def with_vllm(world: World, beams: int) -> Callable[[], list[list[tuple[int, ...]]]]:
    set_defaults()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}
    from vllm import LLM
    from vllm.sampling_params import BeamSearchParams

    engine = LLM(
        model=str(world.folder), dtype="float32", generation_config="vllm", max_model_len=512, enforce_eager=True,
        max_logprobs=2 * beams, disable_log_stats=True, enable_prefix_caching=True,
    )  # fmt: skip
    parameters = BeamSearchParams(beam_width=beams, max_tokens=world.paths.shape[1], ignore_eos=True)

    def work() -> list[list[tuple[int, ...]]]:
        outputs = engine.beam_search([{"prompt_token_ids": prompt} for prompt in world.prompts], parameters)
        return [
            [tuple(beam.tokens[len(prompt) :]) for beam in output.sequences]
            for prompt, output in zip(world.prompts, outputs, strict=True)
        ]

    return work


def timed(work: Callable, repeats: int) -> tuple[list, float]:
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


def compare(world: World, options: argparse.Namespace) -> None:
    prefix = shared_prefix(world.prompts)
    parameters = sum(parameter.numel() for parameter in world.model.parameters())
    lengths = sorted(map(len, world.prompts))
    print(
        f"{world.name} ({parameters / 1e6:.1f} M parameters), {len(world.prompts)} users, {options.beams} beams, "
        f"prompts of {lengths[0]} to {lengths[-1]} tokens, {len(prefix)} of them shared, "
        f"{len(world.paths):,} items, {torch.get_num_threads()} thread(s), seed {options.seed}"
    )
    begin = time.perf_counter()
    PrefixTree.from_paths(world.paths)
    print(f"tree built in {time.perf_counter() - begin:.3f} s\n")
    print(f"{'':58}seconds  ratio  same items, scores within")
    for score in ("vocabulary", "items"):
        theirs, their_seconds = timed(with_hugging_face(world, options.beams, score), options.repeats)
        name = "Hugging Face generate, renormalize_logits" if score == "items" else "Hugging Face generate"
        print(f"{name:56}{their_seconds:9.3f}{1:7.1f}")
        for shared, words in (((), ""), (prefix, ", instruction cached")):
            ours, our_seconds = timed(with_ours(world, options.beams, score, shared), options.repeats)
            difference = largest_difference(ours, theirs)
            ratio = their_seconds / our_seconds
            print(f"{f'ours, score {score}{words}':56}{our_seconds:9.3f}{ratio:7.1f}  {difference:.0e}")
    if options.vllm:
        found, seconds = timed(with_vllm(world, options.beams), options.repeats)
        items = {tuple(path) for path in world.paths.tolist()}
        real = [path in items for row in found for path in row]
        print(f"{'vLLM beam search, which knows no catalogue':56}{seconds:9.3f}{'':7}  {np.mean(real):.1%} are items")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, default="tiny")
    parser.add_argument("--checkpoint", help="a trained model instead of a random one, with --data and --dataset")
    parser.add_argument("--data", help="folder of its data set")
    parser.add_argument("--dataset", help="its name")
    parser.add_argument("--users", type=int, default=8)
    parser.add_argument("--beams", type=int, default=10)
    parser.add_argument("--prompt", type=int, default=150, help="tokens of the longest prompt")
    parser.add_argument("--instruction", type=int, default=60, help="of them, tokens that all prompts begin with")
    parser.add_argument("--items", type=int, default=12_101)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--vllm", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.checkpoint:
        compare(real_world(options), options)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(random_world(options, Path(folder)), options)


if __name__ == "__main__":
    main()
