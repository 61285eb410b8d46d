"""From prompts to ranked items, in both modes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.decoding.beam_search import Prefix, Score, beam_search, check_output_layer
from gream_verl.decoding.prefix_tree import PrefixTree
from gream_verl.evaluation.memory import HalvedBatches
from gream_verl.evaluation.prompts import Prompt, batches
from gream_verl.model.vocabulary import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def check_prompts(prompts: Sequence[Prompt], index: ItemIndex) -> None:
    """Check that the prompts speak of the items of ``index`` with the same SIDs.

    Raises:
        InputError: When a target is not in the index, or has another SID there.
    """
    for prompt in prompts:
        sid = index.text(prompt.target)
        if sid != prompt.truth:
            raise InputError(
                f"{index.source}: item {prompt.target!r} is {sid} but {prompt.truth} in the prompts, which were "
                "made with another index; make them anew with `gream data rl`"
            )


def shared_prefix(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return what all token sequences begin with, short enough to leave each at least one token.

    >>> shared_prefix([[5, 6, 7, 8], [5, 6, 7, 9, 9], [5, 6, 7]])
    (5, 6)
    """
    beginnings = [tuple(sequence[:-1]) for sequence in sequences]
    first, last = min(beginnings), max(beginnings)  # all others lie between them in the order of dictionaries
    return tuple(token for token, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))


class ItemRanker:
    """Ranks the items of an index by the log-probability of their SIDs after a prompt.

    Where memory runs out the batches are halved, for good; the beams stay.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tree: PrefixTree,
        items: Sequence[str],
        beams: int,
        batch_size: int,
        *,
        score: Score = "vocabulary",
        prefix: Sequence[int] = (),
    ) -> None:
        """Get ready to rank.

        Args:
            model: The language model, in evaluation mode.
            tree: The SIDs of all items, on the device of the model.
            items: Item ids, in the order of the index.
            beams: Beams a prompt; also the longest ranking.
            batch_size: Prompts a batch.
            score: What the probability of a token is a share of; see ``beam_search``.
            prefix: Token ids that all prompts begin with, and that are computed once.

        Raises:
            InputError: When the model's logits cannot be scored so.
        """
        if score == "items":
            check_output_layer(model, tree)
        self.model = model
        self.tree = tree
        self.items = items
        self.beams = beams
        self.score: Score = score
        self._row_of = {item: row for row, item in enumerate(items)}
        self._prefix = Prefix(model, prefix)
        self._prefix_tokens = tuple(prefix)
        self._batches = HalvedBatches(
            self._rank_batch, batch_size, f"{beams} beams", "use fewer --beams, a shorter history, or a larger machine"
        )

    @classmethod
    def of_index(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        index: ItemIndex,
        beams: int,
        batch_size: int,
        *,
        score: Score = "vocabulary",
        prefix: Sequence[int] = (),
    ) -> ItemRanker:
        """Return a ranker of all items of an index; arguments as above.

        Raises:
            InputError: When a SID token of the index is missing from the tokenizer, or the logits cannot be scored so.
        """
        tree = PrefixTree.from_index(index, token_ids(tokenizer, index.tokens, model.name_or_path, allow_special=True))
        return cls(model, tree.to(model.device), list(index.sids), beams, batch_size, score=score, prefix=prefix)

    @property
    def batch_size(self) -> int:
        """Prompts a batch now."""
        return self._batches.size

    def rank(
        self, sequences: Sequence[Sequence[int]], dropped: Sequence[Iterable[str]]
    ) -> Iterator[tuple[int, dict[str, float]]]:
        """Rank items for every prompt.

        Args:
            sequences: Token ids of each prompt, with the prefix.
            dropped: Items that must not be recommended, for each prompt; those without a SID are ignored.

        Yields:
            The place of the prompt, in the order in which batches finish, and its items with their scores, best first.

        Raises:
            InputError: When there is not memory enough for a single prompt.
        """
        # The longest first: memory runs out at once or never.
        order = sorted(range(len(sequences)), key=lambda place: -len(sequences[place]))
        for batch, rankings in self._batches([(place, sequences[place], dropped[place]) for place in order]):
            yield from zip((place for place, _, _ in batch), rankings, strict=True)

    def _rank_batch(self, batch: Sequence[tuple[int, Sequence[int], Iterable[str]]]) -> list[dict[str, float]]:
        """Rank items for the prompts of one batch, the longest first."""
        [(_, ids, mask)] = batches([self._behind_prefix(sequence) for _, sequence, _ in batch], len(batch))
        rows = [sorted({self._row_of[item] for item in items if item in self._row_of}) for _, _, items in batch]
        device = self.model.device
        found, scores = beam_search(
            self.model,
            ids.to(device),
            mask.to(device),
            self.tree,
            self.beams,
            _pad(rows).to(device),
            score=self.score,
            prefix=self._prefix,
        )
        return [
            {self.items[row]: score for row, score in zip(best, values, strict=True) if row >= 0}
            for best, values in zip(found.tolist(), scores.tolist(), strict=True)
        ]

    def _behind_prefix(self, sequence: Sequence[int]) -> Sequence[int]:
        length = len(self._prefix_tokens)
        if tuple(sequence[:length]) != self._prefix_tokens or len(sequence) == length:
            raise ValueError("a prompt does not begin with the prefix, or ends with it")
        return sequence[length:]


def _pad(rows: Sequence[Sequence[int]]) -> Tensor:
    """Return ``rows`` as one int64 tensor [len(rows), longest], padded with -1."""
    padded = torch.full((len(rows), max(map(len, rows), default=0)), -1)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = torch.tensor(row, dtype=torch.long)
    return padded
