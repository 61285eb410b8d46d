"""Beam search over real items only: the direct mode of GREAM.

Each prompt is computed once, not once per beam, and what all prompts begin with is computed once for all of them. The
beams of a user are further positions of the same sequence: a mask lets every beam see its prompt and its own ancestors,
and the beams of one step share a position number. An unmodified Hugging Face model does this, and its key-value cache
is never repeated or reordered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import linear
from transformers import DynamicCache

from gream_verl.core.errors import InputError
from gream_verl.decoding.prefix_tree import ROOT, PrefixTree

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Score = Literal["vocabulary", "items"]
NOTHING = float("-inf")
ROWS_AT_ONCE = 256
"""Rows of logits that are copied to float32 at a time."""


class Prefix:
    """What all prompts begin with, computed once.

    Args:
        model: A causal language model in evaluation mode.
        tokens: Token ids of the beginning; empty for none.
    """

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, tokens: Sequence[int] = ()) -> None:
        self.length = len(tokens)
        self._model = model
        self._layers: list[tuple[Tensor, Tensor]] = []
        if tokens:
            cache = DynamicCache(config=model.config)
            model.base_model(input_ids=torch.tensor([tokens], device=model.device), past_key_values=cache)
            self._layers = [(layer.keys, layer.values) for layer in cache.layers]

    def cache(self, users: int) -> DynamicCache:
        """Return a new key-value cache that begins with this, for a batch of users."""
        cache = DynamicCache(config=self._model.config)
        for number, (keys, values) in enumerate(self._layers):
            cache.update(keys.expand(users, -1, -1, -1), values.expand(users, -1, -1, -1), number)
        return cache


@dataclass
class _Beams:
    """Unfinished SIDs of a batch of users.

    Attributes:
        nodes: int64 [users, beams]; where in the tree each beam stands.
        scores: float32 [users, beams]; its log-probability, best first, -inf when the beam is dead.
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
    *,
    score: Score = "vocabulary",
    prefix: Prefix | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the best items for each prompt.

    The score of an item is the sum of the log-probabilities of its SID tokens. There is no length penalty: a shorter
    SID that is complete keeps its score and stays a candidate beside the ``beams`` unfinished ones until ``beams``
    better ones are complete. With ``beams`` at least the number of items the result is the exact ranking. Nothing of
    the model's ``generation_config`` is read.

    Args:
        model: A causal language model in evaluation mode, with full attention in every layer, ``sdpa`` or ``eager``.
        input_ids: int64 [users, length]; the prompts behind ``prefix``, padded on the left.
        attention_mask: int64 [users, length]; 1 where the prompt is, 0 on padding.
        tree: The SIDs of all items, on the device of the model.
        beams: How many unfinished SIDs to keep, and how many items to return.
        exclude: int64 [users, n]; rows of the index that must not be returned, each once, padded with -1. Paths that
            lead to nothing else take no beam.
        score: What the probability of a token is a share of: the whole ``vocabulary``, as Hugging Face scores beams by
            default, or the tokens that lead to ``items``, as it does with ``renormalize_logits``. For the latter only
            the rows of SID tokens are computed of the model's output layer.
        prefix: What all prompts begin with.

    Returns:
        ``items`` int64 [users, beams], rows of the index from best to worst, -1 where fewer were found, and ``scores``
        float32 [users, beams], -inf there.

    Raises:
        InputError: When the model gives no numbers.
    """
    users, device = len(input_ids), input_ids.device
    prefix = prefix or Prefix(model)
    head = _Head(model, tree, score)
    closed = None if exclude is None or not exclude.numel() else tree.closed_nodes(exclude)
    seen = torch.cat([attention_mask.new_ones(users, prefix.length), attention_mask], dim=1)
    lengths = seen.sum(dim=1)
    cache = prefix.cache(users)
    logits = head(
        input_ids=input_ids,
        attention_mask=seen,
        position_ids=(seen.cumsum(dim=1) - 1).clamp_min(0)[:, prefix.length :],
        past_key_values=cache,
        logits_to_keep=1,
    )
    if not (logits < float("inf")).all():
        raise InputError(
            f"{model.name_or_path}: what the model says is not a number; train it anew, or use another dtype"
        )
    root = torch.full((users, 1), ROOT, device=device)
    running = _Beams(nodes=root, scores=torch.zeros(root.shape, device=device), tokens=root, parents=root)
    found = _Items(
        rows=torch.full((users, beams), -1, device=device),
        scores=torch.full((users, beams), NOTHING, device=device),
    )
    visible = seen.bool()[:, None, :]  # [users, beams, positions]: what each beam may look at
    for depth in range(tree.depth):
        running, found = _advance(tree, depth, head, logits, running, found, closed)
        alive = int(running.scores.isfinite().sum(dim=1).max()) if tree.levels[depth + 1].branches else 0
        if not alive:
            break
        running = _Beams(running.nodes[:, :alive], running.scores[:, :alive],
                         running.tokens[:, :alive], running.parents[:, :alive])  # fmt: skip
        ancestors = running.parents[:, :, None].expand(-1, -1, visible.shape[2])
        itself = torch.eye(alive, dtype=torch.bool, device=device).expand(users, -1, -1)
        visible = torch.cat([visible.gather(1, ancestors), itself], dim=2)
        logits = head(
            input_ids=running.tokens,
            attention_mask=_additive(visible, model.dtype)[:, None],
            position_ids=(lengths + depth)[:, None].expand(-1, alive),
            past_key_values=cache,
        )
    return found.rows, found.scores


class _Head:
    """Calls the model and says how likely the children of nodes are.

    Attributes:
        columns: int64 [edges]; the column of the logits for each edge of the tree.
    """

    def __init__(self, model: PreTrainedModel, tree: PrefixTree, score: Score) -> None:
        self.model = model
        self.score = score
        self.columns = tree.tokens
        if score == "items":
            sid_tokens, self.columns = tree.tokens.unique(return_inverse=True)
            output = model.get_output_embeddings()
            bias = getattr(output, "bias", None)
            self.weight, self.bias = output.weight[sid_tokens], None if bias is None else bias[sid_tokens]

    def __call__(self, *, logits_to_keep: int = 0, **inputs: Any) -> Tensor:
        """Return logits [users, positions, columns] of the last positions, of all when ``logits_to_keep`` is 0."""
        if self.score == "vocabulary":
            return self.model(**inputs, use_cache=True, logits_to_keep=logits_to_keep).logits
        hidden = self.model.base_model(**inputs, use_cache=True).last_hidden_state
        return linear(hidden[:, -logits_to_keep:], self.weight, self.bias)

    def log_probabilities(self, logits: Tensor, edges: Tensor, there: Tensor) -> Tensor:
        """Return the log-probability of each edge, float32 [users, beams, width], -inf where nothing is there.

        Args:
            logits: [users, beams, columns]; what the model says in the node above.
            edges: int64 [users, beams, width].
            there: bool [users, beams, width].
        """
        chosen = logits.gather(2, self.columns[edges]).float().masked_fill(~there, NOTHING)
        if self.score == "items":
            return chosen.log_softmax(dim=2).masked_fill(chosen == NOTHING, NOTHING)
        rows = logits.flatten(0, 1).split(ROWS_AT_ONCE)
        whole = torch.cat([part.float().logsumexp(dim=1) for part in rows])
        return chosen - whole.view(*logits.shape[:2], 1)


def _advance(
    tree: PrefixTree,
    depth: int,
    head: _Head,
    logits: Tensor,
    running: _Beams,
    found: _Items,
    closed: tuple[Tensor, Tensor] | None,
) -> tuple[_Beams, _Items]:
    """Continue every beam by one token, and set complete SIDs apart.

    Args:
        tree: The SIDs of all items.
        depth: How many tokens the running beams have.
        head: The model.
        logits: [users, running beams, columns]; what the model says after the last token of each beam.
        running: The beams so far.
        found: The complete SIDs so far.
        closed: The (user, node) pairs that must not be entered, or None.
    """
    beams = found.rows.shape[1]
    edges, there = tree.children(running.nodes)
    scores = running.scores[:, :, None] + head.log_probabilities(logits, edges, there)
    if closed is not None:
        _close(tree, depth, running.nodes, scores, closed)

    width = edges.shape[2]
    edges, scores = edges.flatten(1), scores.flatten(1)
    if tree.levels[depth + 1].items:
        rows = tree.rows[edges + 1]
        all_scores = torch.cat([found.scores, scores.masked_fill(rows < 0, NOTHING)], dim=1)
        best, position = all_scores.topk(beams, dim=1)
        rows = torch.cat([found.rows, rows], dim=1).gather(1, position).masked_fill(best == NOTHING, -1)
        scores = scores.masked_fill(tree.rows[edges + 1] >= 0, NOTHING)
        found = _Items(rows, best)

    # A log-probability only falls: a beam below the last of enough complete SIDs cannot return.
    scores = scores.masked_fill(scores <= found.scores[:, -1:], NOTHING)
    best, position = scores.topk(min(beams, scores.shape[1]), dim=1)
    chosen = edges.gather(1, position)
    childless = len(tree.rows) - 1  # where dead beams stand: the last node of the tree is an item
    nodes = (chosen + 1).masked_fill(best == NOTHING, childless)
    return _Beams(nodes, best, tree.tokens[chosen], position // width), found


def _close(tree: PrefixTree, depth: int, nodes: Tensor, scores: Tensor, closed: tuple[Tensor, Tensor]) -> None:
    """Set the scores of closed children to -inf, in place.

    Args:
        tree: The SIDs of all items.
        depth: Depth of ``nodes``.
        nodes: int64 [users, beams].
        scores: float32 [users, beams, width]; those of the children.
        closed: User and node of every closed pair, int64 [pairs] each.
    """
    level = tree.levels[depth + 1]
    users, children = (part[(closed[1] >= level.first) & (closed[1] < level.end)] for part in closed)
    parents = tree.parents[children]
    pairs, beam = torch.nonzero(nodes[users] == parents[:, None], as_tuple=True)
    scores[users[pairs], beam, (children - 1 - tree.offsets[parents])[pairs]] = NOTHING


def check_output_layer(model: PreTrainedModel, tree: PrefixTree) -> None:
    """Check that the model's logits are what its output layer makes of its hidden states, as ``items`` takes them.

    Raises:
        InputError: When the model does something more to its logits, such as a cap or a factor.
    """
    token = tree.tokens[:1, None]
    with torch.inference_mode():
        ours, whole = (_Head(model, tree, score)(input_ids=token) for score in ("items", "vocabulary"))
    sid_tokens = tree.tokens.unique()
    tolerance = 1e-4 if model.dtype == torch.float32 else 1e-2
    if not torch.allclose(ours.float(), whole[..., sid_tokens].float(), rtol=tolerance, atol=tolerance):
        raise InputError(
            f"{model.name_or_path}: its logits are not those of its output layer alone, which the score 'items' takes; "
            "use the score 'vocabulary'"
        )


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask that is added to attention scores: 0 where ``visible``, the lowest number elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
