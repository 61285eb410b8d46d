"""Direct mode: no thinking, a beam search over the SIDs of real items."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from rich.progress import track

from gream_verl.core.rsvr import match_score
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.decoding.beam_search import Score
from gream_verl.evaluation.metrics import rank_of, ranking_metrics
from gream_verl.evaluation.prompts import Prompt, check_room, encode, load_model, load_tokenizer
from gream_verl.evaluation.ranking import ItemRanker, check_prompts, shared_prefix
from gream_verl.evaluation.results import Evaluation
from gream_verl.evaluation.shards import in_shards

SCORES: Mapping[Score, str] = {
    "vocabulary": "sum of log-probabilities over the whole vocabulary, no length penalty",
    "items": "sum of log-probabilities over the tokens that lead to items, no length penalty",
}

Batch = tuple[list[list[int]], list[tuple[str, ...]]]
"""Token ids of some prompts, and the items that must not be recommended to each."""


class DirectWorker:
    """Ranks items for batches of prompts, in this process or another."""

    def __init__(
        self,
        model_folder: str | os.PathLike[str],
        index_file: str | os.PathLike[str],
        prefix: Sequence[int],
        beams: int,
        batch_size: int,
        score: Score,
    ) -> None:
        index = ItemIndex.load(index_file)
        model, tokenizer = load_model(model_folder)
        self.ranker = ItemRanker.of_index(model, tokenizer, index, beams, batch_size, score=score, prefix=prefix)
        self.machine = {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}

    def __call__(self, batch: Batch) -> tuple[list[dict[str, float]], dict[str, Any]]:
        """Return the ranking of each prompt, item to score, and what it was computed on."""
        rankings = dict(self.ranker.rank(*batch))
        return [rankings[place] for place in range(len(rankings))], {**self.machine, "batch": self.ranker.batch_size}


def evaluate_direct(
    model_folder: str | os.PathLike[str],
    prompts: Sequence[Prompt],
    index_file: str | os.PathLike[str],
    *,
    protocol: Mapping[str, Any] | None = None,
    beams: int = 30,
    batch_size: int = 64,
    score: Score = "vocabulary",
    drop_history: bool = True,
    shards: int = 1,
) -> Evaluation:
    """Rank all items for every test user by the log-probability of their SIDs.

    Args:
        model_folder: A Hugging Face model.
        prompts: The users and their direct prompts.
        index_file: ``<D>.index.json``.
        protocol: Where the prompts are from and how they were made, for the settings.
        beams: Beams a user; also the length of the recommended list.
        batch_size: Users a batch; it decides the memory, not the result (beyond the rounding of sums).
        score: What the probability of a token is a share of; see ``beam_search``.
        drop_history: Never recommend an item of the user's history; the search does not enter them.
        shards: Workers; with more than one they are Ray's (see ``in_shards``). The result is the same.

    Returns:
        Metrics: Recall, NDCG, Precision and MRR at 1, 5 and 10, and ``rsvr``, the mean RSVR of the first item
        (every item exists, by construction). Rows: ``user``, ``target``, ``history_length``, ``recommended``,
        ``scores``, ``rsvr``.

    Raises:
        InputError: When a file cannot be used, or an item or SID token is missing from the index or the tokenizer.
    """
    begin = time.perf_counter()
    index = ItemIndex.load(index_file)
    check_prompts(prompts, index)
    config, tokenizer = load_tokenizer(model_folder)
    sequences = encode(prompts, tokenizer)
    check_room(sequences, config, max(map(len, index.sids.values())))
    prefix = shared_prefix(sequences)

    order = sorted(range(len(prompts)), key=lambda place: -len(sequences[place]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    pieces: list[Batch] = [
        ([sequences[place] for place in batch], [prompts[place].history if drop_history else () for place in batch])
        for batch in batches
    ]
    files = os.fspath(model_folder), os.fspath(index_file)
    make_worker = partial(DirectWorker, *files, prefix, beams, batch_size, score)
    rows: list[dict[str, Any]] = [{} for _ in prompts]
    machines = []
    for number, (rankings, machine) in track(
        in_shards(make_worker, pieces, shards), description="Direct mode", total=len(pieces)
    ):
        machines.append(machine)
        for place, ranking in zip(batches[number], rankings, strict=True):
            rows[place] = _row(prompts[place], ranking, index)
    smallest = min(machines, key=lambda machine: machine["batch"])
    settings = {
        "mode": "direct",
        "model": os.fspath(model_folder),
        "index": os.fspath(index_file),
        "beams": beams,
        "score": SCORES[score],
        "drop_history": drop_history,
        "users": len(prompts),
        **{name: (protocol or {}).get(name) for name in ("prompts", "users_in_file", "seed")},
        "protocol": dict(protocol or {}),
        "batch_size": batch_size,
        "batch_size_after_out_of_memory": smallest["batch"] if smallest["batch"] < batch_size else None,
        "prompt tokens computed once": len(prefix),
        "shards": shards,
        "device": smallest["device"],
        "dtype": smallest["dtype"],
        "seconds": round(time.perf_counter() - begin, 2),
    }
    return Evaluation(_metrics(rows), settings, rows)


def _row(prompt: Prompt, ranking: Mapping[str, float], index: ItemIndex) -> dict[str, Any]:
    recommended = list(ranking)
    truth = index.sids[prompt.target]
    return {
        "user": prompt.user,
        "target": prompt.target,
        "history_length": len(prompt.history),
        "recommended": recommended,
        "scores": [round(score, 5) for score in ranking.values()],
        "rsvr": match_score(index.sids[recommended[0]], truth, index.base_levels) if ranking else 0.0,
    }


def _metrics(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    ranks = [rank_of(row["target"], row["recommended"]) for row in rows]
    return {**ranking_metrics(ranks), "rsvr": sum(row["rsvr"] for row in rows) / len(rows)}
