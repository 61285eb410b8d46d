"""Direct mode: no thinking, a beam search over the SIDs of real items."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from gream_verl.core.rsvr import match_score
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.decoding.beam_ranker import shared_prefix
from gream_verl.evaluation.metrics import rank_of, ranking_metrics
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.prompts import Prompt
from gream_verl.evaluation.ranking import OVER, ItemRanker, Users, encode
from gream_verl.evaluation.results import Evaluation, row_means
from gream_verl.evaluation.shards import in_shards
from gream_verl.model.loading import load_decoding_config, load_model, load_tokenizer


class _Worker:
    """Ranks items for batches of users, in this process or another."""

    def __init__(self, folder: Path, index: ItemIndex, prefix: Sequence[int], options: EvaluationOptions) -> None:
        self.index, self.drop_history = index, options.drop_history
        model = load_model(folder, inference=True)
        self.ranker = ItemRanker(model, load_tokenizer(folder), index, options, prefix)

    def __call__(self, users: Users) -> list[dict[str, Any]]:
        """Return the rows of some users."""
        sids, levels = self.index.sids, self.index.base_levels
        rankings = self.ranker.rank([(ids, prompt.history if self.drop_history else ()) for prompt, ids in users])
        scores = self.ranker.score_targets([(ids, prompt.target) for prompt, ids in users])
        return [
            {
                "user": prompt.user,
                "target": prompt.target,
                "history_length": len(prompt.history),
                "recommended": list(ranking),
                "scores": [round(score, 5) for score in ranking.values()],
                "rsvr": match_score(sids[next(iter(ranking))], sids[prompt.target], levels) if ranking else 0.0,
                "expected_rsvr": round(expected, 4),
                "target_logprob": round(logprob, 3),
            }
            for (prompt, _), ranking, (expected, logprob) in zip(users, rankings, scores, strict=True)
        ]


def evaluate_direct(
    model_folder: Path, prompts: Sequence[Prompt], index: ItemIndex, options: EvaluationOptions
) -> Evaluation:
    """Rank all items for every user by the log-probability of their SIDs; ``rsvr`` is that of the first item."""
    begin = time.perf_counter()
    tokenizer = load_tokenizer(model_folder)
    config = load_decoding_config(model_folder, tokenizer)
    sequences = encode(prompts, index, tokenizer, config, room=max(map(len, index.sids.values())))
    prefix, size = shared_prefix(sequences), options.batch_size
    users = sorted(zip(prompts, sequences, strict=True), key=lambda user: -len(user[1]))
    pieces = [users[start : start + size] for start in range(0, len(users), size)]
    results = in_shards(partial(_Worker, model_folder, index, prefix, options), pieces, options.shards)
    done = {row["user"]: row for rows in track(results, "Direct mode", len(pieces)) for row in rows}
    rows = [done[prompt.user] for prompt in prompts]
    settings = {
        "mode": "direct",
        "model": os.fspath(model_folder),
        "index": index.source,
        **options.model_dump(include={"beams", "drop_history", "batch_size", "shards"}),
        "score": f"sum of log-probabilities {OVER[options.score]}, no length penalty",
        "users": len(prompts),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "seconds": round(time.perf_counter() - begin, 2),
    }
    ranks = [rank_of(row["target"], row["recommended"]) for row in rows]
    return Evaluation({**ranking_metrics(ranks), **row_means(rows)}, settings, rows)
