"""All SIDs as one prefix tree in flat integer tensors, so that a search step is a few gathers and no Python loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from gream_verl.files import InputError
from gream_verl.semantic_ids import ItemIndex

ROOT = 0


@dataclass(frozen=True)
class PrefixTree:
    """A prefix tree in compressed sparse rows.

    Nodes are numbered level by level and, inside a level, in the order of their parents; node 0 is the root. Edge ``e``
    therefore always ends in node ``e + 1``, and no list of children is stored.

    Attributes:
        depth: Tokens of the longest SID.
        offsets: int64 [nodes + 1]; the edges of node ``n`` are ``offsets[n]`` up to ``offsets[n + 1]``.
        tokens: int64 [edges]; the token id on each edge, ascending within a node.
        rows: int64 [nodes]; the row in the index of the item that ends in this node, -1 for inner nodes.
        parents: int64 [nodes]; the node above, -1 for the root.
        leaves: int64 [items]; the node in which the item of each row ends.
        leaf_counts: int64 [nodes]; how many items lie below (a leaf counts itself).
    """

    depth: int
    offsets: Tensor
    tokens: Tensor
    rows: Tensor
    parents: Tensor
    leaves: Tensor
    leaf_counts: Tensor

    @classmethod
    def from_index(cls, index: ItemIndex, token_ids: Mapping[str, int]) -> PrefixTree:
        """Build the tree of every item of ``index``.

        Args:
            index: The items and their SIDs, of one length or of two.
            token_ids: The id of every SID token (``gream_verl.vocabulary.sid_token_ids``).

        Raises:
            InputError: When a SID token has no id.
        """
        for token in index.tokens:
            if token not in token_ids:
                raise InputError(
                    f"{index.source}: {token} is not a token of the tokenizer; add the tokens of this index with "
                    "`gream model extend`"
                )
        sids = index.sids.values()
        lengths = np.fromiter(map(len, sids), dtype=np.int64, count=len(sids))
        flat = np.fromiter(
            (token_ids[token] for token in chain.from_iterable(sids)), dtype=np.int64, count=lengths.sum()
        )
        paths = np.full((len(lengths), lengths.max()), -1, dtype=np.int64)
        paths[np.arange(paths.shape[1]) < lengths[:, None]] = flat
        return cls.from_paths(paths)

    @classmethod
    def from_paths(cls, paths: np.ndarray) -> PrefixTree:
        """Build the tree of integer paths.

        Args:
            paths: int64 [items, depth]; the token ids of each item from the root, -1 after its end.

        Raises:
            ValueError: When two paths are equal or one is a prefix of another.
        """
        order = np.lexsort(paths.T[::-1])
        paths = paths[order]
        inside = paths >= 0
        first = np.ones_like(inside)  # does the path leave the one before it at or above this level?
        first[1:] = np.logical_or.accumulate(paths[1:] != paths[:-1], axis=1)
        depth = inside.sum(axis=1)
        leaving = first.argmax(axis=1)
        if not first[:, -1].all() or (leaving[1:] >= depth[:-1]).any():
            raise ValueError("two paths are equal, or one is a prefix of another; give every item a path of its own")

        nodes = np.zeros((len(paths), paths.shape[1] + 1), dtype=np.int64)  # the node of each path at each depth
        parents, tokens = [np.array([-1])], []
        count = 1
        for level in range(paths.shape[1]):
            new = first[:, level] & inside[:, level]
            nodes[:, level + 1] = count - 1 + np.cumsum(new)
            parents.append(nodes[new, level])
            tokens.append(paths[new, level])
            count += int(new.sum())

        all_parents = np.concatenate(parents)
        offsets = np.zeros(count + 1, dtype=np.int64)
        np.cumsum(np.bincount(all_parents[1:], minlength=count), out=offsets[1:])
        ends = nodes[np.arange(len(paths)), depth]
        rows = np.full(count, -1, dtype=np.int64)
        rows[ends] = order
        leaves = np.empty(len(paths), dtype=np.int64)
        leaves[order] = ends
        on_path = np.arange(paths.shape[1] + 1) <= depth[:, None]
        arrays = (
            offsets,
            np.concatenate(tokens),
            rows,
            all_parents,
            leaves,
            np.bincount(nodes[on_path], minlength=count),
        )
        return cls(paths.shape[1], *map(torch.from_numpy, arrays))

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.leaves)

    def to(self, device: torch.device | str) -> PrefixTree:
        """Return the tree on ``device``."""
        tensors = (self.offsets, self.tokens, self.rows, self.parents, self.leaves, self.leaf_counts)
        return PrefixTree(self.depth, *(tensor.to(device) for tensor in tensors))

    def children(self, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the children of many nodes at once, packed one after another.

        Args:
            nodes: int64 [n], repeats allowed.

        Returns:
            Three int64 [c] tensors: the position in ``nodes`` of the parent, the token, the child node.
        """
        starts = self.offsets[nodes]
        counts = self.offsets[nodes + 1] - starts
        position = torch.repeat_interleave(counts)
        before = counts.cumsum(0) - counts
        edges = starts[position] + torch.arange(len(position), device=nodes.device) - before[position]
        return position, self.tokens[edges], edges + 1

    def closed_nodes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return which nodes lead to nothing but excluded items.

        Args:
            rows: int64 [b, h]; for each of b users the rows of the items to exclude, each once, padded with -1.

        Returns:
            Two int64 [c] tensors: the user (0 to b - 1) and the node, inner nodes and leaves alike.
        """
        users, _ = torch.nonzero(rows >= 0, as_tuple=True)
        nodes = self.leaves[rows[rows >= 0]]
        pairs = []
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
