"""Sampling of chains of thought, by vLLM or by a plain loop over a Hugging Face model (a server: ``server.py``).

Every setting is handed over explicitly, so that no ``generation_config.json`` decides a result, and every prompt has a
seed of its own, so that a chain does not depend on which prompts share its batch.

Log-probabilities are the model's own: at temperature 1, over the whole vocabulary, before top-p and before the
constraint on answers, however the tokens were drawn.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from gream_verl.core.cpu_environment import set_defaults
from gream_verl.core.errors import InputError
from gream_verl.decoding.answer_automaton import FREE, AnswerAutomaton
from gream_verl.evaluation.memory import HalvedBatches
from gream_verl.evaluation.prompts import batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Engine = Literal["vllm", "hf", "server"]

MOST_TOKENS_AT_ONCE = 8192
"""Prompt tokens that vLLM computes in one step."""


@dataclass(frozen=True)
class SamplingSettings:
    """How chains are sampled.

    Attributes:
        chains: Samples a prompt.
        temperature: Above 0.
        top_p: Share of probability kept, above 0, up to 1.
        max_tokens: Longest response in tokens.
    """

    chains: int
    temperature: float
    top_p: float
    max_tokens: int

    def __post_init__(self) -> None:
        if self.chains < 1 or self.max_tokens < 1 or self.temperature <= 0 or not 0 < self.top_p <= 1:
            raise InputError(
                f"{self}: cannot sample so; chains and max_tokens must be at least 1, temperature above 0, "
                "top_p above 0 and at most 1"
            )


@dataclass(frozen=True)
class Response:
    """One sampled response.

    Attributes:
        tokens: Its token ids, with the end-of-sequence token when it came to its end.
        logprobs: The log-probability of each token given those before it; empty when a server does not say.
    """

    tokens: Sequence[int]
    logprobs: Sequence[float]


class UnfinishedError(InputError):
    """A server failed for good before all prompts had their responses.

    Attributes:
        finished: Place of a prompt to its responses, of those that have all.
    """

    def __init__(self, message: str, finished: Mapping[int, list[Response]]) -> None:
        super().__init__(message)
        self.finished = finished


class Sampler(Protocol):
    """Samples responses to prompts."""

    def sample(self, sequences: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[Response]]:
        """Return the responses to every prompt.

        Args:
            sequences: Token ids of each prompt.
            seeds: Seed of each prompt's first chain; the next chain has the next seed.

        Raises:
            UnfinishedError: When a server cannot be used, or no longer.
            InputError: When memory does not hold a single chain, or the model's output is not a number.
        """
        ...


class HuggingFaceSampler:
    """Samples with a Hugging Face model: slower on many prompts, but nothing to start and little memory.

    Args:
        model: The model, in evaluation mode.
        settings: How to sample.
        eos: The end-of-sequence token.
        batch_size: Responses computed at once. Where memory runs out it is halved, for good; the chains stay.
        automaton: Lets answers be real items only; None leaves them free.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: SamplingSettings,
        eos: int,
        batch_size: int,
        automaton: AnswerAutomaton | None = None,
    ) -> None:
        self.model = model
        self.settings = settings
        self.eos = eos
        self.automaton = automaton
        self._batches = HalvedBatches(
            self._sample_batch, batch_size, f"{settings.chains} chains a user",
            "use fewer --max-tokens, a shorter history, or a larger machine",
        )  # fmt: skip

    def sample(self, sequences: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[Response]]:
        """See ``Sampler``."""
        chains = self.settings.chains
        responses: dict[int, Response] = {}
        repeated = [sequence for sequence in sequences for _ in range(chains)]
        draws = [_uniforms(seed + chain, self.settings.max_tokens) for seed in seeds for chain in range(chains)]
        # The longest first: memory runs out at once or never.
        order = sorted(range(len(repeated)), key=lambda place: -len(repeated[place]))
        for batch, sampled in self._batches([(place, repeated[place], draws[place]) for place in order]):
            for (place, _, _), tokens, logprobs in zip(batch, *(tensor.tolist() for tensor in sampled), strict=True):
                length = tokens.index(self.eos) + 1 if self.eos in tokens else len(tokens)
                responses[place] = Response(tokens[:length], logprobs[:length])
        ordered = [responses[place] for place in range(len(repeated))]
        return [ordered[start : start + chains] for start in range(0, len(ordered), chains)]

    @torch.inference_mode()
    def _sample_batch(self, batch: Sequence[tuple[int, Sequence[int], Tensor]]) -> tuple[Tensor, Tensor]:
        """Return tokens and log-probabilities, [prompts, max_tokens]; end-of-sequence tokens behind a response's end.

        Args:
            batch: Place, token ids, and random numbers in [0, 1), float32 [max_tokens], of each prompt; the longest
                first.
        """
        [(_, ids, mask)] = batches([sequence for _, sequence, _ in batch], len(batch))
        uniforms = torch.stack([draws for _, _, draws in batch])
        device = self.model.device
        ids, mask, uniforms = ids.to(device), mask.to(device), uniforms.to(device)
        responses = torch.full(uniforms.shape, self.eos, device=device)
        logprobs = torch.zeros_like(uniforms)
        alive = torch.arange(len(ids), device=device)
        states = np.full(len(ids), FREE)
        cache = DynamicCache(config=self.model.config)
        positions = (mask.cumsum(dim=1) - 1).clamp_min(0)
        for step in range(self.settings.max_tokens):
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
                name = self.model.name_or_path
                raise InputError(f"{name}: the model's output is not a number; train it anew, or use another dtype")
            if self.automaton is not None:
                logits = self.automaton.constrain(logits, states)
            tokens = choose(logits, uniforms[alive, step], self.settings.temperature, self.settings.top_p)
            responses[alive, step] = tokens
            logprobs[alive, step] = own.gather(1, tokens[:, None])[:, 0]
            going = tokens != self.eos
            if not going.any():
                break
            if self.automaton is not None:
                states = self.automaton.advance(states, tokens.cpu().numpy(), np.zeros(len(states), dtype=bool))
            ids, mask = tokens[:, None], torch.cat([mask, torch.ones_like(tokens)[:, None]], dim=1)
            positions = mask.sum(dim=1, keepdim=True) - 1
            if not going.all():
                kept = going.nonzero()[:, 0]
                alive, ids, mask, positions = alive[kept], ids[kept], mask[kept], positions[kept]
                states = states[kept.cpu().numpy()]
                cache.batch_select_indices(kept)
        return responses, logprobs


def choose(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draw one token a row by nucleus sampling (arXiv 1904.09751).

    Args:
        logits: [rows, vocabulary].
        uniforms: [rows]; random numbers in [0, 1), which decide the draw.
        temperature: Divides the logits.
        top_p: The fewest most likely tokens that together reach this probability are kept.

    Returns:
        int64 [rows].
    """
    probabilities, order = (logits.float() / temperature).softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = probabilities.masked_fill(before >= top_p, 0.0).cumsum(dim=-1)
    draw = torch.searchsorted(kept, uniforms[:, None] * kept[:, -1:], right=True)
    last = (before < top_p).sum(dim=-1, keepdim=True) - 1
    return order.gather(1, draw.clamp_max(last))[:, 0]


class VllmSampler:
    """Samples with vLLM's offline engine inside this process.

    Args:
        folder: A Hugging Face model.
        settings: How to sample.
        eos: The end-of-sequence token.
        batch_size: Responses computed at once.
        longest_prompt: Tokens of the longest prompt.
        memory: Share of an accelerator's memory that the engine may take.
        index_file: Answers are real items of this index only; None leaves them free.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        settings: SamplingSettings,
        eos: int,
        batch_size: int,
        longest_prompt: int,
        memory: float,
        index_file: str | os.PathLike[str] | None = None,
    ) -> None:
        cpu = not torch.cuda.is_available()
        if cpu:
            set_defaults()
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # no second process that could hang
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM, SamplingParams

        constraint: dict[str, Any] = {}
        if index_file is not None:
            constraint = {
                "logits_processors": ["gream_verl.decoding.vllm_processor:ConstrainedAnswer"],
                "additional_config": {"gream": {"index_file": os.fspath(index_file), "mode": "reasoning"}},
            }
        self.engine = LLM(
            model=os.fspath(folder),
            dtype="float32" if cpu else "auto",
            generation_config="vllm",  # vLLM's neutral defaults, not the model's generation_config.json
            logprobs_mode="raw_logprobs",  # before temperature, penalties and logits processors
            max_model_len=longest_prompt + settings.max_tokens,
            # Where a prompt is cut in two, vLLM 0.27 rewinds its generator, and one on a CPU cannot be rewound.
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(MOST_TOKENS_AT_ONCE, longest_prompt + settings.max_tokens),
            max_num_seqs=batch_size,
            gpu_memory_utilization=memory,
            enforce_eager=cpu,
            disable_log_stats=True,
            seed=0,  # of nothing: every request has its own
            **constraint,
        )
        self.parameters = partial(
            SamplingParams,
            n=settings.chains,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=0,
            min_p=0.0,
            presence_penalty=0.0,
            frequency_penalty=0.0,
            repetition_penalty=1.0,
            min_tokens=0,
            max_tokens=settings.max_tokens,
            # Else vLLM adds the end-of-sequence tokens of generation_config.json, whatever generation_config says
            # (vllm/sampling_params.py:660).
            ignore_eos=True,
            stop_token_ids=[eos],
            logprobs=0,  # of the sampled token only
            detokenize=False,  # we decode the ids ourselves, so that no token is lost
        )

    def sample(self, sequences: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[Response]]:
        """See ``Sampler``."""
        outputs = self.engine.generate(
            [{"prompt_token_ids": list(sequence)} for sequence in sequences],
            [self.parameters(seed=seed) for seed in seeds],
            use_tqdm=False,
        )
        return [[_response(chain.token_ids, chain.logprobs) for chain in output.outputs] for output in outputs]


def _response(tokens: Sequence[int], logprobs: Any) -> Response:
    """Return a response of vLLM's; ``logprobs`` has a mapping from token to log-probability for every token."""
    return Response(list(tokens), [step[token].logprob for token, step in zip(tokens, logprobs, strict=True)])


def _uniforms(seed: int, count: int) -> Tensor:
    """Return float32 [count] random numbers in [0, 1)."""
    return torch.rand(count, generator=torch.Generator().manual_seed(seed))
