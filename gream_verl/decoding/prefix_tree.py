"""All SIDs as one prefix tree in flat integer tensors, so that a search step is a few gathers and no Python loop."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import chain, pairwise

import numpy as np
import torch
from torch import Tensor

from gream_verl.core.errors import InputError
from gream_verl.core.files import atomic_path, require_file
from gream_verl.core.semantic_ids import ItemIndex

ROOT = 0


@dataclass(frozen=True)
class Level:
    """The nodes at one depth of a tree.

    Attributes:
        first: Number of the first one.
        end: Number of the last one, plus 1.
        items: Whether an item ends in one of them.
        branches: Whether one of them has children.
    """

    first: int
    end: int
    items: bool
    branches: bool


@dataclass(frozen=True)
class PrefixTree:
    """A prefix tree in compressed sparse rows.

    Nodes are numbered level by level and, inside a level, in the order of their parents; node 0 is the root. Edge ``e``
    therefore always ends in node ``e + 1``, no list of children is stored, and the children of a node are a slice: as
    dense as a table of all children (what arXiv 2602.22647 keeps of the first levels), without one.

    Attributes:
        firsts: int64 [depth + 2]; the first node at every depth, and the number of nodes.
        offsets: int64 [nodes + 1]; the edges of node ``n`` are ``offsets[n]`` up to ``offsets[n + 1]``.
        tokens: int64 [edges]; the token id on each edge, ascending within a node.
        rows: int64 [nodes]; the row in the index of the item that ends in this node, -1 for inner nodes.
        parents: int64 [nodes]; the node above, -1 for the root.
        leaves: int64 [items]; the node in which the item of each row ends.
        leaf_counts: int64 [nodes]; how many items lie below (a leaf counts itself).
    """

    firsts: Tensor
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
            token_ids: The id of every SID token (``gream_verl.model.vocabulary.sid_token_ids``).

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
        firsts, count = [0, 1], 1
        for level in range(paths.shape[1]):
            new = first[:, level] & inside[:, level]
            nodes[:, level + 1] = count - 1 + np.cumsum(new)
            parents.append(nodes[new, level])
            tokens.append(paths[new, level])
            count += int(new.sum())
            firsts.append(count)

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
            np.array(firsts),
            offsets,
            np.concatenate(tokens),
            rows,
            all_parents,
            leaves,
            np.bincount(nodes[on_path], minlength=count),
        )
        return cls(*map(torch.from_numpy, arrays))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tree to one ``.npz`` file."""
        arrays = {field.name: getattr(self, field.name).cpu().numpy() for field in fields(self)}
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PrefixTree:
        """Read what ``save`` wrote.

        Raises:
            InputError: When the file is missing, damaged or something else.
        """
        remedy = "build the tree anew from the index"
        try:
            with np.load(require_file(path, remedy), allow_pickle=False) as arrays:
                tree = cls(*(torch.from_numpy(arrays[field.name]) for field in fields(cls)))
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{path}: not a saved prefix tree ({error}); {remedy}") from error
        nodes, items = len(tree.rows), len(tree.leaves)
        lengths = [len(getattr(tree, field.name)) for field in fields(cls)[1:]]
        fits = lengths == [nodes + 1, nodes - 1, nodes, nodes, items, nodes] and tree.firsts[-1] == nodes
        # Edge e ends in node e + 1, so the parents say where the edges of each node begin.
        if not fits or not torch.equal(tree.offsets.diff(), torch.bincount(tree.parents[1:], minlength=nodes)):
            raise InputError(f"{path}: not a saved prefix tree (its parts do not fit together); {remedy}")
        return tree

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self.leaves)

    @property
    def depth(self) -> int:
        """Tokens of the longest SID."""
        return len(self.firsts) - 2

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """The root, its children, and so on: depth + 1 levels."""
        rows = self.rows.cpu()
        return tuple(
            Level(
                first,
                end,
                items=bool((rows[first:end] >= 0).any()),
                branches=bool((rows[first:end] < 0).any()),
            )
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
            ``edges`` int64 [..., width], where width is the most children that one of them has, and ``there`` bool
            of the same shape, False where a node has fewer. Edge ``e`` has the token ``tokens[e]`` and ends in node
            ``e + 1``; where nothing is there it is some edge of the tree.
        """
        starts = self.offsets[nodes]
        counts = self.offsets[nodes + 1] - starts
        column = torch.arange(int(counts.max()) if counts.numel() else 0, device=nodes.device)
        there = column < counts[..., None]
        return (starts[..., None] + column).clamp_max(len(self.tokens) - 1), there

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
