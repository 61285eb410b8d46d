"""Reasoning mode: think freely, then recommend real items.

Each user gets one or more sampled chains, and the answer of each is scored as SRPO scores it. Then items are ranked,
by a beam search over real items after each chain, or by the sampled answers as the authors do.
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
from gream_verl.decoding import chains
from gream_verl.decoding.answer_automaton import AnswerAutomaton
from gream_verl.decoding.beam_ranker import shared_prefix
from gream_verl.evaluation.metrics import CUTOFFS, pass_at_k, rank_of, ranking_metrics
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.progress import ProgressFile
from gream_verl.evaluation.prompts import Prompt, without_thinking
from gream_verl.evaluation.ranking import OVER, ItemRanker, Users, encode
from gream_verl.evaluation.results import Evaluation, row_means
from gream_verl.evaluation.sampling import PROCESSOR, HuggingFaceSampler, Response, VllmSampler
from gream_verl.evaluation.shards import in_shards
from gream_verl.model.loading import load_decoding_config, load_model, load_tokenizer

BATCHES_PER_PIECE = 4  # for engines that fill their own batches and would idle at the end of every piece
# Options that decide a row; the others decide its speed.
DECISIVE = {"engine", "ranking", "merge", "constrained", "beams", "score", "drop_history", "seed", "served_model",
            "chains", "temperature", "top_p", "max_tokens"}  # fmt: skip
SCORES = {"beam": "probability of the SID after the chain", "reference": "probability of the whole response"}
MERGED = {"mean": "mean over chains", "max": "best chain"}
_Begun = tuple[Prompt, Sequence[int], bool]  # tokens up to the answer; True for a chain that can pass the format gate


def evaluate_reasoning(
    model_folder: Path, prompts: Sequence[Prompt], index: ItemIndex, options: EvaluationOptions, progress_file: Path
) -> Evaluation:
    """Sample chains of thought for every user, score their answers, and rank real items.

    Finished users are added to ``progress_file``, a piece at a time; a later call goes on with it. Metrics of the
    sampled answers are means over chains and users: those of ``core.rsvr.Reward``, ``reached_answer``, ``tokens``
    (without the end of the sequence) and ``pass@k``. Those of ``results.MEASURES`` are per user.
    """
    begin = time.perf_counter()
    if options.ranking == "reference":
        options = options.model_copy(update={"merge": "max"})
    tokenizer = load_tokenizer(model_folder)
    room = options.max_tokens
    if _has_model(options):
        tags = tokenizer.encode(chains.THOUGHT_END + chains.ANSWER, add_special_tokens=False)
        room += len(tags) + max(map(len, index.sids.values()))
    config = load_decoding_config(model_folder, tokenizer)
    users = list(zip(prompts, encode(prompts, index, tokenizer, config, room), strict=True))
    decisive = options.model_dump(include=DECISIVE)
    header = {**decisive, **_inputs(model_folder, users, index, tokenizer.eos_token_id)}
    with closing(ProgressFile(progress_file, header, overwrite=options.overwrite)) as done:
        kept = sum(prompt.user in done.rows for prompt in prompts)
        if kept:
            message = f"{kept} of {len(prompts)} users taken from {progress_file}"
            get_console().print(message, style="green", highlight=False, markup=False, soft_wrap=True)
        _recommend_missing(model_folder, users, index, options, done)
        rows = [done.rows[prompt.user] for prompt in prompts]
    over = OVER[options.score if options.ranking == "beam" else "vocabulary"]
    settings = {
        "mode": "reasoning",
        "model": os.fspath(model_folder),
        "index": index.source,
        **decisive,
        "score": f"{MERGED[options.merge]}: {SCORES[options.ranking]} {over}",
        "batch_size": options.batch_size,
        "users": len(prompts),
        "endpoint": options.endpoint,
        "users_from_progress": kept,
        "seconds_of_this_call": round(time.perf_counter() - begin, 2),
    }
    return Evaluation(_metrics(rows, options), settings, rows)


def _searches(options: EvaluationOptions) -> bool:
    return options.ranking == "beam" and options.beams > 0


def _has_model(options: EvaluationOptions) -> bool:
    return options.engine != "server" or _searches(options)


def _recommend_missing(
    folder: Path, users: Users, index: ItemIndex, options: EvaluationOptions, done: ProgressFile
) -> None:
    """Add the rows of all users that are not done."""
    # Pieces are cut from all users, so that a resumed run computes the same batches.
    at_once = options.batch_size if options.engine == "hf" else BATCHES_PER_PIECE * options.batch_size
    size = max(1, at_once // (options.chains + 1))
    pieces = [users[start : start + size] for start in range(0, len(users), size)]
    missing = [piece for piece in pieces if any(prompt.user not in done.rows for prompt, _ in piece)]
    if missing:
        sequences = [sequence for _, sequence in users]
        make_worker = partial(_Recommender, folder, index, options, shared_prefix(sequences), max(map(len, sequences)))
        results = in_shards(make_worker, missing, options.shards)
        for rows in track(results, "Reasoning mode", len(missing)):
            done.add(rows)


class _Recommender:
    """Recommends for the users of a piece; the worker of a shard."""

    def __init__(
        self, folder: Path, index: ItemIndex, options: EvaluationOptions, prefix: Sequence[int], longest_prompt: int
    ) -> None:
        self.index, self.options = index, options
        self.tokenizer = load_tokenizer(folder)
        self.reader = TokenText(self.tokenizer)
        self.ranker: ItemRanker | None = None
        if _has_model(options):
            model = load_model(folder, inference=True)
            self.ranker = ItemRanker(model, self.tokenizer, index, options, prefix)
        eos = self.tokenizer.eos_token_id
        self.sampler: Any
        if options.engine == "server":
            from gream_verl.evaluation.server import ServerSampler

            self.sampler = ServerSampler(options, self.tokenizer)
        elif options.engine == "hf":
            automaton = AnswerAutomaton.build(index, self.tokenizer, str(folder)) if options.constrained else None
            self.sampler = HuggingFaceSampler(model, options, eos, automaton)
        else:
            self.sampler = VllmSampler(folder, options, eos, longest_prompt, index)

    def __call__(self, piece: Users) -> list[dict[str, Any]]:
        """Return the rows of some users."""
        # 1. One response of the most likely tokens to each prompt, then the chains; at temperature 0 it is the chain.
        options = self.options
        drawn = options.chains if options.temperature else 0
        requests: list[tuple[Sequence[int], int | None]] = []
        for prompt, sequence in piece:
            seed = zlib.crc32(f"{options.seed}:{prompt.user}".encode())
            requests += [(sequence, None), *((sequence, seed + chain) for chain in range(drawn))]
        flat, size = self.sampler.sample(requests), drawn + 1
        greedy = flat[::size]
        responses = [flat[start : start + size][-options.chains :] for start in range(0, len(flat), size)]
        # 2. Their scores.
        rows: list[dict[str, Any]] = []
        for (prompt, _), likely, sampled in zip(piece, greedy, responses, strict=True):
            scored = [self._chain(prompt, response) for response in sampled]
            row = {"user": prompt.user, "target": prompt.target, "history_length": len(prompt.history)}
            row["rsvr"] = sum(chain["rsvr"] for chain in scored) / len(scored)
            rows.append({**row, "greedy_rsvr": self._chain(prompt, likely)["rsvr"], "chains": scored})
        # 3. What can follow each chain.
        begun = self._begun(piece, responses) if self.ranker else []
        if self.ranker:
            for row, measures in zip(rows, self._measures(self.ranker, piece, begun), strict=True):
                row.update(measures)
        if options.beams:
            rankings = self._search(begun) if _searches(options) else self._answers(piece, responses)
            for row, found in zip(rows, rankings, strict=True):
                merged = chains.merge_rankings(found, options.beams, options.merge)
                row["recommended"] = list(merged)
                row["scores"] = [round(value, 5) for value in merged.values()]
        return rows

    def _chain(self, prompt: Prompt, response: Response) -> dict[str, Any]:
        """Return the part of a row that one chain gives."""
        ids = [token for token in response.tokens if token != self.tokenizer.eos_token_id]
        read = self.reader.read(ids)
        reward = score_response(read, self.index.sids[prompt.target], index=self.index)
        sid = strict_answer(read, "reasoning")
        item = None if sid is None else self.index.items.get(sid)
        if sid is not None and item is None and self.options.constrained:
            raise InputError(f"{self.options.endpoint}: does not constrain answers; start vLLM with {PROCESSOR}")
        return {
            "text": self.tokenizer.decode(ids, skip_special_tokens=False),
            "rsvr": reward.score,
            **{name: getattr(reward, name) for name in ("match", "format", "acc", "valid_item")},
            "reached_answer": float(chains.up_to_answer(read)[1]),
            "tokens": len(ids),
            "item": item,
            "response_score": round(float(sum(response.logprobs)), 5) if response.logprobs else None,
        }

    def _dropped(self, prompt: Prompt) -> Sequence[str]:
        return prompt.history if self.options.drop_history else ()

    def _answers(self, piece: Users, responses: Sequence[Sequence[Response]]) -> list[list[dict[str, float]]]:
        """Return the answer of each chain of each user, found and scored as the authors do.

        Their evaluation sums the log-probabilities of all tokens (Indolent-Kawhi/GRRM, eval/test_ddp_reason.py), which
        favours short chains.
        """
        if any(response.tokens and not response.logprobs for sampled in responses for response in sampled):
            raise InputError(f"{self.options.endpoint}: sends no log-probabilities to rank by; set ranking: beam")

        def ranking(prompt: Prompt, response: Response) -> dict[str, float]:
            sid = reference_answer(self.reader.read(response.tokens), "reasoning")
            item = None if sid is None else self.index.items.get(sid)
            return {} if item is None or item in self._dropped(prompt) else {item: float(sum(response.logprobs))}

        pairs = zip(piece, responses, strict=True)
        return [[ranking(prompt, response) for response in sampled] for (prompt, _), sampled in pairs]

    def _begun(self, piece: Users, responses: Sequence[Sequence[Response]]) -> list[_Begun]:
        """Return the prompts and chains of each user up to the answer, all in one list."""
        begun: list[_Begun] = []
        for (prompt, sequence), sampled in zip(piece, responses, strict=True):
            for response in sampled:
                kept, reached = chains.tokens_up_to_answer(response.tokens, self.reader, self.tokenizer)
                answered = f"{self.reader.read(kept)}{prompt.truth}</answer>"
                is_formed = reached and strict_answer(answered, "reasoning") is not None
                begun.append((prompt, [*sequence, *kept], is_formed))
        return begun

    def _measures(self, ranker: ItemRanker, piece: Users, begun: Sequence[_Begun]) -> list[dict[str, float]]:
        """Return what the chains of each user promise, and what they add to the answer of direct mode."""
        room = max(map(len, self.index.sids.values()))
        direct = [without_thinking(prompt) for prompt, _ in piece]
        sequences = encode(direct, self.index, self.tokenizer, ranker.model.config, room)
        with_chain = ranker.score_targets([(ids, prompt.target) for prompt, ids, _ in begun])
        alone = ranker.score_targets([(ids, prompt.target) for prompt, ids in zip(direct, sequences, strict=True)])
        values, gates = np.array(with_chain), np.array([is_formed for *_, is_formed in begun])
        shape = len(piece), self.options.chains
        rewards = (values[:, 0] * gates).reshape(shape).mean(axis=1)
        log_probs = np.logaddexp.reduce(values[:, 1].reshape(shape), axis=1) - np.log(self.options.chains)
        return [
            {
                "expected_rsvr": round(float(expected), 4),
                "target_logprob": round(float(logprob), 3),
                "target_logprob_without_chain": round(float(without), 3),
                "chain_gain": round(float(logprob - without), 3),
            }
            for expected, logprob, (_, without) in zip(rewards, log_probs, alone, strict=True)
        ]

    def _search(self, begun: Sequence[_Begun]) -> list[list[dict[str, float]]]:
        """Return the items that a beam search finds after each chain of each user."""
        assert self.ranker is not None
        ranked, size = self.ranker.rank([(ids, self._dropped(prompt)) for prompt, ids, _ in begun]), self.options.chains
        return [ranked[start : start + size] for start in range(0, len(ranked), size)]


def _metrics(rows: Sequence[Mapping[str, Any]], options: EvaluationOptions) -> dict[str, float]:
    names = ("match", "format", "acc", "valid_item", "reached_answer", "tokens")
    metrics = {name: float(np.mean([[chain[name] for chain in row["chains"]] for row in rows])) for name in names}
    metrics |= row_means(rows)
    correct = [sum(chain["acc"] for chain in row["chains"]) for row in rows]
    for k in sorted({*(k for k in CUTOFFS if k <= options.chains), options.chains}):
        metrics[f"pass@{k}"] = float(pass_at_k([options.chains] * len(rows), correct, k).mean())
    if options.beams:
        metrics |= ranking_metrics([rank_of(row["target"], row["recommended"]) for row in rows])
    return metrics


def _inputs(folder: Path, users: Users, index: ItemIndex, eos: int) -> dict[str, Any]:
    """Return digests of the model, the items and the prompts, and the device, which decide rows like the options."""
    prompts = [[prompt.user, prompt.target, prompt.history, list(sequence)] for prompt, sequence in users]
    asked = json.dumps([list(index.sids.items()), prompts, without_thinking(users[0][0]).messages, eos])
    endings = ("*.safetensors", "*.bin", "config.json", "tokenizer.json")
    return {
        "files": {file.name: fingerprint(file) for ending in endings for file in sorted(folder.glob(ending))},
        "prompts": hashlib.sha256(asked.encode()).hexdigest(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }
