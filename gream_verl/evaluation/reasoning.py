"""Reasoning mode: think freely, then recommend real items.

Each user gets one or more sampled chains, and the answer of each is scored as SRPO scores it. Then items are ranked:

* ``beam``, two stages: the tokens of each chain are kept up to ``<answer>``, and a beam search over the SIDs of real
  items ranks what could follow.
* ``answers``: the sampled answers themselves, by the log-probability of the answer given its chain; while they are
  sampled, answers are constrained to real items.
* ``reference``: the sampled answers by the log-probability of the whole response, as the authors rank.

The rankings of several chains are merged by the mean of the items' probabilities.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zlib
from bisect import bisect_left
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich import get_console
from rich.progress import track

from gream_verl.core.errors import InputError
from gream_verl.core.files import fingerprint
from gream_verl.core.rsvr import score_response
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.core.token_text import TokenText
from gream_verl.decoding.answer_automaton import AnswerAutomaton
from gream_verl.decoding.beam_search import Score
from gream_verl.evaluation.merging import Merge, Ranking, answer_score, answered_sid, merge_rankings, response_score
from gream_verl.evaluation.metrics import CUTOFFS, pass_at_k, rank_of, ranking_metrics
from gream_verl.evaluation.progress import ProgressFile
from gream_verl.evaluation.prompts import Prompt, check_room, encode, load_model, load_tokenizer
from gream_verl.evaluation.ranking import ItemRanker, check_prompts, shared_prefix
from gream_verl.evaluation.results import Evaluation
from gream_verl.evaluation.sampling import (
    Engine,
    HuggingFaceSampler,
    Response,
    Sampler,
    SamplingSettings,
    UnfinishedError,
    VllmSampler,
)
from gream_verl.evaluation.shards import in_shards

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gream_verl.evaluation.server import ServerSampler

THOUGHT_END, ANSWER = "</think>", "<answer>"
BATCHES_A_PIECE = 4
"""Of an engine that fills its own batches and would idle at the end of every piece."""
SCORES: dict[Ranking, str] = {
    "beam": "probability of the SID after the chain, over the whole vocabulary",
    "answers": "probability of the SID that was sampled after the chain, over the whole vocabulary",
    "reference": "probability of the whole response, over the whole vocabulary",
}
MERGED: dict[Merge, str] = {"mean": "mean over chains", "max": "best chain"}
Piece = Sequence[tuple[Prompt, Sequence[int]]]
"""Users with the token ids of their prompts."""


def evaluate_reasoning(
    model_folder: str | os.PathLike[str],
    prompts: Sequence[Prompt],
    index_file: str | os.PathLike[str],
    *,
    protocol: Mapping[str, Any] | None = None,
    engine: Engine = "vllm",
    ranking: Ranking = "beam",
    merge: Merge = "mean",
    constrained: bool | None = None,
    chains: int = 1,
    temperature: float = 0.6,
    top_p: float = 0.8,
    max_tokens: int = 256,
    beams: int = 30,
    batch_size: int = 64,
    score: Score = "vocabulary",
    drop_history: bool = True,
    seed: int = 0,
    shards: int = 1,
    progress_file: str | os.PathLike[str] | None = None,
    endpoint: str | None = None,
    served_model: str | None = None,
    concurrency: int = 64,
    timeout: float = 600.0,
) -> Evaluation:
    """Sample chains of thought for every user, score their answers, and rank real items.

    Args:
        model_folder: A Hugging Face model. With ``engine="server"`` and no beam search it needs no weights.
        prompts: The users to recommend for.
        index_file: ``<D>.index.json``.
        protocol: What the prompts are; kept in the settings.
        engine: Who samples: ``vllm``, its offline engine; ``hf``, a plain loop; ``server``, what is at ``endpoint``.
        ranking: ``beam``, ``answers`` or ``reference``; see above.
        merge: What the score of an item over chains is: ``mean``, its mean probability, to which a chain that did not
            find it adds nothing, or ``max``, its probability given the best chain. ``reference`` takes the maximum.
        constrained: Whether answers may only be real items while they are sampled; None: with ``answers`` only. A
            server must have been started for it, see ``server.py``.
        chains: Samples a user.
        temperature: Sampling temperature.
        top_p: Share of probability that sampling keeps.
        max_tokens: Longest response in tokens.
        beams: Beams of the second stage; also the longest recommended list. 0 leaves the ranking out.
        batch_size: Sequences computed at once. A piece of work is as many chains for ``hf``, and four times as many
            for ``vllm``, and for ``server``, where ``concurrency`` counts when it is larger. Users are kept when their
            piece is done: a kill loses the pieces that the shards are at. Where a request fails for good, the users of
            that piece with all their chains are kept, too.
        score: What a beam's probability is a share of; see ``ItemRanker``.
        drop_history: Never recommend an item of the user's history. The sampled answer is not touched by it.
        seed: Seed of the chains.
        shards: Workers of Ray's, see ``shards.py``; the pieces of work, and so the result, do not depend on it.
        progress_file: Finished users are added here with their chains, and a later call goes on from it when all that
            decides a row is the same: settings, files, prompts and their tokens, kind of device, and the server's
            ``fingerprint``. See ``ProgressFile``.
        endpoint: Base URL of the server, such as ``http://127.0.0.1:8000/v1``.
        served_model: Name of the model at the server; None takes the only one.
        concurrency: Requests under way at once at the server, for each shard.
        timeout: Seconds until a request to the server is given up.

    Returns:
        Metrics of the sampled answers, means over chains and users: ``rsvr``, ``match``, ``format``, ``acc``,
        ``valid_item`` (as in ``gream_verl.core.rsvr.Reward``), ``reached_answer``, ``tokens`` (without the end of the
        sequence), and ``pass@k`` for k = 1, 5, 10 up to the chains, and all chains; of the ranking: Recall, NDCG,
        Precision and MRR. Rows: ``user``, ``target``, ``history_length``, ``rsvr``, ``chains``, ``recommended``,
        ``scores``. Each of the chains has its text, its reward, the ``item`` it answers (None when it answers none),
        and the log-probability of the item's SID (``answer_score``) and of the whole (``response_score``). Settings
        tell how many users came from the progress file, ``users_from_progress``; ``seconds_of_this_call`` are of the
        others.

    Raises:
        InputError: When a file, a setting or a server cannot be used.
    """
    begin = time.perf_counter()
    if (engine == "server") != (endpoint is not None):
        raise InputError("the engine server needs --endpoint URL, and no other engine takes one")
    index = ItemIndex.load(index_file)
    check_prompts(prompts, index)
    [(user, count)] = Counter(prompt.user for prompt in prompts).most_common(1)
    if count > 1:
        raise InputError(
            f"user {user!r} has {count} prompts; finished users are told apart by name, give each one prompt"
        )
    config, tokenizer = load_tokenizer(model_folder)
    sequences = encode(prompts, tokenizer)
    job = _Job(
        model_folder=os.fspath(model_folder),
        index_file=os.fspath(index_file),
        engine=engine,
        ranking=ranking,
        merge="max" if ranking == "reference" else merge,
        constrained=ranking == "answers" if constrained is None else constrained,
        sampling=SamplingSettings(chains, temperature, top_p, max_tokens),
        beams=beams,
        score=score,
        drop_history=drop_history,
        seed=seed,
        batch_size=batch_size,
        longest_prompt=max(map(len, sequences)),
        prefix=shared_prefix(sequences),
        endpoint=endpoint,
        served_model=served_model,
        concurrency=concurrency,
        timeout=timeout,
    )
    answer_room = 0
    if job.two_stages:
        answer_room = len(_closing_tokens(THOUGHT_END + ANSWER, tokenizer)) + max(map(len, index.sids.values()))
    check_room(sequences, config, max_tokens + answer_room)
    identity = {
        "files": _digests(model_folder, index_file),
        "prompts": _digest([asdict(prompt) for prompt in prompts]),
        "tokens": _digest([sequences, tokenizer.eos_token_id]),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "dtype": str(config.dtype) if torch.cuda.is_available() else "float32",
    }
    if engine == "server":
        with closing(_server(job, tokenizer)) as server:
            identity["server"] = server.fingerprint(sequences[0])
        job = replace(job, served_model=server.model)

    with ProgressFile(progress_file, {**job.identity(), **identity}) as done:
        kept = sum(prompt.user in done.rows for prompt in prompts)
        if kept:
            told = f"{kept} of {len(prompts)} users taken from {progress_file}"
            get_console().print(told, style="green", highlight=False, markup=False, soft_wrap=True)
        missing = job.pieces(list(zip(prompts, sequences, strict=True)), done.rows)
        if missing:
            results = in_shards(partial(_Recommender, job), missing, shards)
            for _, (rows, failure) in track(results, description="Reasoning mode", total=len(missing)):
                done.add(rows)
                if failure is not None:
                    raise InputError(failure)
        rows = [done.rows[prompt.user] for prompt in prompts]

    protocol = dict(protocol or {})
    settings = {
        "mode": "reasoning",
        "model": os.fspath(model_folder),
        "prompts": protocol.get("prompts"),
        "index": os.fspath(index_file),
        **job.identity(),
        "score": f"{MERGED[job.merge]}: {SCORES[ranking]}" + (", of items only" if score == "items" else ""),
        "batch_size": batch_size,
        "users": len(prompts),
        "users_in_file": protocol.get("users_in_file", len(prompts)),
        "endpoint": endpoint,
        "protocol": protocol,
        "users_from_progress": kept,
        "seconds_of_this_call": round(time.perf_counter() - begin, 2),
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
    thought_end = response.find(THOUGHT_END)
    answer = response.find(ANSWER, thought_end) if thought_end >= 0 else -1
    if answer >= 0:
        return response[: answer + len(ANSWER)], True
    is_open = "<think>" in response and thought_end < 0
    return response + THOUGHT_END * is_open + ANSWER, False


def tokens_up_to_answer(
    response: Sequence[int], reader: TokenText, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], bool]:
    """Return the tokens of a response as they were sampled, cut or closed as ``up_to_answer`` does it with its text.

    Args:
        response: Token ids, with or without the end-of-sequence token.
        reader: Reads tokens as the reward does.
        tokenizer: The model's; only the tags that are added go through it.

    Returns:
        Token ids, up to and with the one that completes ``<answer>``, and whether the response got there.
    """

    def reached(length: int) -> bool:
        return up_to_answer(reader.read(response[:length]))[1]

    # A response that got there does so with everything behind it, too.
    length = bisect_left(range(len(response) + 1), True, key=reached)
    if length <= len(response):
        return list(response[:length]), True
    text = reader.read(response)
    ended = len(response) > 0 and response[-1] == tokenizer.eos_token_id
    added = up_to_answer(text)[0].removeprefix(text)
    return [*response[: len(response) - ended], *_closing_tokens(added, tokenizer)], False


@dataclass(frozen=True)
class _Job:
    """What a worker must know; the arguments of ``evaluate_reasoning``."""

    model_folder: str
    index_file: str
    engine: Engine
    ranking: Ranking
    merge: Merge
    constrained: bool
    sampling: SamplingSettings
    beams: int
    score: Score
    drop_history: bool
    seed: int
    batch_size: int
    longest_prompt: int
    prefix: tuple[int, ...]
    endpoint: str | None
    served_model: str | None
    concurrency: int
    timeout: float

    @property
    def two_stages(self) -> bool:
        return self.ranking == "beam" and self.beams > 0

    def pieces(self, users: Piece, done: Container[str]) -> list[Piece]:
        """Return the work that is left, in pieces.

        They are cut from all users, so that a resumed run computes the same batches; a server batches as it likes.
        """
        at_once = self.batch_size
        if self.engine == "server":
            at_once = max(at_once, self.concurrency)
            users = [user for user in users if user[0].user not in done]
        if self.engine != "hf":
            at_once *= BATCHES_A_PIECE
        size = max(1, at_once // self.sampling.chains)
        pieces = [users[start : start + size] for start in range(0, len(users), size)]
        return [piece for piece in pieces if any(prompt.user not in done for prompt, _ in piece)]

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide a row, beside files and prompts: not how fast it is computed."""
        chosen = ("engine", "ranking", "merge", "constrained", "beams", "score", "drop_history", "seed", "served_model")
        return {name: getattr(self, name) for name in chosen} | asdict(self.sampling)


class _Recommender:
    """Recommends for the users of a piece; the worker of a shard."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.index = index = ItemIndex.load(job.index_file)
        model = None
        if job.engine == "hf" or job.two_stages:
            model, self.tokenizer = load_model(job.model_folder)
        else:
            _, self.tokenizer = load_tokenizer(job.model_folder)
        self.reader = TokenText(self.tokenizer)
        self.ranker: ItemRanker | None = None
        if model is not None and job.two_stages:
            self.ranker = ItemRanker.of_index(
                model, self.tokenizer, index, job.beams, job.batch_size, score=job.score, prefix=job.prefix
            )
        eos = self.tokenizer.eos_token_id
        self.sampler: Sampler
        if job.engine == "server":
            self.sampler = _server(job, self.tokenizer, index if job.constrained else None)
        elif job.engine == "hf":
            assert model is not None
            automaton = AnswerAutomaton.build(index, self.tokenizer, job.model_folder) if job.constrained else None
            self.sampler = HuggingFaceSampler(model, job.sampling, eos, job.batch_size, automaton)
        else:
            self.sampler = VllmSampler(
                job.model_folder, job.sampling, eos, job.batch_size, job.longest_prompt,
                memory=0.9 if model is None else 0.6,  # the model of the beam search lives beside the engine
                index_file=job.index_file if job.constrained else None,
            )  # fmt: skip

    def __call__(self, piece: Piece) -> tuple[list[dict[str, Any]], str | None]:
        """Return the rows of some users, and why others have none, if there are any."""
        seeds = [zlib.crc32(f"{self.job.seed}:{prompt.user}".encode()) for prompt, _ in piece]
        try:
            return self._rows(piece, self.sampler.sample([sequence for _, sequence in piece], seeds)), None
        except UnfinishedError as error:
            finished = [piece[place] for place in error.finished]
            return self._rows(finished, list(error.finished.values())), str(error)

    def _rows(self, piece: Piece, responses: Sequence[Sequence[Response]]) -> list[dict[str, Any]]:
        rows = [self._row(prompt, sampled) for (prompt, _), sampled in zip(piece, responses, strict=True)]
        if self.job.beams:
            rankings = self._search(piece, responses) if self.ranker else self._answers(responses)
            for (prompt, _), row, found in zip(piece, rows, rankings, strict=True):
                dropped = set(prompt.history if self.job.drop_history else ())
                kept = [{item: value for item, value in one.items() if item not in dropped} for one in found]
                merged = merge_rankings(kept, self.job.beams, self.job.merge)
                row["recommended"] = list(merged)
                row["scores"] = [round(value, 5) for value in merged.values()]
        return rows

    def _row(self, prompt: Prompt, responses: Sequence[Response]) -> dict[str, Any]:
        """Return what is known of a user before the ranking."""
        chains = [self._chain(prompt, response) for response in responses]
        return {
            "user": prompt.user,
            "target": prompt.target,
            "history_length": len(prompt.history),
            "rsvr": sum(chain["rsvr"] for chain in chains) / len(chains),
            "chains": chains,
        }

    def _chain(self, prompt: Prompt, response: Response) -> dict[str, Any]:
        ids = [token for token in response.tokens if token != self.tokenizer.eos_token_id]
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        read = self.reader.read(ids)
        reward = score_response(read, self.index.sids[prompt.target], index=self.index)
        sid = answered_sid(response, self.reader, self.index, "answers")
        return {
            "text": text,
            "rsvr": reward.score,
            "match": reward.match,
            "format": reward.format,
            "acc": reward.acc,
            "valid_item": reward.valid_item,
            "reached_answer": float(up_to_answer(read)[1]),
            "tokens": len(ids),
            "item": self.index.items[sid] if sid else None,
            "answer_score": round(answer_score(response, self.reader, sid), 5) if sid and response.logprobs else None,
            "response_score": round(response_score(response), 5) if response.logprobs else None,
        }

    def _answers(self, responses: Sequence[Sequence[Response]]) -> list[list[dict[str, float]]]:
        """Return what each chain of each user answered, with its score."""
        if any(response.tokens and not response.logprobs for sampled in responses for response in sampled):
            raise InputError(
                f"{self.job.endpoint}: the server gives no log-probabilities, by which answers are ranked; use "
                "--ranking beam, or a server that gives them (completions with logprobs=1)"
            )
        return [[self._ranked_answer(response) for response in sampled] for sampled in responses]

    def _ranked_answer(self, response: Response) -> dict[str, float]:
        """Return the item that a response answers, if any, with its score."""
        sid = answered_sid(response, self.reader, self.index, self.job.ranking)
        if sid is None:
            return {}
        if self.job.ranking == "reference":
            return {self.index.items[sid]: response_score(response)}
        return {self.index.items[sid]: answer_score(response, self.reader, sid)}

    def _search(self, piece: Piece, responses: Sequence[Sequence[Response]]) -> list[list[dict[str, float]]]:
        """Return what a beam search finds behind each chain of each user."""
        assert self.ranker is not None
        begun = [
            [*sequence, *tokens_up_to_answer(response.tokens, self.reader, self.tokenizer)[0]]
            for (_, sequence), sampled in zip(piece, responses, strict=True)
            for response in sampled
        ]
        chains = self.job.sampling.chains
        dropped = [prompt.history if self.job.drop_history else () for prompt, _ in piece for _ in range(chains)]
        ranked = dict(self.ranker.rank(begun, dropped))
        return [[ranked[place + chain] for chain in range(chains)] for place in range(0, len(begun), chains)]


def _server(job: _Job, tokenizer: PreTrainedTokenizerBase, constrained_to: ItemIndex | None = None) -> ServerSampler:
    from gream_verl.evaluation.server import Connection, ServerSampler

    assert job.endpoint is not None
    connection = Connection(job.endpoint, job.served_model, job.concurrency, job.timeout)
    return ServerSampler(connection, job.sampling, tokenizer, constrained_to)


def _closing_tokens(tags: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer.encode(tags, add_special_tokens=False)


def _metrics(rows: Sequence[Mapping[str, Any]], chains: int, *, ranked: bool) -> dict[str, float]:
    names = ("rsvr", "match", "format", "acc", "valid_item", "reached_answer", "tokens")
    metrics = {name: float(np.mean([[chain[name] for chain in row["chains"]] for row in rows])) for name in names}
    correct = [sum(chain["acc"] for chain in row["chains"]) for row in rows]
    for k in sorted({*(k for k in CUTOFFS if k <= chains), chains}):
        metrics[f"pass@{k}"] = float(pass_at_k([chains] * len(rows), correct, k).mean())
    if ranked:
        metrics |= ranking_metrics([rank_of(row["target"], row["recommended"]) for row in rows])
    return metrics


def _digests(model_folder: str | os.PathLike[str], index_file: str | os.PathLike[str]) -> dict[str, str]:
    """Return the SHA-256 of every file that decides what the model says."""
    folder = Path(model_folder)
    files = [*sorted(folder.glob("*.safetensors")), *sorted(folder.glob("*.bin"))]
    files += [path for name in ("config.json", "tokenizer.json") if (path := folder / name).is_file()]
    return {path.name: fingerprint(path) for path in (*files, Path(index_file))}


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
