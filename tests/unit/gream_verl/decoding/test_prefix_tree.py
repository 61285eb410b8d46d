from __future__ import annotations

import numpy as np
import pytest
import torch
from assets import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.decoding.prefix_tree import ROOT, PrefixTree, sid_ids


@st.composite
def indexes(draw: st.DrawFn) -> ItemIndex:
    base = draw(st.integers(1, 4))
    paths = draw(st.lists(st.tuples(*[st.integers(0, 3)] * base), min_size=1, max_size=40, unique=True))
    rows: list[tuple[int, ...]] = []
    for path in paths:
        members = draw(st.integers(1, 3))
        rows += [path] if members == 1 else [(*path, code) for code in range(members)]
    rows = draw(st.permutations(rows))
    return ItemIndex.from_codes([str(item) for item in range(len(rows))], rows)


def ids_of(index: ItemIndex) -> dict[str, int]:
    return {token: 100 + 7 * number for number, token in enumerate(reversed(index.tokens))}


def children_of(tree: PrefixTree, node: int) -> list[tuple[int, int]]:
    """Return token and node of every child."""
    edges, there = tree.children(torch.tensor([node]))
    return [(int(tree.tokens[edge]), int(edge) + 1) for edge in edges[there]]


def walk(tree: PrefixTree, node: int = ROOT, path: tuple[int, ...] = ()) -> dict[tuple[int, ...], int]:
    children = children_of(tree, node)
    if not children:
        return {path: int(tree.rows[node])}
    found: dict[tuple[int, ...], int] = {}
    for token, child in children:
        assert tree.rows[node] == -1
        assert tree.parents[child] == node
        found |= walk(tree, child, (*path, token))
    return found


@given(indexes())
@settings(max_examples=25, deadline=None)
def test_the_tree_holds_exactly_the_sids_of_the_index(index: ItemIndex) -> None:
    ids = ids_of(index)
    tree = PrefixTree.from_index(index, ids)
    expected = {tuple(ids[token] for token in sid): row for row, sid in enumerate(index.sids.values())}
    assert walk(tree) == expected
    assert len(tree.leaves) == len(index)
    assert tree.depth == max(map(len, index.sids.values()))
    assert tree.leaf_counts[ROOT] == len(index)
    assert torch.equal(tree.rows[tree.leaves], torch.arange(len(index)))


@given(indexes(), st.data())
@settings(max_examples=25, deadline=None)
def test_children_of_many_nodes_equal_those_of_each(index: ItemIndex, data: st.DataObject) -> None:
    tree = PrefixTree.from_index(index, ids_of(index))
    nodes = data.draw(st.lists(st.integers(0, len(tree.rows) - 1), max_size=8))
    edges, there = tree.children(torch.tensor(nodes, dtype=torch.long))
    parents = tree.parents.tolist()
    assert edges.shape == there.shape == (len(nodes), max(map(parents.count, nodes), default=0))
    for node, row, exists in zip(nodes, edges, there, strict=True):
        assert (row[exists] + 1).tolist() == [child for child, parent in enumerate(parents) if parent == node]


@given(indexes())
@settings(max_examples=25, deadline=None)
def test_levels_say_what_is_at_each_depth(index: ItemIndex) -> None:
    tree = PrefixTree.from_index(index, ids_of(index))
    assert len(tree.levels) == tree.depth + 1
    sids = list(index.sids.values())
    for depth, level in enumerate(tree.levels):
        prefixes = {sid[:depth] for sid in sids if len(sid) >= depth}
        assert level.end - level.first == len(prefixes)
        assert level.items == any(len(sid) == depth for sid in sids)
        assert level.branches == any(len(sid) > depth for sid in sids)


@given(indexes(), st.data())
@settings(max_examples=25, deadline=None)
def test_closed_nodes_are_those_with_excluded_items_only(index: ItemIndex, data: st.DataObject) -> None:
    tree = PrefixTree.from_index(index, ids_of(index))
    excluded = data.draw(st.lists(st.sets(st.integers(0, len(index) - 1)), min_size=1, max_size=3))
    padded = torch.full((len(excluded), len(index)), -1)
    for user, rows in enumerate(excluded):
        padded[user, : len(rows)] = torch.tensor(sorted(rows))

    def below(node: int) -> set[int]:
        children = [child for _, child in children_of(tree, node)]
        return set().union(*map(below, children)) if children else {int(tree.rows[node])}

    slow = {(user, node) for user, rows in enumerate(excluded) for node in range(len(tree.rows)) if below(node) <= rows}
    users, nodes = tree.closed_nodes(padded)
    assert set(zip(users.tolist(), nodes.tolist(), strict=True)) == slow


@pytest.mark.parametrize("paths", [[[1, 2], [1, 2]], [[1, -1], [1, 2]], [[1, 3, -1], [2, 1, 1], [1, 3, 5]]])
def test_equal_paths_and_prefixes_are_refused(paths: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="path of its own"):
        PrefixTree.from_paths(np.array(paths))


def test_the_ids_of_sid_tokens_are_those_of_the_tokenizer() -> None:
    index = ItemIndex.from_codes(["x", "y"], [[0, 0], [0, 1]])
    tokenizer = make_tokenizer(["a text"], index)
    assert sid_ids(index, tokenizer) == {token: tokenizer.get_vocab()[token] for token in index.tokens}
    unknown = ItemIndex.from_codes(["x", "y"], [[0, 0], [0, 2]])
    with pytest.raises(InputError, match=r"here: <\|b_3\|> is not one token.*gream model extend"):
        sid_ids(unknown, tokenizer, "here")


def test_a_large_tree_holds_every_path() -> None:
    codes = np.random.default_rng(0).permutation(64**3)[:20_000]
    paths = np.stack([codes // 64**shift % 64 + 300 * (2 - shift) for shift in (2, 1, 0)], axis=1)
    tree = PrefixTree.from_paths(paths)
    nodes = tree.leaves.numpy()
    for level in reversed(range(3)):
        assert (tree.tokens.numpy()[nodes - 1] == paths[:, level]).all()
        nodes = tree.parents.numpy()[nodes]
    assert (nodes == ROOT).all()
