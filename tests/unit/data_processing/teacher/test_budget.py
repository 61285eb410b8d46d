from __future__ import annotations

import asyncio

import pytest

from data_processing.teacher.budget import Budget, BudgetSpentError, Price
from gream_verl.core.errors import InputError


def test_a_price_is_for_a_million_tokens_of_each() -> None:
    assert Price.parse("0.5/2").of(2_000_000, 500_000) == 2.0
    for wrong in ("", "1", "a/b", "-1/2", "1/2/3", "nan/1", "inf/1"):
        with pytest.raises(InputError, match=r"such as 0\.15/0\.60"):
            Price.parse(wrong)


def test_money_needs_a_price() -> None:
    with pytest.raises(InputError, match="--price"):
        Budget(money=1.0)


def test_the_estimate_learns_from_what_the_server_counts() -> None:
    budget = Budget()
    before = budget.prompt_estimate(1000)
    budget.add(2000, 1000, 10)
    budget.add(2000, 800, 10)
    assert before == pytest.approx(350)
    assert budget.prompt_estimate(1000) == pytest.approx(550)


@pytest.mark.parametrize("budget", [Budget(tokens=10_000), Budget(money=0.02, price=Price(1, 3))])
def test_requests_under_way_never_exceed_the_budget_and_use_what_there_is(budget: Budget) -> None:
    done = 0

    async def request() -> None:
        nonlocal done
        async with budget.reserve(1000, 200):
            await asyncio.sleep(0.001)
            budget.add(1000, 300, 100)
        done += 1

    async def run() -> int:
        ends = await asyncio.gather(*(request() for _ in range(60)), return_exceptions=True)
        return sum(isinstance(end, BudgetSpentError) for end in ends)

    stopped = asyncio.run(run())
    assert done + stopped == 60
    spent = budget.prompt_tokens + budget.completion_tokens
    if budget.tokens:
        assert 10_000 - 600 < spent <= 10_000
    else:
        assert 0.02 - 0.001 < budget.cost <= 0.02


def test_a_server_with_more_tokens_than_we_thought_does_not_break_the_budget() -> None:
    budget = Budget(tokens=10_000)

    async def request() -> None:
        async with budget.reserve(1000, 100):
            await asyncio.sleep(0.001)
            budget.add(1000, 1000, 100)

    async def run() -> None:
        await asyncio.gather(*(request() for _ in range(32)), return_exceptions=True)

    asyncio.run(run())
    assert 8000 < budget.prompt_tokens + budget.completion_tokens <= 10_000


def test_what_was_spent_at_another_price_stays_what_it_was() -> None:
    budget = Budget(money=1.0, price=Price(10, 10), prompt_tokens=10**6, cost=0.0)
    budget.add(10, 1000, 0)
    assert budget.cost == pytest.approx(0.01)


def test_no_budget_is_no_bound() -> None:
    async def run() -> None:
        async with Budget().reserve(10**9, 10**9):
            pass

    asyncio.run(run())
