"""Sampling of chains of thought by a server that speaks the OpenAI API.

A vLLM server (it says so in ``/v1/models``) gets and sends token ids. Any other server gets and sends text, without
log-probabilities. Each chain is a request with its own seed. vLLM's options for constrained answers are in
docs/evaluation.md.
"""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import openai

from gream_verl.core.errors import InputError
from gream_verl.core.openai_client import FailedError, Server, as_done, find_model
from gream_verl.decoding.batches import Batch
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.sampling import Response

if TYPE_CHECKING:
    from openai.types import Completion
    from transformers import PreTrainedTokenizerBase


class ServerSampler:
    """Sample with the server at ``options.endpoint``."""

    def __init__(self, options: EvaluationOptions, tokenizer: PreTrainedTokenizerBase) -> None:
        self.options, self.tokenizer = options, tokenizer
        self.endpoint = options.endpoint or ""
        self.server = Server(self.endpoint, concurrency=options.concurrency, timeout=options.timeout)
        self.model, self.is_vllm = asyncio.run(self._find_model())
        if options.constrained and not self.is_vllm:
            raise InputError(f"{self.endpoint}: no vLLM server, which alone constrains answers; leave them free")

    def sample(self, requests: Batch[int | None]) -> list[Response]:
        """Return a response to every prompt and seed; see ``HuggingFaceSampler``."""
        return asyncio.run(self._sample(requests))

    async def _sample(self, requests: Batch[int | None]) -> list[Response]:
        async with self.server.client() as client:

            async def respond(row: int) -> Response:
                return await self._respond(client, *requests[row])

            rows = range(len(requests))
            found = {row: response async for row, response in as_done(rows, respond, self.options.concurrency)}
        return [found[row] for row in rows]

    async def _respond(self, client: openai.AsyncOpenAI, sequence: Sequence[int], seed: int | None) -> Response:
        """Return one response to a prompt, and refuse one that the server cut short."""
        completion = await self._complete(client, sequence, seed)
        choice, usage = completion.choices[0], completion.usage
        tokens: list[int] | None = getattr(choice, "token_ids", None)
        logprobs = choice.logprobs.token_logprobs if tokens is not None and choice.logprobs is not None else None
        response = Response(tokens or self.tokenizer.encode(choice.text, add_special_tokens=False), logprobs or [])
        length = usage.completion_tokens if usage else self.options.max_tokens
        if choice.finish_reason == "length" and length < self.options.max_tokens:
            cut = f"the server ended a response after {length} of {self.options.max_tokens} tokens"
            raise InputError(f"{self.endpoint}: {cut}; start it with a longer context and --generation-config vllm")
        if usage and usage.prompt_tokens != len(sequence):
            warnings.warn(f"{self.endpoint}: counts other tokens in a prompt; check its tokenizer", stacklevel=2)
        return response

    async def _complete(self, client: openai.AsyncOpenAI, sequence: Sequence[int], seed: int | None) -> Completion:
        """Return the server's completion of one prompt, with all that a generation config could change."""
        prompt: str | list[int]
        extra: dict[str, Any] = {"skip_special_tokens": False, "spaces_between_special_tokens": False}
        if self.is_vllm:
            prompt = list(sequence)
            extra |= {
                "logprobs": 1,
                "return_token_ids": True,
                "ignore_eos": True,  # otherwise the tokens of generation_config.json end a response, too
                "stop_token_ids": [self.tokenizer.eos_token_id],
                "vllm_xargs": {"gream": "reasoning" if self.options.constrained else "off"},
            }
        else:
            prompt = self.tokenizer.decode(sequence, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            extra |= {"repeat_penalty": 1.0}  # llama.cpp's name for it
        neutral = {"top_k": -1, "min_p": 0, "presence_penalty": 0, "frequency_penalty": 0, "repetition_penalty": 1}
        sampling = self.options.model_dump(include={"temperature", "top_p", "max_tokens"})
        drawn: dict[str, Any] = {"seed": seed}
        if seed is None:  # the most likely tokens; see VllmSampler for the temperature
            drawn = {"seed": 0, "top_k": 1} if self.is_vllm else {"seed": 0, "temperature": 0.0}
        body = {**neutral, **sampling, "n": 1, **drawn, **extra}
        try:
            completion = await client.completions.create(model=self.model, prompt=prompt, extra_body=body)
        except openai.APIError as error:
            raise self._input_error(error) from error
        if not getattr(completion, "choices", None) or not isinstance(completion.choices[0].text, str):
            raise InputError(f"{self.endpoint}: sent no completion but {str(completion)[:80]!r}; check the endpoint")
        return completion

    async def _find_model(self) -> tuple[str, bool]:
        """Return the name of the model, and True when the server is vLLM's."""
        async with self.server.client() as client:
            try:
                return await find_model(client, self.endpoint, self.options.served_model)
            except (openai.APIError, AttributeError, TypeError) as error:
                raise self._input_error(error) from error

    def _input_error(self, error: Exception) -> InputError:
        """Return the error of a request that failed for good."""
        found = self.server.error(error) if isinstance(error, openai.APIError) else FailedError(repr(error))
        if isinstance(found, InputError):
            return found
        return InputError(f"{self.endpoint}: {found}; call again, which goes on with finished users")
