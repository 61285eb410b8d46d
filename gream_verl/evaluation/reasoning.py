"""Reasoning mode: think freely, then recommend real items.

Each user gets one or more sampled chains. The free answer of each is scored as SRPO scores it. Then the chain is kept
up to ``<answer>`` and a beam search over the SIDs of real items ranks what could follow (two stages); the rankings of
several chains are merged by the mean of the items' probabilities.
"""

from __future__ import annotations

import hashlib
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.progress import track

from gream_verl.decoding.prefix_tree import PrefixTree
from gream_verl.evaluation.metrics import pass_at_k, rank_of, ranking_metrics
from gream_verl.evaluation.prompts import Prompt, check_room, encode, load_model, read_prompts
from gream_verl.evaluation.ranking import ItemRanker, check_prompts, merge_rankings
from gream_verl.evaluation.results import Evaluation, ProgressFile
from gream_verl.evaluation.sampling import Engine, HuggingFaceSampler, Sampler, SamplingSettings, VllmSampler
from gream_verl.rsvr import score_response
from gream_verl.semantic_ids import ItemIndex
from gream_verl.token_text import TokenText
from gream_verl.vocabulary import sid_token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANSWER = "<answer>"
ROOM_FOR_ANSWER = 32
"""Tokens that the tags may need which ``up_to_answer`` adds to a chain."""


def evaluate_reasoning(
    model_folder: str | os.PathLike[str],
    prompts_parquet: str | os.PathLike[str],
    index_file: str | os.PathLike[str],
    *,
    engine: Engine = "vllm",
    chains: int = 1,
    temperature: float = 0.6,
    top_p: float = 0.8,
    max_tokens: int = 256,
    beams: int = 30,
    batch_size: int = 64,
    drop_history: bool = True,
    limit: int | None = None,
    seed: int = 0,
    progress_file: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Sample chains of thought for every user, score their free answers, and rank real items given each chain.

    Args:
        model_folder: A Hugging Face model.
        prompts_parquet: ``<D>-test.parquet`` or ``<D>-val.parquet``; rows of type ``reasoning`` are used.
        index_file: ``<D>.index.json``.
        engine: Who samples: ``vllm``, or ``hf``, a plain loop.
        chains: Samples a user.
        temperature: Sampling temperature.
        top_p: Share of probability that sampling keeps.
        max_tokens: Longest response in tokens.
        beams: Beams of the second stage, and the length of the recommended list; 0 leaves the second stage out.
        batch_size: Sequences computed at once.
        drop_history: Never recommend an item of the user's history. The free answer is not touched by it.
        limit: Evaluate a random sample of so many users; None takes all.
        seed: Seed of the sample and of the chains.
        progress_file: Finished users are added here, and a later call with the same settings goes on from it.

    Returns:
        Metrics of the free answers, means over chains and users: ``rsvr``, ``match``, ``format``, ``acc``,
        ``valid_item`` (as in ``gream_verl.rsvr.Reward``), ``reached_answer``, ``tokens``, and ``pass@k`` for k = 1 and
        all chains; of the ranking: Recall, NDCG, Precision and MRR. Rows: ``user``, ``target``, ``rsvr``, ``chains``,
        ``recommended``, ``scores``.

    Raises:
        InputError: When a file or a setting cannot be used.
    """
    begin = time.perf_counter()
    sampling = SamplingSettings(chains, temperature, top_p, max_tokens)
    prompts, total = read_prompts(prompts_parquet, "reasoning", limit=limit, seed=seed)
    index = ItemIndex.load(index_file)
    check_prompts(prompts, index)
    settings: dict[str, Any] = {
        "mode": "reasoning",
        "model": os.fspath(model_folder),
        "prompts": os.fspath(prompts_parquet),
        "index": os.fspath(index_file),
        "engine": engine,
        "chains": chains,
        "temperature": temperature,
        "top_p": top_p,
        "max_tokens": max_tokens,
        "beams": beams,
        "drop_history": drop_history,
        "users": len(prompts),
        "users_in_file": total,
        "seed": seed,
    }
    inputs = [Path(prompts_parquet), Path(index_file), *sorted(Path(model_folder).glob("*.safetensors"))]
    done = ProgressFile(progress_file, {**settings, "sha256": {path.name: _digest(path) for path in inputs}})
    missing = [prompt for prompt in prompts if prompt.user not in done.rows]
    if missing:
        model, tokenizer = load_model(model_folder)
        tree = PrefixTree.from_index(index, sid_token_ids(tokenizer, index, os.fspath(model_folder))).to(model.device)
        ranker = ItemRanker(model, tree, list(index.sids), beams, batch_size) if beams else None
        sequences = encode(missing, tokenizer)
        check_room(sequences, model, max_tokens + ROOM_FOR_ANSWER + tree.depth)
        reader, eos = TokenText(tokenizer), tokenizer.eos_token_id
        sampler: Sampler = (
            HuggingFaceSampler(model, sampling, eos, batch_size)
            if engine == "hf"
            else VllmSampler(model_folder, sampling, eos, batch_size, max(map(len, sequences)), seed)
        )
        chunk = max(1, batch_size // chains)
        for start in track(range(0, len(missing), chunk), description="Reasoning mode"):
            part = slice(start, start + chunk)
            done.add(
                _recommend(
                    missing[part], sequences[part], tokenizer, reader, sampler, ranker, index, drop_history, seed
                )
            )
    rows = [done.rows[prompt.user] for prompt in prompts]
    settings |= {
        "score": "mean over chains of the probability of the SID given the chain, over the whole vocabulary",
        "seconds": round(time.perf_counter() - begin, 2),
    }
    return Evaluation(_metrics(rows, chains, ranked=beams > 0), settings, rows)


def up_to_answer(response: str) -> tuple[str, bool]:
    """Return a response up to and with the ``<answer>`` that follows its thinking, and whether it got there.

    A response that did not, cut short or without the tag, is closed for it: ``</think>`` is added when a thought is
    open, then ``<answer>``.

    >>> up_to_answer("<think>horror</think>hence<answer><|a_1|></answer>")
    ('<think>horror</think>hence<answer>', True)
    >>> up_to_answer("<think>horror and")
    ('<think>horror and</think><answer>', False)
    """
    thought_end = response.find("</think>")
    answer = response.find(ANSWER, thought_end) if thought_end >= 0 else -1
    if answer >= 0:
        return response[: answer + len(ANSWER)], True
    is_open = "<think>" in response and thought_end < 0
    return response + "</think>" * is_open + ANSWER, False


def _recommend(
    prompts: Sequence[Prompt],
    sequences: Sequence[Sequence[int]],
    tokenizer: PreTrainedTokenizerBase,
    reader: TokenText,
    sampler: Sampler,
    ranker: ItemRanker | None,
    index: ItemIndex,
    drop_history: bool,
    seed: int,
) -> list[dict[str, Any]]:
    """Return the rows of some users."""
    seeds = [zlib.crc32(f"{seed}:{prompt.user}".encode()) for prompt in prompts]
    rows: list[dict[str, Any]] = []
    second_stage: list[list[int]] = []
    for prompt, sequence, responses in zip(prompts, sequences, sampler.sample(sequences, seeds), strict=True):
        chains = []
        for ids in responses:
            text = tokenizer.decode(ids, skip_special_tokens=False)
            kept, reached = up_to_answer(text)
            second_stage.append([*sequence, *tokenizer(kept, add_special_tokens=False)["input_ids"]])
            reward = score_response(reader.read(ids), index.readable[prompt.target], index=index)
            chains.append(
                {
                    "text": text,
                    "rsvr": reward.score,
                    "match": reward.match,
                    "format": reward.format,
                    "acc": reward.acc,
                    "valid_item": reward.valid_item,
                    "reached_answer": float(reached),
                    "tokens": len(ids),
                }
            )
        rsvr = sum(chain["rsvr"] for chain in chains) / len(chains)
        rows.append({"user": prompt.user, "target": prompt.target, "rsvr": rsvr, "chains": chains})

    if ranker is not None:
        count = len(rows[0]["chains"])
        dropped = [prompt.history if drop_history else () for prompt in prompts for _ in range(count)]
        ranked = dict(ranker.rank(second_stage, dropped))
        for place, row in enumerate(rows):
            merged = merge_rankings([ranked[place * count + chain] for chain in range(count)], ranker.beams)
            row["recommended"] = list(merged)
            row["scores"] = [round(score, 5) for score in merged.values()]
    return rows


def _metrics(rows: Sequence[Mapping[str, Any]], chains: int, *, ranked: bool) -> dict[str, float]:
    names = ("rsvr", "match", "format", "acc", "valid_item", "reached_answer", "tokens")
    metrics = {name: float(np.mean([[chain[name] for chain in row["chains"]] for row in rows])) for name in names}
    correct = [sum(chain["acc"] for chain in row["chains"]) for row in rows]
    for k in sorted({1, chains}):
        metrics[f"pass@{k}"] = float(pass_at_k([chains] * len(rows), correct, k).mean())
    if ranked:
        metrics |= ranking_metrics([rank_of(row["target"], row["recommended"]) for row in rows])
    return metrics


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
