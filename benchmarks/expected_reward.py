"""Rewards of the same chains of thought: how much of the learning signal is noise, and what it costs.

``python benchmarks/expected_reward.py`` takes a finished quickstart. Its SFT model answers validation prompts, eight
times each. All ways pay the same chains, with the functions that verl calls: sampled RSVR, expected RSVR by both rules,
and NDCG@10 of the constrained beam search behind the chain, which pays chains only. Printed are the variance of the
reward within a group, the cosine between the policy gradients of two disjoint halves of the prompts (1 for a signal
without noise, 0 for noise alone), of all tokens and of the chains alone, and the seconds for the rewards.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from gream_verl.core.run_folder import RunFolder
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.core.token_text import TokenText
from gream_verl.evaluation.metrics import rank_of, user_metric
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.ranking import ItemRanker
from gream_verl.plugin.agent_loop import Payment, answer_start, payment_of
from gream_verl.plugin.bgae import BgaeOptions, compute_bgae
from gream_verl.plugin.reward_manager import RsvrOptions

GROUP, LONGEST, BATCH = 8, 128, 16
LINEAR, LOG = (BgaeOptions(expected=True, scoring_rule=rule) for rule in ("linear", "log"))
WAYS = {"sampled RSVR": None, "expected RSVR, linear": LINEAR, "expected RSVR, log": LOG, "NDCG@10 of the beam": None}


@dataclass
class Rollout:
    """A response with its sampled reward, and what expected rewards train on: ``true`` has the true answer.

    ``start`` is the position of the answer, whose true tokens have the ``probabilities``; without them the response is
    all chain.
    """

    group: int
    prompt: list[int]
    response: list[int]
    sampled: float
    true: list[int]
    start: int
    prefix_rewards: np.ndarray
    probabilities: np.ndarray | None = None
    ndcg: float = 0.0

    def payment(self, options: BgaeOptions) -> Payment:
        """Return what the agent loop would pay."""
        if self.probabilities is None:
            return Payment([], 0.0, 0.0)
        return payment_of(self.probabilities, self.prefix_rewards, GROUP, options)


def padded(sequences: list[list[int]], fill: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return left-padded ids and their mask, both [rows, longest]."""
    longest = max(map(len, sequences))
    ids = torch.tensor([[fill] * (longest - len(one)) + one for one in sequences])
    mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in sequences])
    return ids, mask


def log_probs(model: Any, prefixes: list[list[int]], ends: list[list[int]], temperature: float) -> list[torch.Tensor]:
    """Return the log-probability of every token of each end after its prefix."""
    ids, mask = padded([prefix + end for prefix, end in zip(prefixes, ends, strict=True)], 0)
    kept = max(map(len, ends)) + 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=kept).logits[:, :-1]
    found = (logits / temperature).log_softmax(-1).gather(2, ids[:, 1 - kept :, None])[..., 0]
    return [row[len(row) - len(end) :] for row, end in zip(found, ends, strict=True)]


def roll(model: Any, tokenizer: Any, rows: list[dict[str, Any]], index: ItemIndex, temperature: float) -> list[Rollout]:
    """Return the rollouts of all prompts, with their sampled rewards."""
    options, reader, found = RsvrOptions(), TokenText(tokenizer), list[Rollout]()
    closing = [*tokenizer.encode("</answer>", add_special_tokens=False), tokenizer.eos_token_id]
    for first in range(0, len(rows), BATCH):
        part = rows[first : first + BATCH]
        prompts = [
            tokenizer.apply_chat_template(r["prompt"], add_generation_prompt=True, return_dict=False) for r in part
        ]
        ids, mask = padded(prompts, tokenizer.pad_token_id)
        made = model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=temperature, top_k=0, top_p=1.0,
            num_return_sequences=GROUP, max_new_tokens=LONGEST, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        for number, sequence in enumerate(made[:, ids.shape[1] :].tolist()):
            end = sequence.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in sequence else LONGEST
            response, row = sequence[:end], part[number // GROUP]
            truth = reader.ground_truth(row["reward_model"], "row")
            reward = options.score(reader.read(response), truth, {}, index).score
            place = answer_start([reader.read([token]) for token in response], truth, options, {}, index)
            start, true = len(response), response
            if place is not None:
                start = place[1]
                true = [*response[:start], *tokenizer.convert_tokens_to_ids(list(truth)), *closing]
            paid = options.prefix_rewards(truth, index)
            found.append(
                Rollout(first + number // GROUP, prompts[number // GROUP], response, reward, true, start, paid)
            )
    return found


def expect(model: Any, rollouts: list[Rollout], temperature: float) -> None:
    """Score the true answers."""
    known = [one for one in rollouts if one.start < len(one.response)]
    for first in range(0, len(known), 64):
        part = known[first : first + 64]
        prefixes, ends = [one.prompt + one.true[: one.start] for one in part], [one.true[one.start :] for one in part]
        for one, scores in zip(part, log_probs(model, prefixes, ends, temperature), strict=True):
            one.probabilities = scores.double().exp().numpy()


def rank(ranker: ItemRanker, rollouts: list[Rollout], rows: list[dict[str, Any]]) -> None:
    """Search behind the chains, without the items of the history."""
    known = [one for one in rollouts if one.start < len(one.response)]
    details = [rows[one.group]["extra_info"] for one in known]
    asked = [(one.prompt + one.true[: one.start], it["history"]) for one, it in zip(known, details, strict=True)]
    ranks = [rank_of(it["item"], list(found)) for it, found in zip(details, ranker.rank(asked), strict=True)]
    for one, ndcg in zip(known, user_metric("ndcg@10", ranks), strict=True):
        one.ndcg = float(ndcg)


def gradients(model: Any, rollouts: list[Rollout], way: str, temperature: float) -> list[torch.Tensor]:
    """Return the policy gradient of some groups as a vector: of all tokens, and of the chains alone."""
    options = WAYS[way]
    ranked = way.startswith("NDCG")
    responses = [one.true if options else one.response[: one.start if ranked else None] for one in rollouts]
    longest = max(map(len, responses))
    mask = torch.tensor([[1] * len(response) + [0] * (longest - len(response)) for response in responses])
    rewards = torch.zeros(len(rollouts), longest)
    for row, one, response in zip(rewards, rollouts, responses, strict=True):
        if options:
            payment = one.payment(options)
            row[one.start : one.start + len(payment.shares)] = torch.tensor(payment.shares)
        else:
            row[len(response) - 1] = one.ndcg if ranked else one.sampled
    groups = np.array([one.group for one in rollouts])
    algorithm = {"bgae": (options or BgaeOptions()).model_dump()}
    advantages, _ = compute_bgae(rewards, mask, groups, algorithm)
    chains = torch.tensor([[place < one.start for place in range(longest)] for one in rollouts])
    return [gradient(model, rollouts, responses, part, temperature) for part in (advantages, advantages * chains)]


def gradient(
    model: Any, rollouts: list[Rollout], responses: list[list[int]], advantages: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return the gradient of the mean over tokens of advantage times log-probability, as one vector."""
    model.zero_grad()
    for first in range(0, len(rollouts), 64):
        prompts = [one.prompt for one in rollouts[first : first + 64]]
        found = log_probs(model, prompts, responses[first : first + 64], temperature)
        terms = [(row[: len(one)] * one).sum() for row, one in zip(advantages[first:], found, strict=False)]
        (-torch.stack(terms).sum() / sum(map(len, responses))).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/quickstart"), help="a finished quickstart")
    parser.add_argument("--prompts", type=int, default=192)
    parser.add_argument("--temperature", type=float, default=1.0)
    given = parser.parse_args()
    torch.manual_seed(0)
    run = RunFolder.open(given.run)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run.sft).eval(), AutoTokenizer.from_pretrained(run.sft)
    index = ItemIndex.load(run.data.index)
    rows = pq.read_table(run.data.val).to_pylist()
    rows = [rows[number] for number in np.random.default_rng(0).permutation(len(rows))[: given.prompts]]
    ranker = ItemRanker(model, tokenizer, index, EvaluationOptions())
    with torch.no_grad():
        times = [time.perf_counter()]
        rollouts = roll(model, tokenizer, rows, index, given.temperature)
        times.append(time.perf_counter())
        expect(model, rollouts, given.temperature)
        times.append(time.perf_counter())
        rank(ranker, rollouts, rows)
        times.append(time.perf_counter())
    generated, scored, searched = np.diff(times)
    halves = [[one for one in rollouts if one.group % 2 == half] for half in (0, 1)]
    table = Table(
        "reward", "variance within a group", "groups of equal rewards", "cosine", "of chains alone", "seconds"
    )
    for way, options in WAYS.items():
        ranked = way.startswith("NDCG")
        worth = [
            sum(one.payment(options).shares) if options
            else one.ndcg if ranked else one.sampled for one in rollouts
        ]  # fmt: skip
        grouped = np.array(worth).reshape(-1, GROUP)
        one, other = (gradients(model, half, way, given.temperature) for half in halves)
        cosines = [float(torch.nn.functional.cosine_similarity(*pair, dim=0)) for pair in zip(one, other, strict=True)]
        seconds = scored if options else searched if ranked else 0.0
        equal = float((np.ptp(grouped, axis=1) == 0).mean())
        table.add_row(
            way, f"{grouped.var(axis=1, ddof=1).mean():.5f}", f"{equal:.2f}", *(f"{c:.3f}" for c in cosines),
            f"{seconds:.1f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"{len(rollouts)} chains, generated in {generated:.0f} s")


if __name__ == "__main__":
    main()
