"""Figures that tell a good item index from a poor one before any model is trained on it."""

from __future__ import annotations

from typing import Any

import faiss
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from data_processing.indexing.saved_index import index_codes, load_saved
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.files import write_json
from gream_verl.core.semantic_ids import ItemIndex

SAMPLE = 2000
NEIGHBOURS = 10


def prefix_numbers(codes: np.ndarray) -> np.ndarray:
    """Number the distinct prefixes of each depth from 0, in the order of their codes.

    Takes codes from 0, int [items, levels]; returns int64 [levels + 1, items], from depth 0 (all the same) on.

    >>> prefix_numbers(np.array([[1, 5], [0, 7], [1, 2]])).tolist()
    [[0, 0, 0], [1, 0, 1], [2, 0, 1]]
    """
    items, levels = codes.shape
    numbers = np.zeros((levels + 1, items), np.int64)
    for level in range(levels):
        path = numbers[level] * (int(codes[:, level].max()) + 1) + codes[:, level]
        numbers[level + 1] = np.unique(path, return_inverse=True)[1]
    return numbers


def level_balance(codes: np.ndarray, size: int) -> dict[str, Any]:
    """Count the codes of one level, int [items] from 0 to ``size - 1``, that have items; ``entropy`` is 1 when even."""
    counts = np.bincount(codes, minlength=size)
    shares = counts[counts > 0] / len(codes)
    entropy = float(-(shares * np.log(shares)).sum() / np.log(size)) if size > 1 else 1.0
    return {"used": len(shares), "min": int(counts.min()), "max": int(counts.max()), "entropy": entropy}


def collisions(codes: np.ndarray) -> dict[str, int]:
    """Count items that share their path, int [items, levels], the groups they form, and the largest group (1: none)."""
    sizes = np.bincount(prefix_numbers(codes)[-1])
    return {"items": int(sizes[sizes > 1].sum()), "groups": int((sizes > 1).sum()), "largest": int(sizes.max())}


def distortion(vectors: np.ndarray, codes: np.ndarray, codebooks: np.ndarray) -> list[float]:
    """Return the squared residual after each level as a share of the variance of the vectors [items, dimensions]."""
    total = max(float(vectors.var(axis=0, dtype=np.float64).sum()) * len(vectors), np.finfo(float).tiny)
    residual, shares = vectors.copy(), []
    for codebook, labels in zip(codebooks, codes.T, strict=True):
        residual -= codebook[labels]
        shares.append(float(np.einsum("ij,ij->", residual, residual, dtype=np.float64)) / total)
    return shares


def neighbour_sharing(vectors: np.ndarray, codes: np.ndarray, *, seed: int = 0) -> dict[str, Any]:
    """Count the codes, [items, levels], that a draw of items share with their nearest vectors, [items, dimensions].

    Returns:
        ``sample`` items; ``neighbours`` of each; ``sharing``: the number of these that share the first code, the first
        two, and so on; ``by_chance``: the same of any other items, exactly.
    """
    rows = len(vectors)
    items = np.sort(np.random.default_rng(seed).choice(rows, min(SAMPLE, rows), replace=False))
    count = min(NEIGHBOURS, rows - 1)
    _, found = faiss.knn(vectors[items], vectors, count + 1)
    # An item is its own nearest neighbour, but comes later among equals, or not at all.
    itself_last = np.argsort(found == items[:, None], axis=1, kind="stable")
    nearest = np.take_along_axis(found, itself_last, axis=1)[:, :count]
    depths = np.cumprod(codes[nearest] == codes[items][:, None, :], axis=2).sum(axis=2)
    sizes = [np.bincount(numbers) for numbers in prefix_numbers(codes)[1:]]
    return {
        "sample": len(items),
        "neighbours": count,
        "sharing": [float((depths >= depth).sum() / len(items)) for depth in range(1, codes.shape[1] + 1)],
        "by_chance": [count * float((size * (size - 1)).sum() / (rows * (rows - 1))) for size in sizes],
    }


def report_index(folder: DataFolder, *, seed: int = 0) -> dict[str, Any]:
    """Examine the index of a data set, and write ``<D>.index-report.json``; ``seed`` draws the items with neighbours.

    Figures that need vectors and the settings of the build are None for an imported index.
    """
    index = ItemIndex.load(folder.index)
    saved = load_saved(folder, index) if folder.codebooks.is_file() else None
    codes = index_codes(index, index.base_levels) if saved is None else saved.codes
    size = int(codes.max()) + 1 if saved is None else saved.codebooks.shape[1]
    report = {
        "items": len(index),
        "levels": codes.shape[1],
        "codes": size,
        "balance": [level_balance(level, size) for level in codes.T],
        "collisions": collisions(codes),
        "distortion": saved and distortion(saved.vectors, codes, saved.codebooks),
        "neighbours": neighbour_sharing(saved.vectors, codes, seed=seed) if saved and len(index) > 1 else None,
        "settings": saved and saved.settings,
    }
    write_json(folder.root / f"{folder.name}.index-report.json", report, indent=1)
    return report


def report_table(name: str, report: dict[str, Any]) -> Table:
    """Return a row per level of ``report_index``; "–" stands for figures that need vectors."""
    near, meet = report["neighbours"] or {}, report["collisions"]
    caption = (
        f"{report['items']:,} items; {meet['items']:,} collide on {meet['groups']:,} paths, {meet['largest']} at most"
    )
    table = Table(title=f"Item index of {name}", title_justify="left", box=SIMPLE_HEAD, caption=caption)
    count = near.get("neighbours", NEIGHBOURS)
    headings = "level", "codes used", "items per code", "entropy", "variance left"
    for heading in (*headings, f"shared by {count} nearest", f"by {count} at random"):
        table.add_column(heading, justify="right")
    shares = [report["distortion"], near.get("sharing"), near.get("by_chance")]
    for level, balance in enumerate(report["balance"]):
        table.add_row(
            chr(ord("a") + level),
            f"{balance['used']:,} of {report['codes']:,}",
            f"{balance['min']:,} to {balance['max']:,}",
            f"{balance['entropy']:.3f}",
            *("–" if values is None else f"{values[level]:.3g}" for values in shares),
        )
    return table
