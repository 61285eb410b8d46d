"""A frozen model as the judge of chains of thought: the log-probability of the answer after a chain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from gream_verl.core.semantic_ids import find_tokens
from gream_verl.core.token_text import TokenText
from gream_verl.model.loading import load_model, load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def ending_log_probs(
    model: PreTrainedModel, sequences: Sequence[Sequence[int]], sizes: Sequence[int]
) -> list[np.ndarray]:
    """Return the log-probabilities, in nats, of the last ``sizes`` tokens of each sequence, float64 [size] each."""
    # Padding on the left puts all endings at the end, where few logits are kept.
    rows = [torch.tensor(sequence) for sequence in sequences]
    ids = pad_sequence(rows, batch_first=True, padding_side="left").to(model.device)
    mask = pad_sequence([torch.ones_like(row) for row in rows], True, padding_side="left").to(ids)
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0)}
    longest = max(sizes)
    logits = model(ids, **inputs, use_cache=False, logits_to_keep=longest + 1).logits[:, :-1].double()
    log_probs = logits.log_softmax(dim=-1).gather(2, ids[:, -longest:, None])[..., 0].cpu().numpy()
    return [row[longest - size :] for row, size in zip(log_probs, sizes, strict=True)]


class AnswerJudge:
    """Score the SIDs that end responses, by the model in a Hugging Face folder, ``batch_size`` at once."""

    def __init__(self, folder: Path, batch_size: int = 32) -> None:
        self.tokenizer, self.model = load_tokenizer(folder), load_model(folder, inference=True)
        self._folder, self._batch_size, self._reader = folder, batch_size, TokenText(self.tokenizer)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> np.ndarray:
        """Return the log-probability of each answer after its prompt and chain, in nats, shape [responses].

        Args:
            prompts: The text before each response, as the chat template renders it.
            responses: ``<think>...<answer>SID</answer>`` each.
        """
        # 1. Prompt and response are encoded apart, as in the training; of the answer only the SID counts.
        parts = [response.rpartition("<answer>") for response in responses]
        texts = [*prompts, *(chain + tag for chain, tag, _ in parts)]
        beginnings = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        sequences, sizes = list[list[int]](), list[int]()
        for row, tokens in enumerate(find_tokens(answer) for _, _, answer in parts):
            self._reader.check(tokens, str(self._folder))
            truth = self.tokenizer.convert_tokens_to_ids(tokens)
            sequences.append([*beginnings[row], *beginnings[row + len(parts)], *truth])
            sizes.append(len(truth))
        # 2. Sequences of like length share a batch; the longest come first, because memory runs out there or never.
        order = np.argsort([-len(sequence) for sequence in sequences], kind="stable")
        scores = np.zeros(len(order))
        for start in range(0, len(order), self._batch_size):
            rows = order[start : start + self._batch_size]
            endings = ending_log_probs(self.model, [sequences[row] for row in rows], [sizes[row] for row in rows])
            scores[rows] = [ending.sum() for ending in endings]
        return scores
