"""Speed of BGAE over all groups at once, against a plain loop over groups, in one run.

The loop does per group what the formulas say, with exact binomials, on the rows that a dictionary collected. The run
fails when an advantage differs.

    python benchmarks/advantage.py
"""

from __future__ import annotations

import argparse
import math
import statistics
import timeit
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gream_verl.plugin.bgae import EPSILON, compute_bgae

SUCCESS, REWARDS = 0.999, (0.0, 0.0, 0.0, 0.5, 0.7071, 1.0)


def group_by_group(rewards: Tensor, mask: Tensor, index: np.ndarray, k: int) -> Tensor:
    """Return the advantages of all rows, shape [rows, tokens], computed one group at a time."""
    scores = rewards.sum(dim=-1)
    members: dict[str, list[int]] = defaultdict(list)
    for row, prompt in enumerate(index):
        members[prompt].append(row)
    advantage = torch.zeros_like(scores)
    for rows in members.values():
        group = scores[rows]
        hits = group >= SUCCESS
        n, c, draw = len(rows), int(hits.sum()), min(k, len(rows))
        plain = (group - group.mean()) / (group.std() + EPSILON)
        bonus = torch.zeros_like(group)
        if 0 < c <= n - draw:
            rho = 1 - math.comb(n - c, draw) / math.comb(n, draw)
            sigma = math.sqrt(rho * (1 - rho))
            miss = 1 - rho - math.comb(n - c - 1, draw - 1) / math.comb(n - 1, draw - 1)
            bonus = torch.where(hits, 1 - rho, miss) / (sigma + EPSILON)
        advantage[rows] = plain + bonus
    return advantage.unsqueeze(-1) * mask


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both sides and print milliseconds and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=2560)
    parser.add_argument("--responses", type=int, default=10, help="responses per prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens per response")
    parser.add_argument("--k", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    draw = np.random.default_rng(options.seed)
    rows = options.prompts * options.responses
    index = draw.permutation(np.repeat([f"prompt-{number}" for number in range(options.prompts)], options.responses))
    index = index.astype(object)  # as verl passes it
    mask = torch.from_numpy(np.arange(options.tokens) < draw.integers(8, options.tokens + 1, (rows, 1))).long()
    rewards = torch.zeros(rows, options.tokens)
    rewards[:, 0] = torch.from_numpy(draw.choice(REWARDS, rows)).float()

    def ours() -> Tensor:
        return compute_bgae(rewards, mask, index, {"bgae": {"k": options.k}})[0]

    def theirs() -> Tensor:
        return group_by_group(rewards, mask, index, options.k)

    difference = (ours() - theirs()).abs().max().item()
    if not difference <= 1e-4:  # a difference that is no number, too
        raise SystemExit(f"the advantages differ by {difference}")
    fast, slow = (statistics.median(timeit.repeat(run, number=1, repeat=options.repeats)) for run in (ours, theirs))
    print(f"{options.prompts} prompts x {options.responses} responses, one core, median of {options.repeats}")
    print(f"all groups at once   {1000 * fast:8.1f} ms")
    print(f"group by group       {1000 * slow:8.1f} ms")
    print(f"ratio {slow / fast:.1f}, greatest difference {difference:.1e}")


if __name__ == "__main__":
    main()
