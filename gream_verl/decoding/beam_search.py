"""Beam search over real items only: the direct mode of GREAM.

Each prompt is computed once, not once per beam. The beams of a user are further positions of the same sequence: a mask
lets every beam see its prompt and its own ancestors, and the beams of one step share a position number. An unmodified
Hugging Face model does this, and its key-value cache is never repeated or reordered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from gream_verl.decoding.prefix_tree import ROOT, PrefixTree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NOTHING = float("-inf")


@dataclass
class _Beams:
    """Unfinished SIDs of a batch of users.

    Attributes:
        nodes: int64 [users, beams]; where in the tree each beam stands.
        scores: float32 [users, beams]; its log-probability, -inf when the beam is dead.
        tokens: int64 [users, beams]; its last token.
        parents: int64 [users, beams]; the beam of the step before that it continues.
    """

    nodes: Tensor
    scores: Tensor
    tokens: Tensor
    parents: Tensor


@dataclass
class _Items:
    """Complete SIDs of a batch of users, best first: rows of the index and scores, both [users, beams]."""

    rows: Tensor
    scores: Tensor


@torch.inference_mode()
def beam_search(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor,
    tree: PrefixTree,
    beams: int,
    exclude: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the best items for each prompt.

    The score of an item is the sum of the log-probabilities of its SID tokens, each over the whole vocabulary, as
    Hugging Face scores beams by default. There is no length penalty: a shorter SID that is complete keeps its score
    and stays a candidate beside the ``beams`` unfinished ones until ``beams`` better ones are complete.
    With ``beams`` at least the number of items the result is the exact ranking. Nothing of the model's
    ``generation_config`` is read.

    Args:
        model: A causal language model in evaluation mode, with ``sdpa`` or ``eager`` attention.
        input_ids: int64 [users, length]; the prompts, padded on the left.
        attention_mask: int64 [users, length]; 1 where the prompt is, 0 on padding.
        tree: The SIDs of all items, on the device of the model.
        beams: How many unfinished SIDs to keep, and how many items to return.
        exclude: int64 [users, n]; rows of the index that must not be returned, each once, padded with -1. Paths that
            lead to nothing else take no beam.

    Returns:
        ``items`` int64 [users, beams], rows of the index from best to worst, -1 where fewer were found, and ``scores``
        float32 [users, beams], -inf there.
    """
    users, device = len(input_ids), input_ids.device
    lengths = attention_mask.sum(dim=1)
    closed = None if exclude is None or not exclude.numel() else _keys(tree, *tree.closed_nodes(exclude))
    cache = DynamicCache(config=model.config)
    logits = model(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(dim=1) - 1).clamp_min(0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits

    root = torch.full((users, 1), ROOT, device=device)
    running = _Beams(nodes=root, scores=torch.zeros(root.shape, device=device), tokens=root, parents=root)
    found = _Items(
        rows=torch.full((users, beams), -1, device=device),
        scores=torch.full((users, beams), NOTHING, device=device),
    )
    visible = attention_mask.bool()[:, None, :]  # [users, beams, positions]: what each beam may look at
    itself = torch.eye(beams, dtype=torch.bool, device=device).expand(users, -1, -1)
    for step in range(tree.depth):
        running, found = _advance(tree, logits, running, found, closed)
        if not running.scores.isfinite().any():
            break
        ancestors = running.parents[:, :, None].expand(-1, -1, visible.shape[2])
        visible = torch.cat([visible.gather(1, ancestors), itself], dim=2)
        logits = model(
            input_ids=running.tokens,
            attention_mask=_additive(visible, model.dtype)[:, None],
            position_ids=(lengths + step)[:, None].expand(-1, beams),
            past_key_values=cache,
            use_cache=True,
        ).logits
    return found.rows, found.scores


def _advance(
    tree: PrefixTree, logits: Tensor, running: _Beams, found: _Items, closed: Tensor | None
) -> tuple[_Beams, _Items]:
    """Continue every beam by one token, and set complete SIDs apart.

    Args:
        tree: The SIDs of all items.
        logits: [users, beams, vocabulary]; what the model says after the last token of each beam.
        running: The beams so far.
        found: The complete SIDs so far.
        closed: Keys of the (user, node) pairs that must not be entered, or None.
    """
    users, beams = found.rows.shape
    logits = logits.float().flatten(0, 1)
    parent, token, node = tree.children(running.nodes.flatten())
    user, ancestor = parent // running.nodes.shape[1], parent % running.nodes.shape[1]
    score = running.scores.flatten()[parent] + logits[parent, token] - logits.logsumexp(dim=-1)[parent]
    if closed is not None:
        score = score.masked_fill(torch.isin(_keys(tree, user, node), closed), NOTHING)

    counts = torch.bincount(user, minlength=users)
    column = torch.arange(len(user), device=user.device) - (counts.cumsum(0) - counts)[user]
    grid = (users, max(int(counts.max()), beams))
    candidate = torch.zeros(grid, dtype=torch.long, device=user.device)
    candidate[user, column] = torch.arange(len(user), device=user.device)
    scores = torch.full(grid, NOTHING, device=user.device)
    scores[user, column] = score
    complete = tree.rows[node][candidate] >= 0

    all_scores = torch.cat([found.scores, scores.masked_fill(~complete, NOTHING)], dim=1)
    all_rows = torch.cat([found.rows, tree.rows[node][candidate]], dim=1)
    best, position = all_scores.topk(beams, dim=1)
    found = _Items(all_rows.gather(1, position).masked_fill(best == NOTHING, -1), best)

    # A log-probability only falls: a beam below the last of enough complete SIDs cannot return.
    best, position = scores.masked_fill(complete | (scores <= best[:, -1:]), NOTHING).topk(beams, dim=1)
    chosen = candidate.gather(1, position)
    childless = len(tree.rows) - 1
    nodes = node[chosen].masked_fill(best == NOTHING, childless)
    return _Beams(nodes, best, token[chosen], ancestor[chosen]), found


def _keys(tree: PrefixTree, users: Tensor, nodes: Tensor) -> Tensor:
    """Return one number for each pair of a user and a node."""
    return users * len(tree.rows) + nodes


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask that is added to attention scores: 0 where ``visible``, the lowest number elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
