"""From prompts to ranked items, in both modes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from gream_verl.core.errors import InputError
from gream_verl.core.rsvr import expected_shares, prefix_matches
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.decoding.batches import Batch, HalvedBatches
from gream_verl.decoding.beam_ranker import BeamRanker
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
    longest, positions = max(map(len, sequences)), config.get_text_config(decoder=True).max_position_embeddings
    if longest + room > positions:
        raise InputError(
            f"{config.name_or_path}: takes {positions} tokens, but the longest prompt has {longest} and needs {room} "
            "more; make the prompts again with a shorter history"
        )
    return sequences


class ItemRanker(BeamRanker):
    """A beam ranker that also scores given items, with the options of an evaluation.

    ``score_targets`` takes token ids, which need not begin with the prefix, and the true item of each. It returns the
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
        sizes = options.model_dump(include={"beams", "score", "batch_size"})
        super().__init__(model, tokenizer, index, prefix, **sizes)
        self.score_targets = HalvedBatches(self._score_batch, options.batch_size, "its target")

    def _score_batch(self, batch: Batch[str]) -> list[tuple[float, float]]:
        # 1. The log-probability of each true token, in one pass over each sequence and its true SID.
        sids = [self.index.sids[item] for _, item in batch]
        whole = [[*ids, *(self.token_ids[token] for token in sid)] for (ids, _), sid in zip(batch, sids, strict=True)]
        true = ending_log_probs(self.model, whole, list(map(len, sids)))
        # 2. Both measures.
        matches = [prefix_matches(sid, self.index.base_levels) for sid in sids]
        values = [expected_shares(np.exp(row), some).sum() for row, some in zip(true, matches, strict=True)]
        return [(float(value), float(row.sum())) for value, row in zip(values, true, strict=True)]
