r"""Sampling of chains of thought by a server that speaks the OpenAI API: vLLM's, or any other.

Where the server is vLLM's (it says so in ``/v1/models``), prompts and responses travel as token ids, which leaves no
doubt. Any other server gets the prompt as text, which all of them take, and its tokens are read from the text of each:
exact for SID tokens, while a letter that is cut in two tokens reads as U+FFFD. Each chain is a request of its own with
its own seed, because not every server takes ``n``; vLLM's cache computes the prompt once.

A server constrains answers only when it was started for that:

    vllm serve MODEL --generation-config vllm \
        --logits-processors gream_verl.decoding.vllm_processor:ConstrainedAnswer \
        --additional-config '{"gream": {"index_file": "data/beauty.index.json", "mode": "off"}}'

``mode`` is what requests get that do not ask; ours do ask. Keep ``--logprobs-mode`` as it is, ``raw_logprobs``.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import openai
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator
from tenacity import retry, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.core.token_text import TokenText
from gream_verl.evaluation.sampling import Response, SamplingSettings, UnfinishedError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

KEY = "OPENAI_API_KEY"
RETRIES = 8
"""After a busy server, a lost connection or a timeout, with the client's own growing waits: about 40 seconds in all."""
FINGERPRINT_PROMPT, FINGERPRINT_TOKENS = 15, 16
"""Tokens of the prompt, fewer than a block of vLLM's prefix cache, which would change the last digits; and of the
answer."""
REMEDIES = {
    400: "the server takes no such request: start it with a longer context, or take one that knows these settings",
    401: f"set the API key in the environment variable {KEY}",
    403: f"the API key in {KEY} has no right to this",
    404: "check --endpoint (it ends in /v1 for most servers) and --served-model",
}


@dataclass(frozen=True)
class Connection:
    """How to reach a server.

    Attributes:
        endpoint: Base URL, such as ``http://127.0.0.1:8000/v1``.
        model: Name of the model there; None takes the only one.
        concurrency: Requests under way at once.
        timeout: Seconds until a request is given up.
    """

    endpoint: str
    model: str | None = None
    concurrency: int = 64
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if not self.endpoint.startswith(("http://", "https://")):
            raise InputError(f"--endpoint {self.endpoint!r}: expected a URL such as http://127.0.0.1:8000/v1")


class NoAnswerError(Exception):
    """The server said 200 and sent something else than an answer."""


class _Logprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]

    @model_validator(mode="after")
    def _one_for_each_token(self) -> Self:
        if len(self.tokens) != len(self.token_logprobs):
            raise ValueError("tokens and token_logprobs differ in length")
        return self


class _Choice(BaseModel):
    text: str
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None
    token_ids: list[int] | None = None

    @field_validator("logprobs", mode="before")
    @classmethod
    def _none_in_another_form(cls, value: Any) -> Any:
        """Some servers send the log-probabilities of a chat, which do not say where a token begins."""
        there = isinstance(value, dict) and None not in (value.get("tokens"), value.get("token_logprobs"))
        return value if there else None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Completion(BaseModel):
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


class ServerSampler:
    """Samples with a server.

    Args:
        connection: How to reach it.
        settings: How to sample.
        tokenizer: The model's.
        constrained_to: Answers are real items of this index only, which the server must have been started with; None
            leaves them free.

    Raises:
        InputError: When the server cannot be reached, does not have the model, or was not started to constrain answers.
    """

    def __init__(
        self,
        connection: Connection,
        settings: SamplingSettings,
        tokenizer: PreTrainedTokenizerBase,
        constrained_to: ItemIndex | None = None,
    ) -> None:
        self.connection = connection
        self.settings = settings
        self.tokenizer = tokenizer
        self.mode = "off" if constrained_to is None else "reasoning"
        self._warned = False
        self._runner = asyncio.Runner()
        self._free = asyncio.Semaphore(connection.concurrency)
        self._client = openai.AsyncOpenAI(
            base_url=connection.endpoint,
            api_key=os.environ.get(KEY) or "none",
            timeout=connection.timeout,
            max_retries=RETRIES,
        )
        self.model, self.is_vllm = self._runner.run(self._find_model())
        if constrained_to is not None:
            self._runner.run(self._check_constraint(constrained_to))

    def sample(self, sequences: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[Response]]:
        """See ``Sampler``."""
        return self._runner.run(self._sample(sequences, seeds))

    def fingerprint(self, prompt: Sequence[int]) -> dict[str, Any]:
        """Return what tells this server's model from another of the same name: what it says, asked for the most likely.

        Args:
            prompt: Token ids, of which the last few are asked with. The same ones give the same fingerprint, save
                where log-probabilities lie at the edge of rounding and the server computes them in changing batches.

        Returns:
            ``endpoint``, ``model``, ``tokens`` and ``logprobs``, rounded to a tenth; those are empty where the server
            does not give any.

        Raises:
            InputError: When the server does not answer.
        """
        request = {"temperature": 0.0, "top_p": 1.0, "max_tokens": FINGERPRINT_TOKENS, "seed": 0}
        completion = self._runner.run(self._complete(prompt[-FINGERPRINT_PROMPT:], request, "off"))
        response = self._read(completion.choices[0])
        return {
            "endpoint": self.connection.endpoint,
            "model": self.model,
            "tokens": list(response.tokens),
            "logprobs": [round(value, 1) + 0.0 for value in response.logprobs],  # no -0.0
        }

    def close(self) -> None:
        """Let go of the connections."""
        self._runner.run(self._client.close())
        self._runner.close()

    async def _sample(self, sequences: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[Response]]:
        chains = self.settings.chains
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    [group.create_task(self._respond(sequence, seed + chain)) for chain in range(chains)]
                    for sequence, seed in zip(sequences, seeds, strict=True)
                ]
        except ExceptionGroup as group:
            if not isinstance(error := group.exceptions[0], InputError):
                raise error from None
            finished = {
                place: [task.result() for task in user]
                for place, user in enumerate(tasks)
                if not any(task.cancelled() or task.exception() for task in user)
            }
            raise UnfinishedError(str(error), finished) from None
        return [[task.result() for task in user] for user in tasks]

    async def _respond(self, sequence: Sequence[int], seed: int) -> Response:
        """Return one chain after a prompt."""
        settings = self.settings
        request = {
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_tokens": settings.max_tokens,
            "seed": seed,
        }
        completion = await self._complete(sequence, request, self.mode)
        choice = completion.choices[0]
        response = self._read(choice)
        length = _length(completion)
        if choice.finish_reason == "length" and length is not None and length < settings.max_tokens:
            raise InputError(
                f"{self.connection.endpoint}: the server ended a response after {length} of "
                f"{settings.max_tokens} tokens; start it with a longer context, and vLLM with --generation-config vllm"
            )
        seen = completion.usage.prompt_tokens if completion.usage else None
        if seen is not None and seen != len(sequence) and not self._warned:
            self._warned = True
            logger.warning(
                "%s: counts %d tokens in a prompt of %d; does it add a token of its own, or have another tokenizer?",
                *(self.connection.endpoint, seen, len(sequence)),
            )
        return response

    async def _complete(self, sequence: Sequence[int], request: dict[str, Any], mode: str) -> _Completion:
        """Return the server's answer to one prompt."""
        neutral: dict[str, Any] = {
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
        }
        prompt: str | list[int]
        if self.is_vllm:
            prompt = list(sequence)
            neutral |= {
                "return_token_ids": True,
                "ignore_eos": True,  # else those of generation_config.json end a response, too
                "stop_token_ids": [self.tokenizer.eos_token_id],
                "vllm_xargs": {"gream": mode},
            }
        else:
            prompt = self.tokenizer.decode(sequence, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            neutral |= {"repeat_penalty": 1.0}  # llama.cpp's name for it
        request = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "n": 1, "logprobs": 1, **request}
        try:
            async with self._free:
                return await self._ask({"model": self.model, "prompt": prompt, "extra_body": neutral, **request})
        except (openai.APIError, NoAnswerError) as error:
            raise self._input_error(error) from error

    @retry(
        retry=retry_if_exception_type(NoAnswerError),
        stop=stop_after_attempt(RETRIES),
        wait=wait_random_exponential(multiplier=0.5, max=8),
        reraise=True,
    )
    async def _ask(self, request: dict[str, Any]) -> _Completion:
        raw = await self._client.completions.with_raw_response.create(**request)
        try:
            return _Completion.model_validate_json(raw.content)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise NoAnswerError(f"no answer ({reason}) but {raw.content[:80]!r}") from None

    def _read(self, choice: _Choice) -> Response:
        """Return tokens and log-probabilities of a choice; none when that of a token is missing."""
        if choice.logprobs is None:
            return Response(choice.token_ids or self.tokenizer.encode(choice.text, add_special_tokens=False), [])
        values = [value for value in choice.logprobs.token_logprobs if value is not None]
        known = len(values) == len(choice.logprobs.token_logprobs)
        if choice.token_ids is not None:
            return Response(choice.token_ids, values if known else [])
        pieces = [self.tokenizer.encode(text, add_special_tokens=False) for text in choice.logprobs.tokens]
        tokens = [token for ids in pieces for token in ids]
        if not known:
            return Response(tokens, [])
        logprobs = []
        before = 0.0  # of tokens without text, such as the first half of a letter
        for ids, value in zip(pieces, values, strict=True):
            before += value
            if ids:
                logprobs += [before, *[0.0] * (len(ids) - 1)]
                before = 0.0
        return Response(tokens, logprobs)

    async def _find_model(self) -> tuple[str, bool]:
        """Return the name of the model and whether the server is vLLM's."""
        wanted = self.connection.model
        try:
            models = {model.id: model.owned_by async for model in self._client.models.list()}
        except (openai.APIError, AttributeError, TypeError) as error:
            if wanted is not None and getattr(error, "status_code", 404) == 404:
                return wanted, False  # the server keeps no list
            raise self._input_error(error) from error
        if wanted is None and len(models) == 1:
            wanted = next(iter(models))
        if wanted is None or (models and wanted not in models):
            raise InputError(
                f"{self.connection.endpoint}: no model {wanted!r} there but {', '.join(sorted(models)) or 'none'}; "
                "give one with --served-model"
            )
        return wanted, models.get(wanted) == "vllm"

    async def _check_constraint(self, index: ItemIndex) -> None:
        """Ask for a single direct answer, which is an item exactly when the server constrains answers."""
        text = ""
        if self.is_vllm:
            eos = self.tokenizer.eos_token_id
            request = {"temperature": 0.0, "top_p": 1.0, "max_tokens": max(map(len, index.items)) + 1, "seed": 0}
            completion = await self._complete([eos], request, "direct")
            text = TokenText(self.tokenizer).read(self._read(completion.choices[0]).tokens)
        if text not in {"".join(sid) for sid in index.items}:
            raise InputError(
                f"{self.connection.endpoint}: the server does not constrain answers to the items of {index.source}; "
                "start vLLM with --logits-processors gream_verl.decoding.vllm_processor:ConstrainedAnswer "
                f"""--additional-config '{{"gream": {{"index_file": "{index.source}", "mode": "off"}}}}', """
                "or leave answers free with --free"
            )

    def _input_error(self, error: Exception) -> InputError:
        """Return what a user is told of a request that failed for good."""
        if isinstance(error, openai.APIStatusError):
            remedy = REMEDIES.get(error.status_code, "finished users are kept; call again to go on")
            return InputError(f"{error.request.url}: {' '.join(error.message.split())[:300]}; {remedy}")
        cause = error.__cause__ or error
        return InputError(
            f"{self.connection.endpoint}: {str(cause) or repr(cause)}; start the server or check --endpoint; finished "
            "users are kept, and a further call goes on"
        )


def _length(completion: _Completion) -> int | None:
    """Return how many tokens a response has; None when the server does not tell, and its text does not, either."""
    if completion.usage and completion.usage.completion_tokens is not None:
        return completion.usage.completion_tokens
    choice = completion.choices[0]
    if choice.logprobs is not None:
        return len(choice.logprobs.tokens)
    return None if choice.token_ids is None else len(choice.token_ids)
