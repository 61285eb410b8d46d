"""Reasoning mode: think freely, then recommend real items.

Each user gets one or more sampled chains, and the answer of each is scored as SRPO scores it. Then items are ranked:

* ``beam``: the tokens of each chain are kept up to ``<answer>``, and a beam search over the SIDs of real items ranks
  the continuations.
* ``reference``: the sampled answers by the log-probability of the whole response, as the authors rank.

``chains.merge_rankings`` merges the rankings of several chains.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import get_console
from rich.progress import track

from gream_verl.core.errors import InputError
from gream_verl.core.files import fingerprint
from gream_verl.core.rsvr import reference_answer, score_response, strict_answer
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.core.token_text import TokenText
from gream_verl.decoding.answer_automaton import AnswerAutomaton
from gream_verl.evaluation import chains
from gream_verl.evaluation.metrics import CUTOFFS, pass_at_k, rank_of, ranking_metrics
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.progress import ProgressFile
from gream_verl.evaluation.prompts import Prompt
from gream_verl.evaluation.ranking import ItemRanker, Users, encode, shared_prefix
from gream_verl.evaluation.results import Evaluation
from gream_verl.evaluation.sampling import HuggingFaceSampler, Response, VllmSampler
from gream_verl.evaluation.shards import in_shards
from gream_verl.model.loading import load_decoding_config, load_model, load_tokenizer

BATCHES_PER_PIECE = 4
"""For engines that fill their own batches and would idle at the end of every piece."""
DECISIVE = {"engine", "ranking", "merge", "constrained", "beams", "score", "drop_history", "seed", "served_model",
            "chains", "temperature", "top_p", "max_tokens"}  # fmt: skip
"""Options that decide a row; the others decide its speed."""
SCORES = {
    "beam": "probability of the SID after the chain, over the whole vocabulary",
    "reference": "probability of the whole response, over the whole vocabulary",
}
MERGED = {"mean": "mean over chains", "max": "best chain"}


def evaluate_reasoning(
    model_folder: Path,
    prompts: Sequence[Prompt],
    index: ItemIndex,
    options: EvaluationOptions,
    *,
    progress_file: Path | None = None,
) -> Evaluation:
    """Sample chains of thought for every user, score their answers, and rank real items.

    Finished users are added to ``progress_file``, a piece at a time; a later call goes on with it. The model needs no
    weights for the engine ``server`` without a beam search.

    Returns:
        Metrics of the sampled answers, means over chains and users: ``rsvr``, ``match``, ``format``, ``acc``,
        ``valid_item`` (see ``gream_verl.core.rsvr.Reward``), ``reached_answer``, ``tokens`` (without the end of the
        sequence) and ``pass@k`` for k = 1, 5, 10 up to the chains, and all chains; of the ranking: Recall, NDCG,
        Precision and MRR. Rows as in ``_row`` and ``_chain``, with ``recommended`` and ``scores``.

    Raises:
        InputError: When a file, an option or a server cannot be used.
    """
    begin = time.perf_counter()
    if options.ranking == "reference":
        options = options.model_copy(update={"merge": "max"})
    tokenizer = load_tokenizer(model_folder)
    room = options.max_tokens
    if _searches(options):
        tags = tokenizer.encode(chains.THOUGHT_END + chains.ANSWER, add_special_tokens=False)
        room += len(tags) + max(map(len, index.sids.values()))
    config = load_decoding_config(model_folder, tokenizer)
    users = list(zip(prompts, encode(prompts, index, tokenizer, config, room), strict=True))
    decisive = options.model_dump(include=DECISIVE)
    header = {**decisive, **_inputs(model_folder, users, index, tokenizer.eos_token_id)} if progress_file else {}
    with closing(ProgressFile(progress_file, header, overwrite=options.overwrite)) as done:
        kept = sum(prompt.user in done.rows for prompt in prompts)
        if kept:
            message = f"{kept} of {len(prompts)} users taken from {progress_file}"
            get_console().print(message, style="green", highlight=False, markup=False, soft_wrap=True)
        _recommend_missing(model_folder, users, index, options, done)
        rows = [done.rows[prompt.user] for prompt in prompts]
    of_items = ", of items only" if options.score == "items" else ""
    settings = {
        "mode": "reasoning",
        "model": os.fspath(model_folder),
        "index": index.source,
        **decisive,
        "score": f"{MERGED[options.merge]}: {SCORES[options.ranking]}{of_items}",
        "batch_size": options.batch_size,
        "users": len(prompts),
        "endpoint": options.endpoint,
        "users_from_progress": kept,
        "seconds_of_this_call": round(time.perf_counter() - begin, 2),
    }
    return Evaluation(_metrics(rows, options), settings, rows)


def _searches(options: EvaluationOptions) -> bool:
    return options.ranking == "beam" and options.beams > 0


def _recommend_missing(
    folder: Path, users: Users, index: ItemIndex, options: EvaluationOptions, done: ProgressFile
) -> None:
    """Add the rows of all users that are not done."""
    # Pieces are cut from all users, so that a resumed run computes the same batches.
    at_once = options.batch_size if options.engine == "hf" else BATCHES_PER_PIECE * options.batch_size
    size = max(1, at_once // options.chains)
    pieces = [users[start : start + size] for start in range(0, len(users), size)]
    missing = [piece for piece in pieces if any(prompt.user not in done.rows for prompt, _ in piece)]
    if missing:
        sequences = [sequence for _, sequence in users]
        make_worker = partial(_Recommender, folder, index, options, shared_prefix(sequences), max(map(len, sequences)))
        results = in_shards(make_worker, missing, options.shards)
        for _, rows in track(results, "Reasoning mode", len(missing)):
            done.add(rows)


class _Recommender:
    """Recommends for the users of a piece; the worker of a shard."""

    def __init__(
        self, folder: Path, index: ItemIndex, options: EvaluationOptions, prefix: Sequence[int], longest_prompt: int
    ) -> None:
        self.index, self.options = index, options
        self.tokenizer = load_tokenizer(folder)
        self.reader = TokenText(self.tokenizer)
        model = load_model(folder, inference=True) if options.engine == "hf" or _searches(options) else None
        self.ranker: ItemRanker | None = None
        if model is not None and _searches(options):
            self.ranker = ItemRanker(model, self.tokenizer, index, options, prefix)
        eos = self.tokenizer.eos_token_id
        self.sampler: Any
        if options.engine == "server":
            from gream_verl.evaluation.server import ServerSampler

            self.sampler = ServerSampler(options, self.tokenizer)
        elif options.engine == "hf":
            assert model is not None
            automaton = AnswerAutomaton.build(index, self.tokenizer, str(folder)) if options.constrained else None
            self.sampler = HuggingFaceSampler(model, options, eos, automaton)
        else:
            memory = 0.9 if model is None else 0.6  # the model of the beam search needs the rest
            constrained_to = index if options.constrained else None
            self.sampler = VllmSampler(folder, options, eos, longest_prompt, memory, constrained_to)

    def __call__(self, piece: Users) -> list[dict[str, Any]]:
        """Return the rows of some users."""
        options = self.options
        seeds = [zlib.crc32(f"{options.seed}:{prompt.user}".encode()) for prompt, _ in piece]
        responses = self.sampler.sample([sequence for _, sequence in piece], seeds)
        rows = [self._row(prompt, sampled) for (prompt, _), sampled in zip(piece, responses, strict=True)]
        if options.beams:
            rankings = self._search(piece, responses) if self.ranker else self._answers(responses)
            for (prompt, _), row, found in zip(piece, rows, rankings, strict=True):
                dropped = set(prompt.history if options.drop_history else ())
                allowed = [{item: value for item, value in one.items() if item not in dropped} for one in found]
                merged = chains.merge_rankings(allowed, options.beams, options.merge)
                row["recommended"] = list(merged)
                row["scores"] = [round(value, 5) for value in merged.values()]
        return rows

    def _row(self, prompt: Prompt, responses: Sequence[Response]) -> dict[str, Any]:
        sampled = [self._chain(prompt, response) for response in responses]
        return {
            "user": prompt.user,
            "target": prompt.target,
            "history_length": len(prompt.history),
            "rsvr": sum(chain["rsvr"] for chain in sampled) / len(sampled),
            "chains": sampled,
        }

    def _chain(self, prompt: Prompt, response: Response) -> dict[str, Any]:
        ids = [token for token in response.tokens if token != self.tokenizer.eos_token_id]
        read = self.reader.read(ids)
        reward = score_response(read, self.index.sids[prompt.target], index=self.index)
        sid = strict_answer(read, "reasoning")
        if sid is not None and sid not in self.index.items:
            if self.options.constrained and self.options.engine == "server":
                raise InputError(
                    f"{self.options.endpoint}: does not constrain answers to {self.index.source}; start vLLM with the "
                    "logits processor gream_verl.decoding.vllm_processor:ConstrainedAnswer, or leave answers free"
                )
            sid = None
        score = chains.answer_score(response, self.reader, sid) if sid and response.logprobs else None
        return {
            "text": self.tokenizer.decode(ids, skip_special_tokens=False),
            "rsvr": reward.score,
            **{name: getattr(reward, name) for name in ("match", "format", "acc", "valid_item")},
            "reached_answer": float(chains.up_to_answer(read)[1]),
            "tokens": len(ids),
            "item": self.index.items[sid] if sid else None,
            "answer_score": None if score is None else round(score, 5),
            "response_score": round(float(sum(response.logprobs)), 5) if response.logprobs else None,
        }

    def _answers(self, responses: Sequence[Sequence[Response]]) -> list[list[dict[str, float]]]:
        """Return the answer of each chain of each user, found and scored as the authors do.

        Their evaluation sums the log-probabilities of all tokens (Indolent-Kawhi/GRRM, eval/test_ddp_reason.py), which
        favours short chains.
        """
        if any(response.tokens and not response.logprobs for sampled in responses for response in sampled):
            raise InputError(f"{self.options.endpoint}: sends no log-probabilities to rank by; use --ranking beam")

        def ranking(response: Response) -> dict[str, float]:
            sid = reference_answer(self.reader.read(response.tokens), "reasoning")
            return {self.index.items[sid]: float(sum(response.logprobs))} if sid in self.index.items else {}

        return [[ranking(response) for response in sampled] for sampled in responses]

    def _search(self, piece: Users, responses: Sequence[Sequence[Response]]) -> list[list[dict[str, float]]]:
        """Return the items that a beam search finds after each chain of each user."""
        assert self.ranker is not None
        begun = [
            (
                [*sequence, *chains.tokens_up_to_answer(response.tokens, self.reader, self.tokenizer)[0]],
                prompt.history if self.options.drop_history else (),
            )
            for (prompt, sequence), sampled in zip(piece, responses, strict=True)
            for response in sampled
        ]
        ranked, size = self.ranker.rank(begun), self.options.chains
        return [ranked[start : start + size] for start in range(0, len(ranked), size)]


def _metrics(rows: Sequence[Mapping[str, Any]], options: EvaluationOptions) -> dict[str, float]:
    names = ("rsvr", "match", "format", "acc", "valid_item", "reached_answer", "tokens")
    metrics = {name: float(np.mean([[chain[name] for chain in row["chains"]] for row in rows])) for name in names}
    correct = [sum(chain["acc"] for chain in row["chains"]) for row in rows]
    for k in sorted({*(k for k in CUTOFFS if k <= options.chains), options.chains}):
        metrics[f"pass@{k}"] = float(pass_at_k([options.chains] * len(rows), correct, k).mean())
    if options.beams:
        metrics |= ranking_metrics([rank_of(row["target"], row["recommended"]) for row in rows])
    return metrics


def _inputs(folder: Path, users: Users, index: ItemIndex, eos: int) -> dict[str, Any]:
    """Return digests of the model, the items and the prompts, and the device, which decide rows like the options."""
    prompts = [[prompt.user, prompt.target, prompt.history, list(sequence)] for prompt, sequence in users]
    asked = json.dumps([list(index.sids.items()), prompts, eos])
    files = (
        file for ending in ("*.safetensors", "*.bin", "config.json", "tokenizer.json") for file in folder.glob(ending)
    )
    return {
        "files": {file.name: fingerprint(file) for file in files},
        "prompts": hashlib.sha256(asked.encode()).hexdigest(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
