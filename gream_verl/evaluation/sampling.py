"""Sampling of chains of thought, by vLLM or by a plain loop over a Hugging Face model (a server: ``server.py``).

No ``generation_config.json`` decides a result, and each prompt has its own seed, whatever its batch. Log-probabilities
are the model's own: at temperature 1, over the whole vocabulary, before top-p and the constraint on answers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from gream_verl.core.cpu_environment import set_defaults
from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.decoding.answer_automaton import FREE, AnswerAutomaton
from gream_verl.decoding.batches import Batch, HalvedBatches, pad_left
from gream_verl.evaluation.options import EvaluationOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROCESSOR = "gream_verl.decoding.vllm_processor:ConstrainedAnswer"


@dataclass(frozen=True)
class Response:
    """A sampled response."""

    tokens: Sequence[int]  # with the end-of-sequence token when it reached its end
    logprobs: Sequence[float]  # of each token given those before it; empty when a server sends none


class HuggingFaceSampler:
    """Sample with a Hugging Face model, in batches that are halved when memory runs out.

    ``sample`` takes prompts (token ids), each with the seed of its response, or None for the most likely tokens, and
    returns a response to each. The automaton allows only real items; None leaves answers free.
    """

    def __init__(
        self, model: PreTrainedModel, options: EvaluationOptions, eos: int, automaton: AnswerAutomaton | None = None
    ) -> None:
        self.model, self.options, self.eos, self.automaton = model, options, eos, automaton
        self.sample = HalvedBatches(self._sample_batch, options.batch_size, f"{options.max_tokens} new tokens")

    @torch.inference_mode()
    def _sample_batch(self, batch: Batch[int | None]) -> list[Response]:
        most, device = self.options.max_tokens, self.model.device
        ids, mask = (tensor.to(device) for tensor in pad_left([sequence for sequence, _ in batch]))
        uniforms = torch.zeros(len(batch), most)  # 0 draws the most likely token
        for row, (_, seed) in enumerate(batch):
            if seed is not None:
                uniforms[row] = torch.rand(most, generator=torch.Generator().manual_seed(seed))
        uniforms = uniforms.to(device)
        responses = torch.full(uniforms.shape, self.eos, device=device)
        logprobs = torch.zeros_like(uniforms)
        alive = torch.arange(len(ids), device=device)  # rows of the unfinished responses
        states = np.full(len(ids), FREE)
        cache = DynamicCache(config=self.model.config)
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        for step in range(most):
            # 1. The logits of the next token, and the model's own log-probabilities.
            logits = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            own = logits.float().log_softmax(dim=-1)
            if own.isnan().any():
                raise InputError(f"{self.model.name_or_path}: the model's output is not a number; train it again")
            # 2. The draw, among allowed tokens only.
            if self.automaton is not None:
                logits = self.automaton.constrain(logits, states)
            tokens = choose(logits, uniforms[alive, step], self.options.temperature or 1.0, self.options.top_p)
            responses[alive, step] = tokens
            logprobs[alive, step] = own.gather(1, tokens[:, None])[:, 0]
            going = tokens != self.eos
            if not going.any():
                break
            # 3. The inputs of the next step, without the responses that have ended.
            if self.automaton is not None:
                states = self.automaton.advance(states, tokens.cpu().numpy(), np.zeros(len(states), dtype=bool))
            ids, mask = tokens[:, None], torch.cat([mask, torch.ones_like(tokens)[:, None]], dim=1)
            positions = mask.sum(dim=1, keepdim=True) - 1
            if not going.all():
                kept = going.nonzero()[:, 0]
                alive, ids, mask, positions = alive[kept], ids[kept], mask[kept], positions[kept]
                states = states[kept.cpu().numpy()]
                cache.batch_select_indices(kept)
        lengths = ((responses == self.eos).cumsum(dim=1) == 0).sum(dim=1).add(1).clamp_max(most).tolist()
        pairs = zip(responses.tolist(), logprobs.tolist(), lengths, strict=True)
        return [Response(tokens[:length], values[:length]) for tokens, values, length in pairs]


def choose(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw one token per row of ``logits`` [rows, vocabulary] by nucleus sampling (arXiv 1904.09751).

    The ``uniforms`` [rows], random numbers in [0, 1), decide the draw among the fewest most likely tokens that together
    reach the probability ``top_p``. Returns int64 [rows].
    """
    probabilities, order = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0.0).cumsum(dim=-1)
    draw = torch.searchsorted(kept, uniforms[:, None] * kept[:, -1:], right=True)
    last = (before < top_p).sum(dim=-1, keepdim=True) - 1
    return order.gather(1, draw.clamp_max(last))[:, 0]


class VllmSampler:
    """Sample with vLLM's offline engine inside this process."""

    def __init__(
        self, folder: Path, options: EvaluationOptions, eos: int, longest_prompt: int, index: ItemIndex
    ) -> None:
        cpu = not torch.cuda.is_available()
        if cpu:
            set_defaults()
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # no second process that could hang
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM, SamplingParams

        length = longest_prompt + options.max_tokens
        self.engine = LLM(
            model=os.fspath(folder),
            dtype="float32" if cpu else "auto",
            generation_config="vllm",  # vLLM's neutral defaults, not the model's generation_config.json
            logprobs_mode="raw_logprobs",  # before temperature, penalties and logits processors
            max_model_len=length,
            # Where a prompt is cut in two, vLLM 0.27 rewinds its generator, and one on a CPU cannot be rewound.
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(8192, length),
            max_num_seqs=options.batch_size,
            gpu_memory_utilization=0.6,  # the model of the beam search needs the rest
            enforce_eager=cpu,
            distributed_executor_backend="uni" if cpu else None,  # two processes wait by spinning
            logits_processors=[PROCESSOR] if options.constrained else None,
            additional_config={"gream": {"index_file": index.source}} if options.constrained else {},
        )
        self.parameters = partial(
            SamplingParams,
            **options.model_dump(include={"temperature", "top_p", "max_tokens"}),
            # Otherwise vLLM adds the end-of-sequence tokens of generation_config.json, even with
            # generation_config="vllm" (vllm/sampling_params.py:660).
            ignore_eos=True,
            stop_token_ids=[eos],
            logprobs=0,  # of the sampled token only
            detokenize=False,  # we decode the ids ourselves, so that no token is lost
        )

    def sample(self, requests: Batch[int | None]) -> list[Response]:
        """Return a response to every prompt and seed; see ``HuggingFaceSampler``."""
        # Not by temperature 0: one such request in a batch, and vLLM 0.27 on a CPU ignores the seeds of the others.
        greedy = {"top_k": 1, "seed": 0}
        outputs = self.engine.generate(
            [{"prompt_token_ids": list(sequence)} for sequence, _ in requests],
            [self.parameters(**(greedy if seed is None else {"seed": seed})) for _, seed in requests],
            use_tqdm=False,
        )

        def response(tokens: Sequence[int], logprobs: Any) -> Response:
            return Response(list(tokens), [step[token].logprob for token, step in zip(tokens, logprobs, strict=True)])

        return [response(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in outputs]
