"""What asking a teacher may cost, in tokens and in money, and what it will."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from gream_verl.core.errors import InputError

TOKENS_A_BYTE = 0.35
"""Tokens of a byte of prompt before any was counted by the server: a little more than English text has."""
MARGIN = 1.1


class BudgetSpentError(Exception):
    """The next request might cost more than is left."""


@dataclass(frozen=True)
class Price:
    """Money for a million tokens, in any currency.

    Attributes:
        prompt: For a million tokens of requests.
        completion: For a million tokens of answers.
    """

    prompt: float = 0.0
    completion: float = 0.0

    def of(self, prompt_tokens: float, completion_tokens: float) -> float:
        """Return what so many tokens cost."""
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6

    @classmethod
    def parse(cls, text: str) -> Price:
        """Read ``PROMPT/COMPLETION``, such as ``0.15/0.60``.

        Raises:
            InputError: When ``text`` is not two numbers from 0 with a slash between.
        """
        try:
            prompt, completion = map(float, text.split("/"))
        except ValueError:
            prompt = completion = -1
        if not (0 <= prompt < float("inf") and 0 <= completion < float("inf")):
            raise InputError(
                f"--price {text!r}: expected money for a million tokens of prompt and of answer, such as 0.15/0.60"
            )
        return cls(prompt, completion)


@dataclass
class Budget:
    """Lets a request begin only when all that have begun, each at its longest, can be paid.

    Attributes:
        tokens: Most tokens, prompts and answers together; no bound when None.
        money: Most money; no bound when None.
        price: What tokens cost.
        prompt_tokens: Tokens of the prompts that were answered, in earlier runs too.
        completion_tokens: Tokens of the answers, likewise.
        cost: What all of it has cost, in money.
    """

    tokens: int | None = None
    money: float | None = None
    price: Price = field(default_factory=Price)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    _begun: int = 0
    _begun_prompt: float = 0.0
    _begun_completion: float = 0.0
    _most_a_byte: float = 0.0
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        if self.money is not None and not (self.price.prompt or self.price.completion):
            raise InputError("a budget in money needs a price: --price PROMPT/COMPLETION for a million tokens of each")

    def prompt_estimate(self, size: int) -> float:
        """Return how many tokens a prompt of ``size`` bytes may have, by the prompts that the server has counted."""
        return size * (MARGIN * self._most_a_byte or TOKENS_A_BYTE)

    def add(self, size: int, prompt_tokens: int, completion_tokens: int) -> float:
        """Count an answer to a prompt of ``size`` bytes; return what it has cost."""
        cost = self.price.of(prompt_tokens, completion_tokens)
        self._most_a_byte = max(self._most_a_byte, prompt_tokens / max(size, 1))
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens
        self.cost += cost
        return cost

    @asynccontextmanager
    async def reserve(self, size: int, most: int) -> AsyncIterator[None]:
        """Hold back what a request may cost while it is asked; wait for others to end while that is too much.

        Args:
            size: Bytes of the prompt.
            most: Most tokens of the answer.

        Raises:
            BudgetSpentError: When it is too much and no other request is being asked.
        """
        prompt = self.prompt_estimate(size)
        while not self._affords(prompt, most):
            if not self._begun:
                raise BudgetSpentError
            self._ended.clear()
            await self._ended.wait()
            prompt = self.prompt_estimate(size)
        self._hold(1, prompt, most)
        try:
            yield
        finally:
            self._hold(-1, -prompt, -most)
            self._ended.set()

    def _hold(self, begun: int, prompt: float, completion: float) -> None:
        self._begun += begun
        self._begun_prompt += prompt
        self._begun_completion += completion

    def _affords(self, prompt: float, completion: float) -> bool:
        if self._begun and not self._most_a_byte and not (self.tokens is None and self.money is None):
            return False  # with a budget, the first prompt is counted by the server before others begin
        prompts, completions = self._begun_prompt + prompt, self._begun_completion + completion
        tokens = self.prompt_tokens + self.completion_tokens + prompts + completions
        return (self.tokens is None or tokens <= self.tokens) and (
            self.money is None or self.cost + self.price.of(prompts, completions) <= self.money
        )
