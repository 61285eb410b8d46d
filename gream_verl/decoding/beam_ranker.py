"""From prompts to ranked items: a beam search over the semantic IDs of an index."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import torch

from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.decoding.batches import Batch, HalvedBatches, pad_left
from gream_verl.decoding.beam_search import Prefix, Score, beam_search, check_output_layer
from gream_verl.decoding.prefix_tree import PrefixTree, sid_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def shared_prefix(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the longest common beginning of token sequences that leaves each at least one token.

    >>> shared_prefix([[5, 6, 7, 8], [5, 6, 7, 9, 9], [5, 6, 7]])
    (5, 6)
    """
    beginnings = [tuple(sequence[:-1]) for sequence in sequences]
    first, last = min(beginnings), max(beginnings)  # all others lie between them in lexicographic order
    return tuple(token for token, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))


class BeamRanker:
    """Rank the items of an index by the log-probability of their SIDs after a prompt.

    ``rank`` takes the token ids of each prompt and the items that must not be recommended. It returns the items of each
    with their scores, best first. Out of memory, it halves the batch and keeps the beams.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        index: The items to rank.
        prefix: Tokens with which all prompts begin, computed once.
        beams: Beams, and length of the lists.
        score: What a probability is normalised over; see :func:`beam_search`.
        batch_size: Prompts computed at once.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        index: ItemIndex,
        prefix: Sequence[int] = (),
        *,
        beams: int = 30,
        score: Score = "vocabulary",
        batch_size: int = 64,
    ) -> None:
        self.model, self.index, self.beams, self.score = model, index, beams, score
        self.token_ids = sid_ids(index, tokenizer, model.name_or_path)
        self.tree = PrefixTree.from_index(index, self.token_ids).to(model.device)
        if score == "items":
            check_output_layer(model, self.tree)
        self.items = list(index.sids)
        self.rank = HalvedBatches(self._rank_batch, batch_size, f"{beams} beams")
        self._row_of = {item: row for row, item in enumerate(self.items)}
        self._prefix = Prefix(model, prefix)

    def _rank_batch(self, batch: Batch[Iterable[str]]) -> list[dict[str, float]]:
        length = self._prefix.length
        ids, mask = pad_left([ids[length:] for ids, _ in batch])
        rows = [sorted({self._row_of[item] for item in items if item in self._row_of}) for _, items in batch]
        longest, device = max(map(len, rows)), self.model.device
        exclude = torch.tensor([[*row, *[-1] * (longest - len(row))] for row in rows], dtype=torch.long)
        found, scores = beam_search(
            self.model,
            ids.to(device),
            mask.to(device),
            self.tree,
            self.beams,
            exclude.to(device),
            score=self.score,
            prefix=self._prefix,
        )
        return [
            {self.items[row]: score for row, score in zip(best, values, strict=True) if row >= 0}
            for best, values in zip(found.tolist(), scores.tolist(), strict=True)
        ]
