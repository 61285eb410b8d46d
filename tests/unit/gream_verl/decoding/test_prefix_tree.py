from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.decoding.prefix_tree import ROOT, PrefixTree


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
@settings(deadline=None)
def test_the_tree_holds_exactly_the_sids_of_the_index(index: ItemIndex) -> None:
    ids = ids_of(index)
    tree = PrefixTree.from_index(index, ids)
    expected = {tuple(ids[token] for token in sid): row for row, sid in enumerate(index.sids.values())}
    assert walk(tree) == expected
    assert len(tree) == len(index)
    assert tree.depth == max(map(len, index.sids.values()))
    assert tree.leaf_counts[ROOT] == len(index)
    assert torch.equal(tree.rows[tree.leaves], torch.arange(len(index)))


@given(indexes(), st.data())
@settings(deadline=None)
def test_children_of_many_nodes_equal_those_of_each(index: ItemIndex, data: st.DataObject) -> None:
    tree = PrefixTree.from_index(index, ids_of(index))
    nodes = data.draw(st.lists(st.integers(0, len(tree.rows) - 1), max_size=8))
    edges, there = tree.children(torch.tensor(nodes, dtype=torch.long))
    parents = tree.parents.tolist()
    assert edges.shape == there.shape == (len(nodes), max(map(parents.count, nodes), default=0))
    for node, row, exists in zip(nodes, edges, there, strict=True):
        assert (row[exists] + 1).tolist() == [child for child, parent in enumerate(parents) if parent == node]


@given(indexes())
@settings(deadline=None)
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
@settings(deadline=None)
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


def test_a_sid_token_that_the_tokenizer_lacks_is_named_with_the_remedy() -> None:
    index = ItemIndex.from_codes(["x", "y"], [[0, 0], [0, 1]])
    with pytest.raises(InputError, match=r"<\|b_2\|> is not a token.*gream model extend"):
        PrefixTree.from_index(index, {"<|a_1|>": 5, "<|b_1|>": 6})


def test_a_million_items_are_built_in_seconds() -> None:
    codes = np.random.default_rng(0).permutation(256**4 // 4096)[:1_000_000]
    paths = np.stack([codes // 256**shift % 256 + 300 * (3 - shift) for shift in (3, 2, 1, 0)], axis=1)
    tree = PrefixTree.from_paths(paths)
    assert len(tree) == 1_000_000
    item = 123_456
    node = int(tree.leaves[item])
    for token in reversed(paths[item]):
        assert tree.tokens[node - 1] == token
        node = int(tree.parents[node])
    assert node == ROOT


def test_a_saved_tree_is_the_same_tree(tmp_path: Path) -> None:
    index = ItemIndex.from_codes(list("abcd"), [[0, 0], [1, 0], [0, 1, 0], [0, 1, 1]])
    tree = PrefixTree.from_index(index, ids_of(index))
    tree.save(tmp_path / "tree.npz")
    loaded = PrefixTree.load(tmp_path / "tree.npz")
    assert all(torch.equal(getattr(loaded, field.name), getattr(tree, field.name)) for field in fields(tree))
    assert loaded.levels == tree.levels == tree.to("cpu").levels
    first = (tmp_path / "tree.npz").read_bytes()
    tree.save(tmp_path / "tree.npz")
    assert (tmp_path / "tree.npz").read_bytes() == first


def test_what_is_no_saved_tree_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "tree.npz"
    with pytest.raises(InputError, match=r"no such file.*build the tree anew"):
        PrefixTree.load(file)
    file.write_bytes(b"PK something else")
    with pytest.raises(InputError, match="not a saved prefix tree"):
        PrefixTree.load(file)
    index = ItemIndex.from_codes(["x", "y"], [[0, 0], [0, 1]])
    tree = PrefixTree.from_index(index, ids_of(index))
    tree.save(file)
    with np.load(file) as arrays:
        np.savez(file, **{**arrays, "rows": arrays["rows"][:-1]})
    with pytest.raises(InputError, match="do not fit together"):
        PrefixTree.load(file)
    tree.save(file)
    with np.load(file) as arrays:
        np.savez(file, **{**arrays, "offsets": arrays["offsets"][::-1]})
    with pytest.raises(InputError, match="do not fit together"):
        PrefixTree.load(file)
    np.savez(file, firsts=np.array([{}], dtype=object))
    with pytest.raises(InputError, match="not a saved prefix tree"):
        PrefixTree.load(file)
