"""First values of the embedding rows of new tokens: three ways, all drawn from what the base model has learnt.

With m the mean of the base vocabulary's rows, s their standard deviation (a value a dimension), S their covariance and
z standard normal:

* ``mean``: m + 0.1 s z. Close to no opinion, yet all different.
* ``distribution``: m + S^(1/2) z. Rows that could be the base's own, as transformers' ``mean_resizing`` draws them
  (after https://nlp.stanford.edu/~johnhew/vocab-expansion.html); transformers shrinks S by 1e-9, which leaves rows that
  bfloat16 cannot tell apart, and we do not.
* ``texts``: m + |s| d / |d| + 0.1 s z, with d what the items under a code say that others do not: the mean, over those
  items, of the mean row of the tokens of their texts, less the mean of that over the codes of the level. Averages of
  averages lie close together, the deeper the level the closer; so d counts by its direction, and |s|, how far a base
  row lies from m, keeps the base's spread. A code without texts gets a row as ``mean`` draws it.

Under ``texts``, reasoning tags and rows that only fill the embedding up are drawn as ``mean`` does. An output head that
is not tied gets rows of its own, by the same formula on its own base rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json
from gream_verl.core.semantic_ids import ItemIndex

if TYPE_CHECKING:
    import torch
    from scipy.sparse import csr_matrix
    from transformers import PreTrainedTokenizerBase

Rows = Literal["texts", "distribution", "mean"]
ROWS: tuple[Rows, ...] = get_args(Rows)
NOISE = 0.1
LEAST_DIFFERENCE = 1e-3
"""Share of the base's spread below which a difference of texts is rounding, not to be blown up."""
TEXT_FIELDS = ("title", "description", "brand", "categories")
LONGEST_TEXT = 2000
"""Characters of an item's text that are read."""
ITEMS_AT_ONCE = 20_000
COLUMNS_AT_ONCE = 256
"""Dimensions for which a float32 copy of the embedding is held at a time."""


def read_item_texts(path: Path) -> dict[str, str]:
    """Return the text of every item of ``<D>.item.json``: title, description, brand and categories in one line.

    Raises:
        InputError: When the file is missing or holds something else.
    """
    items = read_json(path, "name it with --items, or choose rows that need no texts, such as --rows distribution")
    if not isinstance(items, dict) or not all(isinstance(fields, dict) for fields in items.values()):
        raise InputError(f"{path}: expected {{item: {{title, description, ...}}}}; name the item file with --items")
    return {item: " ".join(filter(None, _words(fields)))[:LONGEST_TEXT] for item, fields in items.items()}


def _words(fields: Mapping[str, Any]) -> Iterable[str]:
    for name in TEXT_FIELDS:
        value = fields.get(name) or ""
        yield from map(str, value) if isinstance(value, list) else [str(value)]


def text_shares(
    tokenizer: PreTrainedTokenizerBase, index: ItemIndex, texts: Mapping[str, str], vocabulary: int
) -> csr_matrix:
    """Return how much each token of the vocabulary counts in the texts under each SID token.

    Args:
        tokenizer: The tokenizer.
        index: The item index.
        texts: Item to its text.
        vocabulary: Columns: rows of the embedding.

    Returns:
        A matrix [SID tokens in the order of ``index.tokens``, vocabulary]; every item under a code counts the same, and
        so does every token of an item. Rows sum to 1, or to 0 for a code without texts.
    """
    from scipy.sparse import csr_matrix, diags

    items = [item for item in index.sids if texts.get(item, "").strip()]
    number = {token: place for place, token in enumerate(index.tokens)}
    total = csr_matrix((len(number), vocabulary), dtype=np.float32)
    for start in range(0, len(items), ITEMS_AT_ONCE):
        part = items[start : start + ITEMS_AT_ONCE]
        ids = tokenizer(
            [texts[item] for item in part], add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        words = csr_matrix(
            (
                np.repeat(1 / np.maximum(lengths, 1), lengths).astype(np.float32),
                np.concatenate([np.asarray(row, np.int64) for row in ids]),
                np.concatenate([[0], np.cumsum(lengths)]),
            ),
            shape=(len(part), vocabulary),
        )
        pairs = np.array(
            [(number[token], row) for row, item in enumerate(part) for token in index.sids[item]], np.int64
        )
        under = csr_matrix((np.ones(len(pairs), np.float32), pairs.T), shape=(len(number), len(part)))
        total += under @ words
    counted = np.asarray(total.sum(axis=1)).ravel()
    return diags(np.where(counted > 0, 1 / np.maximum(counted, 1e-9), 0).astype(np.float32)) @ total


def draw_rows(weight: torch.Tensor, trained: int, first: int, seed: int, *, matched: bool = False) -> None:
    """Draw the rows of ``weight`` [vocabulary, hidden] from ``first`` on, in place, from the first ``trained`` rows.

    Args:
        weight: Embedding or output head.
        trained: Number of rows, from the front, whose statistics count.
        first: The first row to draw.
        seed: Seed of the draw.
        matched: Draw with the covariance of the trained rows, as ``distribution`` does; else as ``mean`` does.
    """
    import torch

    mean, std = _moments(weight[:trained])
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(weight) - first, weight.shape[1], generator=generator).to(weight.device)
    if matched:
        covariance = torch.zeros(weight.shape[1], weight.shape[1], device=weight.device)
        for rows in weight[:trained].split(8192):
            centred = rows.float() - mean
            covariance += centred.T @ centred
        values, vectors = torch.linalg.eigh(covariance / trained)  # takes fewer rows than dimensions, too
        rows = mean + (noise * values.clamp(min=0).sqrt()) @ vectors.T
    else:
        rows = mean + NOISE * std * noise
    weight[first:] = rows.to(weight.dtype)


def add_texts(
    weight: torch.Tensor, trained: int, first: int, ids: Sequence[int], levels: Sequence[int], shares: csr_matrix
) -> None:
    """Move the rows of SID tokens towards the texts of their items, in place, as the module says of ``texts``.

    Args:
        weight: Embedding or output head [vocabulary, hidden], new rows drawn by :func:`draw_rows`.
        trained: Number of rows, from the front, whose statistics count.
        first: Rows before this one keep their values.
        ids: The row of every SID token.
        levels: The level of every SID token.
        shares: From :func:`text_shares`.
    """
    import torch

    columns = weight.split(COLUMNS_AT_ONCE, dim=1)
    texts = torch.cat([torch.from_numpy(shares @ part.float().cpu().numpy()) for part in columns], dim=1)
    told, level_of, id_of = torch.from_numpy(np.diff(shares.indptr) > 0), torch.tensor(levels), torch.tensor(ids)
    for level in set(levels):
        here = told & (level_of == level)
        texts[here] -= texts[here].mean(0)
    spread = _moments(weight[:trained])[1].norm().cpu()
    directions = torch.nn.functional.normalize(texts, dim=1, eps=float(LEAST_DIFFERENCE * spread))
    new = id_of >= first
    moved = weight[id_of[new]].float() + (spread * directions[new]).to(weight.device)
    weight[id_of[new]] = moved.to(weight.dtype)


def _moments(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation of every dimension, float32, without a float32 copy of all ``rows``."""
    import torch

    stds, means = zip(
        *(torch.std_mean(part.float(), dim=0) for part in rows.split(COLUMNS_AT_ONCE, dim=1)), strict=True
    )
    return torch.cat(means), torch.cat(stds)
