"""From prompts to ranked items, in both modes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
import torch

from gream_verl.core.errors import InputError
from gream_verl.core.rsvr import expected_shares, prefix_matches
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.decoding.beam_search import Prefix, beam_search, check_output_layer
from gream_verl.decoding.prefix_tree import PrefixTree, sid_ids
from gream_verl.evaluation.batches import Batch, HalvedBatches, pad_left
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.prompts import Prompt
from gream_verl.model.answer_judge import ending_log_probs

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

OVER = {"vocabulary": "over the whole vocabulary", "items": "over the tokens that lead to items"}
Users = Sequence[tuple[Prompt, Sequence[int]]]  # with the token ids of their prompts


def encode(
    prompts: Sequence[Prompt], index: ItemIndex, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, room: int
) -> list[list[int]]:
    """Return the token ids of every prompt, up to where the assistant begins to answer.

    Refuses prompts of another index, and prompts that leave the model fewer than ``room`` positions.
    """
    for prompt in prompts:
        if (sid := index.text(prompt.target)) != prompt.truth:
            raise InputError(
                f"{index.source}: item {prompt.target!r} is {sid} but {prompt.truth} in the prompts; make them again "
                "with `gream data rl`"
            )
    if tokenizer.chat_template is None:
        raise InputError(f"{tokenizer.name_or_path}: has no chat template; copy chat_template.jinja to it")
    texts = [
        tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, tokenize=False) for prompt in prompts
    ]
    sequences: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    longest, positions = max(map(len, sequences)), config.max_position_embeddings
    if longest + room > positions:
        raise InputError(
            f"{config.name_or_path}: takes {positions} tokens, but the longest prompt has {longest} and needs {room} "
            "more; make the prompts again with a shorter history"
        )
    return sequences


def shared_prefix(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the longest common beginning of token sequences that leaves each at least one token.

    >>> shared_prefix([[5, 6, 7, 8], [5, 6, 7, 9, 9], [5, 6, 7]])
    (5, 6)
    """
    beginnings = [tuple(sequence[:-1]) for sequence in sequences]
    first, last = min(beginnings), max(beginnings)  # all others lie between them in lexicographic order
    return tuple(token for token, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))


class ItemRanker:
    """Rank the items of an index by the log-probability of their SIDs after a prompt.

    ``rank`` takes the token ids of each prompt and the items that must not be recommended. It returns the items of each
    with their scores, best first. Out of memory, it halves the batch and keeps the beams. The tokens of ``prefix``,
    with which all prompts begin, are computed once.

    ``score_targets`` takes token ids, which need not begin with ``prefix``, and the true item of each. It returns the
    expected RSVR of the answer that follows, and the log-probability of the true SID in nats. Both are at temperature 1
    and over the whole vocabulary.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        index: ItemIndex,
        options: EvaluationOptions,
        prefix: Sequence[int] = (),
    ) -> None:
        self.model, self.options, self.index = model, options, index
        self.token_ids = sid_ids(index, tokenizer, model.name_or_path)
        self.tree = PrefixTree.from_index(index, self.token_ids).to(model.device)
        if options.score == "items":
            check_output_layer(model, self.tree)
        self.items = list(index.sids)
        self.rank = HalvedBatches(self._rank_batch, options.batch_size, f"{options.beams} beams")
        self.score_targets = HalvedBatches(self._score_batch, options.batch_size, "its target")
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
            self.options.beams,
            exclude.to(device),
            score=self.options.score,
            prefix=self._prefix,
        )
        return [
            {self.items[row]: score for row, score in zip(best, values, strict=True) if row >= 0}
            for best, values in zip(found.tolist(), scores.tolist(), strict=True)
        ]

    def _score_batch(self, batch: Batch[str]) -> list[tuple[float, float]]:
        # 1. The log-probability of each true token, in one pass over each sequence and its true SID.
        sids = [self.index.sids[item] for _, item in batch]
        whole = [[*ids, *(self.token_ids[token] for token in sid)] for (ids, _), sid in zip(batch, sids, strict=True)]
        true = ending_log_probs(self.model, whole, list(map(len, sids)))
        # 2. Both measures.
        matches = [prefix_matches(sid, self.index.base_levels) for sid in sids]
        values = [expected_shares(np.exp(row), some).sum() for row, some in zip(true, matches, strict=True)]
        return [(float(value), float(row.sum())) for value, row in zip(values, true, strict=True)]
