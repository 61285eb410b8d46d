"""Beam search over real items only: the direct mode of GREAM.

Each prompt is computed once, not once per beam, and the beginning that all prompts share is computed once per run. The
beams of a user are further positions of the same sequence: a mask lets every beam see its prompt and its own ancestors,
and the beams of one step share a position number. An unmodified Hugging Face model can do this, and its key-value cache
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
ROWS_AT_ONCE = 256  # rows of logits that are copied to float32 at a time


class Prefix:
    """The beginning that all prompts share, computed once; ``tokens`` are its token ids, perhaps none."""

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
        """Return a new key-value cache for a batch of users that holds the beginning."""
        cache = DynamicCache(config=self._model.config)
        for number, (keys, values) in enumerate(self._layers):
            cache.update(keys.expand(users, -1, -1, -1), values.expand(users, -1, -1, -1), number)
        return cache


_Found = tuple[Tensor, Tensor]  # rows of the index and scores of complete SIDs, best first, both [users, beams]


@dataclass
class _Beams:
    """Unfinished SIDs of a batch of users, all [users, beams]."""

    nodes: Tensor  # int64: the node of the tree that each beam has reached
    scores: Tensor  # float32: its log-probability, best first, -inf when the beam is dead
    tokens: Tensor  # int64: its last token
    parents: Tensor  # int64: the beam of the previous step that it continues


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

    The score of an item is the sum of the log-probabilities of its SID tokens, without a length penalty. A complete
    SID keeps its score and stays a candidate until ``beams`` better ones are complete. With as many beams as items the
    result is the exact ranking. The model's ``generation_config`` is not read.

    Over 60 lines, because the search is one loop over the levels of the tree:

    1. Compute the prompts and the logits after each.
    2. Continue every beam by each child of its node; keep the best complete SIDs and the best unfinished ones.
    3. Let each new beam see its prompt, its ancestors and itself; compute its logits; go to 2.

    Args:
        model: A causal language model in evaluation mode, with full attention in every layer, ``sdpa`` or ``eager``.
        input_ids: int64 [users, length]; the prompts without ``prefix``, padded on the left.
        attention_mask: int64 [users, length]; 1 on the prompt, 0 on padding.
        tree: The SIDs of all items, on the device of the model.
        beams: Unfinished SIDs to keep, and items to return.
        exclude: int64 [users, n]; rows of the index that must not be returned, each once, padded with -1. Paths to
            excluded items only take no beam.
        score: Normalisation of a token's probability: over the whole ``vocabulary``, the default of Hugging Face, or
            over the tokens that lead to ``items``, its ``renormalize_logits``. The latter computes only the rows of
            SID tokens in the output layer.
        prefix: The beginning that all prompts share.

    Returns:
        ``items`` int64 [users, beams], rows of the index from best to worst, -1 where fewer were found, and ``scores``
        float32 [users, beams], -inf there.
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
        raise InputError(f"{model.name_or_path}: the model's output is not a number; train it again with a lower rate")
    root = torch.full((users, 1), ROOT, device=device)
    running = _Beams(nodes=root, scores=torch.zeros(root.shape, device=device), tokens=root, parents=root)
    found = torch.full((users, beams), -1, device=device), torch.full((users, beams), NOTHING, device=device)
    visible = seen.bool()[:, None, :]  # [users, beams, positions]: the positions that each beam sees
    for depth in range(tree.depth):
        running, found = _advance(tree, depth, head, logits, running, found, closed)
        alive = int(running.scores.isfinite().sum(dim=1).max()) if tree.levels[depth + 1].branches else 0
        if not alive:
            break
        running = _Beams(*(part[:, :alive] for part in vars(running).values()))
        ancestors = running.parents[:, :, None].expand(-1, -1, visible.shape[2])
        itself = torch.eye(alive, dtype=torch.bool, device=device).expand(users, -1, -1)
        visible = torch.cat([visible.gather(1, ancestors), itself], dim=2)
        logits = head(
            input_ids=running.tokens,
            attention_mask=_additive(visible, model.dtype)[:, None],
            position_ids=(lengths + depth)[:, None].expand(-1, alive),
            past_key_values=cache,
        )
    return found


class _Head:
    """The model and its output layer; ``columns`` int64 [edges] is the column of the logits for each edge of the tree.

    With the score ``items`` the columns are the SID tokens only.
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
        """Return the log-probability of each edge, float32 [users, beams, width], -inf where ``there`` is False."""
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
    found: _Found,
    closed: tuple[Tensor, Tensor] | None,
) -> tuple[_Beams, _Found]:
    """Continue beams of ``depth`` tokens by one, given the logits [users, running beams, columns] after each."""
    # 1. Scores of all children of all beams, [users, beams, width].
    found_rows, found_scores = found
    beams = found_rows.shape[1]
    edges, there = tree.children(running.nodes)
    scores = running.scores[:, :, None] + head.log_probabilities(logits, edges, there)
    if closed is not None:
        _close(tree, depth, running.nodes, scores, closed)

    # 2. Complete SIDs compete with those found so far, and leave the beams.
    width = edges.shape[2]
    edges, scores = edges.flatten(1), scores.flatten(1)
    if tree.levels[depth + 1].items:
        rows = tree.rows[edges + 1]
        all_scores = torch.cat([found_scores, scores.masked_fill(rows < 0, NOTHING)], dim=1)
        found_scores, position = all_scores.topk(beams, dim=1)
        found_rows = torch.cat([found_rows, rows], dim=1).gather(1, position).masked_fill(found_scores == NOTHING, -1)
        scores = scores.masked_fill(rows >= 0, NOTHING)

    # 3. The best of the others go on. Log-probabilities only fall: a beam below the last found item cannot win.
    scores = scores.masked_fill(scores <= found_scores[:, -1:], NOTHING)
    best, position = scores.topk(min(beams, scores.shape[1]), dim=1)
    chosen = edges.gather(1, position)
    childless = len(tree.rows) - 1  # the node of dead beams: the last node of the tree is an item
    nodes = (chosen + 1).masked_fill(best == NOTHING, childless)
    return _Beams(nodes, best, tree.tokens[chosen], position // width), (found_rows, found_scores)


def _close(tree: PrefixTree, depth: int, nodes: Tensor, scores: Tensor, closed: tuple[Tensor, Tensor]) -> None:
    """Set the scores [users, beams, width] of closed children of ``nodes`` [users, beams] to -inf, in place."""
    level = tree.levels[depth + 1]
    users, children = (part[(closed[1] >= level.first) & (closed[1] < level.end)] for part in closed)
    parents = tree.parents[children]
    pairs, beam = torch.nonzero(nodes[users] == parents[:, None], as_tuple=True)
    scores[users[pairs], beam, (children - 1 - tree.offsets[parents])[pairs]] = NOTHING


def check_output_layer(model: PreTrainedModel, tree: PrefixTree) -> None:
    """Refuse a model that changes the logits of its output layer, such as by a cap; the score ``items`` needs them."""
    token = tree.tokens[:1, None]
    with torch.inference_mode():
        ours, whole = (_Head(model, tree, score)(input_ids=token) for score in ("items", "vocabulary"))
    sid_tokens = tree.tokens.unique()
    tolerance = 1e-4 if model.dtype == torch.float32 else 1e-2
    if not torch.allclose(ours.float(), whole[..., sid_tokens].float(), rtol=tolerance, atol=tolerance):
        raise InputError(f"{model.name_or_path}: changes the logits of its output layer; use the score 'vocabulary'")


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask that is added to attention scores: 0 where visible, the lowest number elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
