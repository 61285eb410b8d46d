"""Expected against sampled RSVR: how much of the learning signal is noise, after the same chains of thought.

``python benchmarks/expected_reward.py`` takes a finished quickstart. Its SFT model answers validation prompts, eight
times each. All ways pay the same chains, with the functions that verl calls. Printed are the variance of the reward
within a group, and the cosine between the policy gradients of two disjoint halves of the prompts: 1 for a signal
without noise, 0 for noise alone.
"""

from __future__ import annotations

import argparse
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
from gream_verl.core.semantic_ids import ItemIndex, SemanticId
from gream_verl.core.token_text import TokenText
from gream_verl.plugin.agent_loop import Payment, answer_start, payment_of
from gream_verl.plugin.bgae import BgaeOptions, compute_bgae
from gream_verl.plugin.reward_manager import RsvrOptions

GROUP, LONGEST, BATCH = 8, 128, 16
WAYS = {
    "sampled": BgaeOptions(),
    "expected, linear": BgaeOptions(expected=True, scoring_rule="linear"),
    "expected, log": BgaeOptions(expected=True, scoring_rule="log"),
}


@dataclass
class Rollout:
    """A response with its sampled reward, and what expected rewards train on: ``true`` has the true answer.

    ``start`` is the position of the answer; without a payment the response is all chain.
    """

    group: int
    prompt: list[int]
    response: list[int]
    reward: float
    true: list[int]
    start: int = 0
    payment: Payment | None = None


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
    """Return the rollouts of all prompts, with both rewards."""
    options, bgae, reader, found = RsvrOptions(), BgaeOptions(expected=True), TokenText(tokenizer), list[Rollout]()
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
        known: list[tuple[Rollout, SemanticId, list[int]]] = []
        for number, sequence in enumerate(made[:, ids.shape[1] :].tolist()):
            end = sequence.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in sequence else LONGEST
            response, row = sequence[:end], part[number // GROUP]
            truth = reader.ground_truth(row["reward_model"], "row")
            reward = options.score(reader.read(response), truth, {}, index).score
            one = Rollout(first + number // GROUP, prompts[number // GROUP], response, reward, response)
            place = answer_start([reader.read([token]) for token in response], truth, options, {}, index)
            found.append(one)
            if place is not None:
                answer = [*tokenizer.convert_tokens_to_ids(list(truth)), *closing]
                one.start, one.true = place[1], [*response[: place[1]], *answer]
                known.append((one, truth, answer))
        before = [one.prompt + one.response[: one.start] for one, *_ in known]
        scores = log_probs(model, before, [tokens for *_, tokens in known], temperature)
        for (one, truth, _), score in zip(known, scores, strict=True):
            rewards = options.prefix_rewards(truth, index)
            one.payment = payment_of(score.double().exp().numpy(), rewards, GROUP, bgae)
    return found


def gradient(model: Any, rollouts: list[Rollout], options: BgaeOptions, temperature: float) -> torch.Tensor:
    """Return the policy gradient of some groups, as one vector."""
    responses = [one.true if options.expected else one.response for one in rollouts]
    longest = max(map(len, responses))
    mask = torch.tensor([[1] * len(response) + [0] * (longest - len(response)) for response in responses])
    scores = torch.zeros(len(rollouts), longest)
    for row, one in zip(scores, rollouts, strict=True):
        if not options.expected:
            row[len(one.response) - 1] = one.reward
        elif one.payment:
            row[one.start : one.start + len(one.payment.shares)] = torch.tensor(one.payment.shares)
    groups = np.array([one.group for one in rollouts])
    advantages, _ = compute_bgae(scores, mask, groups, {"bgae": options.model_dump()})
    model.zero_grad()
    for first in range(0, len(rollouts), 64):
        prompts = [one.prompt for one in rollouts[first : first + 64]]
        found = log_probs(model, prompts, responses[first : first + 64], temperature)
        terms = [(row[: len(one)] * one).sum() for row, one in zip(advantages[first:], found, strict=False)]
        (-torch.stack(terms).sum() / mask.sum()).backward()
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
    rows = pq.read_table(run.data.val).to_pylist()
    rows = [rows[number] for number in np.random.default_rng(0).permutation(len(rows))[: given.prompts]]
    with torch.no_grad():
        rollouts = roll(model, tokenizer, rows, ItemIndex.load(run.data.index), given.temperature)
    halves = [[one for one in rollouts if one.group % 2 == half] for half in (0, 1)]
    table = Table(
        "reward", "variance within a group", "groups of equal rewards", "cosine of the gradients of two halves"
    )
    for name, options in WAYS.items():
        paid = [one.payment.expected if one.payment else 0.0 for one in rollouts]
        grouped = np.array(paid if options.expected else [one.reward for one in rollouts]).reshape(-1, GROUP)
        one, other = (gradient(model, half, options, given.temperature) for half in halves)
        cosine = float(torch.nn.functional.cosine_similarity(one, other, dim=0))
        equal = float((np.ptp(grouped, axis=1) == 0).mean())
        table.add_row(name, f"{grouped.var(axis=1, ddof=1).mean():.5f}", f"{equal:.2f}", f"{cosine:.3f}")
    Console().print(table)


if __name__ == "__main__":
    main()
