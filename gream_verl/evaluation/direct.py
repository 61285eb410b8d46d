"""Direct mode: no thinking, a beam search over the SIDs of real items."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.progress import track

from gream_verl.decoding.prefix_tree import PrefixTree
from gream_verl.evaluation.metrics import rank_of, ranking_metrics
from gream_verl.evaluation.prompts import check_room, encode, load_model, read_prompts
from gream_verl.evaluation.ranking import ItemRanker, check_prompts
from gream_verl.evaluation.results import Evaluation
from gream_verl.rsvr import match_score
from gream_verl.semantic_ids import ItemIndex
from gream_verl.vocabulary import sid_token_ids


def evaluate_direct(
    model_folder: str | os.PathLike[str],
    prompts_parquet: str | os.PathLike[str],
    index_file: str | os.PathLike[str],
    *,
    beams: int = 30,
    batch_size: int = 64,
    drop_history: bool = True,
    limit: int | None = None,
    seed: int = 0,
) -> Evaluation:
    """Rank all items for every test user by the log-probability of their SIDs.

    Args:
        model_folder: A Hugging Face model.
        prompts_parquet: ``<D>-test.parquet``; its rows of type ``direct`` are used.
        index_file: ``<D>.index.json``.
        beams: Beams a user; also the length of the recommended list.
        batch_size: Users a batch; it decides the memory, not the result (beyond the rounding of sums).
        drop_history: Never recommend an item of the user's history; the search does not enter them.
        limit: Evaluate a random sample of so many users; None takes all.
        seed: Seed of the sample.

    Returns:
        Metrics: Recall, NDCG, Precision and MRR at 1, 5 and 10, and ``rsvr``, the mean RSVR of the first item
        (every item exists, by construction). Rows: ``user``, ``target``, ``recommended``, ``scores``, ``rsvr``.

    Raises:
        InputError: When a file cannot be used, or an item or SID token is missing from the index or the tokenizer.
    """
    begin = time.perf_counter()
    prompts, total = read_prompts(prompts_parquet, "direct", limit=limit, seed=seed)
    index = ItemIndex.load(index_file)
    check_prompts(prompts, index)
    model, tokenizer = load_model(model_folder)
    tree = PrefixTree.from_index(index, sid_token_ids(tokenizer, index, os.fspath(model_folder))).to(model.device)
    ranker = ItemRanker(model, tree, list(index.sids), beams, batch_size)

    sequences = encode(prompts, tokenizer)
    check_room(sequences, model, tree.depth)

    rows: list[dict[str, Any]] = [{} for _ in prompts]
    ranked = ranker.rank(sequences, [prompt.history if drop_history else () for prompt in prompts])
    for place, ranking in track(ranked, description="Direct mode", total=len(prompts)):
        user, target, recommended = prompts[place].user, prompts[place].target, list(ranking)
        rows[place] = {
            "user": user,
            "target": target,
            "recommended": recommended,
            "scores": [round(score, 5) for score in ranking.values()],
            "rsvr": match_score(index.sids[recommended[0]], index.readable[target], index.base_levels)
            if ranking
            else 0.0,
        }
    settings = {
        "mode": "direct",
        "model": os.fspath(model_folder),
        "prompts": os.fspath(prompts_parquet),
        "index": os.fspath(index_file),
        "beams": beams,
        "batch_size": batch_size,
        "drop_history": drop_history,
        "users": len(prompts),
        "users_in_file": total,
        "seed": seed,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "score": "sum of log-probabilities over the whole vocabulary, no length penalty",
        "seconds": round(time.perf_counter() - begin, 2),
    }
    return Evaluation(_metrics(rows), settings, rows)


def _metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    ranks = [rank_of(row["target"], row["recommended"]) for row in rows]
    return {**ranking_metrics(ranks), "rsvr": sum(row["rsvr"] for row in rows) / len(rows)}
