"""Probabilities of given tokens from vLLM, exactly as the engine would sample them.

vLLM's ``prompt_logprobs`` know neither the temperature nor the tokens that a logits processor forbids, and compute the
whole prompt again. A scoring request generates instead: ``vllm_processor.TruthScorer`` forces the given tokens, their
log-probabilities tell how probable each one was, and the prefix cache holds the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

COMPRESSION = 64
"""A scoring request is greedy, so a forced token has to be the most probable one. It gets p ** (1 / 64), which is above
one half for every p above e ** -44."""

SMALLEST_LOG_PROB = -40.0


def scoring_parameters(tokens: Sequence[int], temperature: float) -> dict[str, Any]:
    """Return the sampling parameters of a request that scores ``tokens``, the next ones after its prompt.

    Where other processors forbid tokens, as ``ConstrainedAnswer`` does, the probabilities are those among the others.
    The engine must return the log-probabilities after all processors (``logprobs_mode="processed_logprobs"``).
    """
    extra = {"gream_truth": list(tokens), "gream_temperature": max(temperature, 1e-4)}
    drawn = {"temperature": 0.0, "repetition_penalty": 1.0}
    return {**drawn, "max_tokens": len(tokens), "ignore_eos": True, "extra_args": extra}


def decompress(log_probs: Sequence[float]) -> np.ndarray:
    """Return the probabilities [tokens] that the log-probabilities of a scoring request stand for."""
    return np.exp(np.array(log_probs) * COMPRESSION)


def force(logits: Tensor, tokens: Tensor, temperatures: Tensor) -> Tensor:
    """Return logits that leave each row its given token, with a compressed probability, and one other token.

    Args:
        logits: Shape [rows, vocabulary].
        tokens: The given token ids, int64 [rows].
        temperatures: Shape [rows].
    """
    tokens = tokens[:, None]
    log_probs = (logits / temperatures[:, None]).log_softmax(dim=-1).gather(1, tokens)
    compressed = log_probs.clamp(min=SMALLEST_LOG_PROB) / COMPRESSION
    forced = torch.full_like(logits, -torch.inf)
    forced.scatter_(1, (tokens + 1) % logits.shape[1], torch.log(-torch.expm1(compressed)))
    return forced.scatter_(1, tokens, compressed)
