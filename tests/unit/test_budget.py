from __future__ import annotations

import asyncio

import pytest

from data_processing.teacher.budget import Budget, BudgetSpentError, Price
from gream_verl.files import InputError


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
    assert before == pytest.approx(366)
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


def test_no_budget_is_no_bound() -> None:
    async def run() -> None:
        async with Budget().reserve(10**9, 10**9):
            pass

    asyncio.run(run())
