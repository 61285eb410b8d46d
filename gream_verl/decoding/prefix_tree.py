"""All SIDs as one prefix tree in flat integer tensors: a search step is a few gathers and no Python loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.core.token_text import TokenText

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROOT = 0


def sid_ids(index: ItemIndex, tokenizer: PreTrainedTokenizerBase, model: str = "the model") -> dict[str, int]:
    """Return the token id of every SID token of an index; ``model`` names the tokenizer in errors."""
    TokenText(tokenizer).check(index.tokens, model)
    return dict(zip(index.tokens, tokenizer.convert_tokens_to_ids(index.tokens), strict=True))


@dataclass(frozen=True)
class Level:
    """The nodes ``first`` up to ``end`` (exclusive) at one depth; some end an item, some have children (branches)."""

    first: int
    end: int
    items: bool
    branches: bool


@dataclass(frozen=True)
class PrefixTree:
    """A prefix tree in compressed sparse rows.

    Nodes are numbered level by level and, inside a level, in the order of their parents; node 0 is the root. Edge ``e``
    therefore always ends in node ``e + 1``, and the children of a node are a slice (arXiv 2602.22647 stores a dense
    table for the first levels instead). All tensors are int64.
    """

    firsts: Tensor  # [depth + 2]; the first node at every depth, and the number of nodes
    offsets: Tensor  # [nodes + 1]; the edges of node n are offsets[n] up to offsets[n + 1]
    tokens: Tensor  # [edges]; the token id on each edge, ascending within a node
    rows: Tensor  # [nodes]; the row in the index of the item that ends in this node, -1 for inner nodes
    parents: Tensor  # [nodes]; the node above, -1 for the root
    leaves: Tensor  # [items]; the node in which the item of each row ends
    leaf_counts: Tensor  # [nodes]; the number of items below (a leaf counts itself)

    @classmethod
    def from_index(cls, index: ItemIndex, token_ids: Mapping[str, int]) -> PrefixTree:
        """Build the tree of every item of ``index``; ``token_ids`` has the id of every SID token (``sid_ids``)."""
        sids = index.sids.values()
        lengths = np.fromiter(map(len, sids), dtype=np.int64, count=len(sids))
        paths = np.full((len(lengths), lengths.max()), -1, dtype=np.int64)
        paths[np.arange(paths.shape[1]) < lengths[:, None]] = [token_ids[token] for token in chain.from_iterable(sids)]
        return cls.from_paths(paths)

    @classmethod
    def from_paths(cls, paths: np.ndarray) -> PrefixTree:
        """Build the tree of integer paths, none a prefix of another.

        Args:
            paths: int64 [items, depth]; the token ids of each item from the root, -1 after its end.
        """
        # 1. Sort the paths, and find the first level at which each leaves the one before it.
        order = np.lexsort(paths.T[::-1])
        paths = paths[order]
        inside = paths >= 0
        first = np.ones_like(inside)  # True from the level on at which the path differs from the one before it
        first[1:] = np.logical_or.accumulate(paths[1:] != paths[:-1], axis=1)
        depth = inside.sum(axis=1)
        leaving = first.argmax(axis=1)
        if not first[:, -1].all() or (leaving[1:] >= depth[:-1]).any():
            raise ValueError("two paths are equal, or one is a prefix of another; give every item a path of its own")

        # 2. Number the nodes level by level: a path that left the one before it opens a new node at every level.
        nodes = np.zeros((len(paths), paths.shape[1] + 1), dtype=np.int64)  # the node of each path at each depth
        parents, tokens = [np.array([-1])], []
        firsts, count = [0, 1], 1
        for level in range(paths.shape[1]):
            new = first[:, level] & inside[:, level]
            nodes[:, level + 1] = count - 1 + np.cumsum(new)
            parents.append(nodes[new, level])
            tokens.append(paths[new, level])
            count += int(new.sum())
            firsts.append(count)

        # 3. Offsets from the number of children, leaves from the ends of the paths.
        all_parents = np.concatenate(parents)
        offsets = np.zeros(count + 1, dtype=np.int64)
        np.cumsum(np.bincount(all_parents[1:], minlength=count), out=offsets[1:])
        ends = nodes[np.arange(len(paths)), depth]
        rows = np.full(count, -1, dtype=np.int64)
        rows[ends] = order
        leaves = np.empty(len(paths), dtype=np.int64)
        leaves[order] = ends
        leaf_counts = np.bincount(nodes[np.arange(paths.shape[1] + 1) <= depth[:, None]], minlength=count)
        arrays = (np.array(firsts), offsets, np.concatenate(tokens), rows, all_parents, leaves, leaf_counts)
        return cls(*map(torch.from_numpy, arrays))

    @property
    def depth(self) -> int:
        """Tokens of the longest SID."""
        return len(self.firsts) - 2

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """The root, its children, and so on: depth + 1 levels."""
        is_item = self.rows.cpu() >= 0
        return tuple(
            Level(first, end, items=bool(is_item[first:end].any()), branches=not bool(is_item[first:end].all()))
            for first, end in pairwise(self.firsts.tolist())
        )

    def to(self, device: torch.device | str) -> PrefixTree:
        """Return the tree on ``device``."""
        moved = PrefixTree(*(getattr(self, field.name).to(device) for field in fields(self)))
        moved.__dict__["levels"] = self.levels
        return moved

    def children(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the children of many nodes at once.

        Args:
            nodes: int64 [...], repeats allowed.

        Returns:
            ``edges`` int64 [..., width], where width is the largest number of children among the nodes, and ``there``
            bool of the same shape, False where a node has fewer. Edge ``e`` has the token ``tokens[e]`` and ends in
            node ``e + 1``; where ``there`` is False it is an arbitrary edge of the tree.
        """
        starts = self.offsets[nodes]
        counts = self.offsets[nodes + 1] - starts
        column = torch.arange(int(counts.max()) if counts.numel() else 0, device=nodes.device)
        there = column < counts[..., None]
        return (starts[..., None] + column).clamp_max(len(self.tokens) - 1), there

    def closed_nodes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the nodes that lead to excluded items only.

        Args:
            rows: int64 [users, n]; rows of the items to exclude, each once, padded with -1.

        Returns:
            Two int64 [closed] tensors: the user (0 to users - 1) and the node, inner nodes and leaves alike.
        """
        users, _ = torch.nonzero(rows >= 0, as_tuple=True)
        nodes = self.leaves[rows[rows >= 0]]
        pairs = []  # (user, node) as one number, once for each excluded item below the node
        while len(nodes):
            pairs.append(users * len(self.rows) + nodes)
            nodes = self.parents[nodes]
            users, nodes = users[nodes >= 0], nodes[nodes >= 0]
        if not pairs:
            return users, nodes
        found, excluded = torch.cat(pairs).unique(return_counts=True)
        users, nodes = found // len(self.rows), found % len(self.rows)
        closed = excluded == self.leaf_counts[nodes]
        return users[closed], nodes[closed]
