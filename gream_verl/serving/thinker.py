"""Chains of thought as they are written: by vLLM in a process of its own, or by a server that speaks the OpenAI API."""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gream_verl.core.cpu_environment import set_defaults
from gream_verl.core.openai_client import Server, find_model
from gream_verl.decoding.chains import ANSWER
from gream_verl.serving.recommender import THOUGHT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class ThinkingError(Exception):
    """No chain will come; the message says why."""


@dataclass(frozen=True)
class ThinkingOptions:
    """Options of the chains: those of ``gream evaluate``, but a single chain takes the most likely tokens.

    Attributes:
        chains: Chains for a question.
        at_once: Chains that are computed at once.
        gpu_share: Share of the GPU's memory for vLLM.
    """

    chains: int = 1
    at_once: int = 32
    gpu_share: float = 0.3

    def sampling(self, seed: int) -> dict[str, Any]:
        """Return the parameters of a request, which ends where the answer begins."""
        drawn = {"temperature": 0.6, "top_p": 0.8} if self.chains > 1 else {"temperature": 0.0}
        return {**drawn, "max_tokens": THOUGHT, "seed": seed, "stop": [ANSWER]}


READABLE = {"skip_special_tokens": False, "spaces_between_special_tokens": False, "include_stop_str_in_output": True}


class Thinker(Protocol):
    """An engine of chains."""

    async def wake(self) -> bool:
        """Return whether chains can be asked for; a dead engine is started again meanwhile."""

    def think(self, prompt: Sequence[int], seed: int) -> AsyncIterator[str]:
        """Yield the text of a chain as it is written; close the iterator, and no more is.

        Raises:
            ThinkingError: When the engine fails.
        """

    async def close(self) -> None:
        """End the engine."""


class VllmThinker:
    """vLLM in a process of its own, which is started again when it dies.

    Args:
        folder: Hugging Face folder of the model.
        options: How chains are written.
        longest: Most tokens of a prompt with its chain.
    """

    def __init__(self, folder: Path, options: ThinkingOptions, longest: int) -> None:
        self._folder, self._options, self._longest = folder, options, longest
        self._numbers = itertools.count()
        self._starting: asyncio.Task[None] | None = None
        self._engine = self._start()

    def _start(self) -> Any:
        import torch

        cpu = not torch.cuda.is_available()
        if cpu:
            set_defaults()
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_WORKER_MULTIPROCESSING_METHOD", "spawn")  # this process has threads
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        return AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                model=os.fspath(self._folder),
                dtype="float32" if cpu else "auto",
                generation_config="vllm",  # not the model's own, which could change a chain
                max_model_len=self._longest,
                max_num_seqs=self._options.at_once,
                gpu_memory_utilization=self._options.gpu_share,
                enforce_eager=cpu,
                distributed_executor_backend="uni" if cpu else None,
                disable_log_stats=True,
            )
        )

    async def wake(self) -> bool:
        """Return whether the engine lives; a dead one is started again meanwhile."""
        if self._engine.errored and self._starting is None:
            self._starting = asyncio.create_task(self._start_again())
        return not self._engine.errored

    async def think(self, prompt: Sequence[int], seed: int) -> AsyncIterator[str]:
        """Yield the text of a chain as it is written."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if not await self.wake():
            raise ThinkingError("vLLM starts again")
        parameters = SamplingParams(**self._options.sampling(seed), **READABLE, output_kind=RequestOutputKind.DELTA)
        stream = self._engine.generate({"prompt_token_ids": list(prompt)}, parameters, f"chain-{next(self._numbers)}")
        try:
            async for output in stream:
                yield output.outputs[0].text
        except Exception as error:  # of any kind: the direct answer does not depend on it
            raise ThinkingError(f"vLLM: {error}") from error

    async def _start_again(self) -> None:
        dead = self._engine
        try:
            self._engine = await asyncio.to_thread(self._start)
            dead.shutdown()
        finally:
            self._starting = None

    async def close(self) -> None:
        """End the engine."""
        if self._starting is not None:
            await asyncio.wait([self._starting])
        await asyncio.to_thread(self._engine.shutdown)


class ServerThinker:
    """A server that speaks the OpenAI API; vLLM's gets token ids, any other text."""

    def __init__(
        self, endpoint: str, model: str | None, options: ThinkingOptions, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._server = Server(endpoint, timeout=60.0, attempts=2)
        self._client, self._wanted, self._options, self._tokenizer = self._server.client(), model, options, tokenizer
        self._found: tuple[str, bool] | None = None

    async def wake(self) -> bool:
        """Return True: whether the server answers shows when it is asked."""
        return True

    async def think(self, prompt: Sequence[int], seed: int) -> AsyncIterator[str]:
        """Yield the text of a chain as it is written."""
        try:
            self._found = self._found or await find_model(self._client, self._server.endpoint, self._wanted)
            name, is_vllm = self._found
            text = list(prompt) if is_vllm else self._tokenizer.decode(prompt, skip_special_tokens=False)
            stream = await self._client.completions.create(
                model=name, prompt=text, stream=True, extra_body={**self._options.sampling(seed), **READABLE}
            )
            async with stream:
                async for part in stream:
                    if part.choices:
                        yield part.choices[0].text
        except Exception as error:  # of any kind: the direct answer does not depend on it
            self._found = None
            raise ThinkingError(f"{self._server.endpoint}: {error}") from error

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()
