from __future__ import annotations

import asyncio
import itertools
import json
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("prometheus_client", reason="the extra serve is not installed")

from assets import make_tiny_model
from serving_run import CHAIN, CannedThinker, make_served_run, thinking

from gream_verl.core.errors import InputError
from gream_verl.core.run_folder import RunFolder
from gream_verl.evaluation import reasoning
from gream_verl.evaluation.direct import evaluate_direct
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.prompts import make_prompts
from gream_verl.evaluation.results import merged
from gream_verl.evaluation.sampling import Response
from gream_verl.serving.forms import RecommendRequest
from gream_verl.serving.service import RefusedError, Service
from gream_verl.serving.settings import Settings
from gream_verl.serving.thinker import ThinkingError


def served(service: Service, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Run some work and close the service."""

    async def run() -> Any:
        try:
            return await asyncio.wait_for(work(), 60)
        finally:
            await service.close()

    return asyncio.run(run())


def ask(service: Service, **given: Any) -> Any:
    return served(service, lambda: service.recommend(RecommendRequest(**{"history": ["1", "2"], **given})))


def test_both_modes_and_their_merger_answer_as_the_evaluation_does(
    run: RunFolder, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recommender = service.bundle(None).recommender
    tokens = recommender.tokenizer.encode(CHAIN, add_special_tokens=False)

    class CannedSampler:
        def __init__(self, *given: Any) -> None:
            pass

        def sample(self, requests: Sequence[Any]) -> list[Response]:
            return [Response(tokens, [0.0] * len(tokens))] * len(requests)

    monkeypatch.setattr(reasoning, "HuggingFaceSampler", CannedSampler)
    options = EvaluationOptions(engine="hf", beams=30)
    rows = {}
    for mode in ("direct", "reasoning"):
        prompts, _ = make_prompts(run.data.inter, mode, options, recommender.index)
        if mode == "direct":
            rows[mode] = evaluate_direct(run.sft, prompts, recommender.index, options)
        else:
            rows[mode] = reasoning.evaluate_reasoning(run.sft, prompts, recommender.index, options, tmp_path / "rows")
    rows["merged"] = merged(rows["direct"], rows["reasoning"])

    async def answers() -> dict[str, list[Any]]:
        return {
            mode: [await service.recommend(RecommendRequest(user=row["user"], mode=mode, k=10)) for row in found.rows]
            for mode, found in rows.items()
        }

    for mode, given in served(service, answers).items():
        for row, answer in zip(rows[mode].rows, given, strict=True):
            assert [item.id for item in answer.items] == row["recommended"][:10]
            if mode == "reasoning":
                assert [item.score for item in answer.items] == pytest.approx(row["scores"][:10], abs=1e-3)
            assert answer.fallback == ""


def test_thinking_that_takes_too_long_is_cut_and_direct_mode_answers(service: Service) -> None:
    thinker = CannedThinker(pause=5.0)
    answer = ask(thinking(service, thinker), mode="reasoning", budget_ms=50)
    assert answer.fallback == "thinking took more than 50 ms: this is the direct answer"
    assert thinker.cut_short == 1
    assert service.metrics.fallbacks._value.get() == 1
    assert answer.items
    assert answer.milliseconds["total"] < 3000


class BrokenThinker(CannedThinker):
    """Fails after some words."""

    async def think(self, prompt: Sequence[int], seed: int) -> AsyncIterator[str]:
        yield "<think>"
        raise ThinkingError("the engine is gone")


def test_a_budget_beyond_the_timeout_still_leaves_the_direct_answer(run: RunFolder) -> None:
    service = thinking(Service(run, settings=Settings(timeout=2.0)), CannedThinker(pause=10.0))
    answer = ask(service, mode="reasoning", budget_ms=60_000)
    assert "direct answer" in answer.fallback
    assert answer.items


@pytest.mark.parametrize("mode", ["reasoning", "merged"])
def test_an_engine_that_fails_is_said_and_direct_mode_answers(service: Service, run: RunFolder, mode: str) -> None:
    answer = ask(thinking(service, BrokenThinker()), mode=mode)
    assert answer.fallback == "the engine is gone: this is the direct answer"
    assert [item.id for item in answer.items] == [item.id for item in ask(Service(run)).items]


def test_chains_are_passed_on_as_they_are_written(service: Service) -> None:
    pieces: list[tuple[int, str]] = []
    request = RecommendRequest(history=["1"], mode="reasoning")
    served(service, lambda: service.recommend(request, lambda chain, text: pieces.append((chain, text))))
    assert len(pieces) > 5
    assert "".join(text for _, text in pieces).strip() == CHAIN


def test_a_service_that_does_not_think_says_so(run: RunFolder) -> None:
    with pytest.raises(RefusedError, match="start it with --reasoning"):
        ask(Service(run), mode="reasoning")


def test_a_cold_user_gets_no_chain(service: Service) -> None:
    answer = ask(service, history=[], mode="reasoning")
    assert "no item of the history is known" in answer.fallback
    assert (answer.chains, service.bundle(None).thinker.asked) == ([], 0)


@pytest.fixture
def own_run(tmp_path: Path) -> RunFolder:
    return RunFolder.open(make_served_run(tmp_path / "run"))


def test_a_reload_takes_up_another_checkpoint_and_a_rollback_gives_it_back(own_run: RunFolder) -> None:
    service = thinking(Service(own_run))
    old_thinker = service.bundle(None).thinker
    make_tiny_model(own_run.root / "other", service.bundle(None).recommender.index, seed=5)
    request = RecommendRequest(user="1")

    async def work() -> None:
        first = await service.recommend(request)
        assert old_thinker is service.bundle(None).thinker
        asked = [asyncio.ensure_future(service.recommend(request)) for _ in range(200)]
        old, new = await service.reload("sft", own_run.root / "other")
        asked += [asyncio.ensure_future(service.recommend(request)) for _ in range(20)]
        answers = await asyncio.gather(*asked)
        assert {answer.model for answer in answers} == {old.model, new.model}
        assert (await service.recommend(request)).model == new.model != old.model == first.model
        assert next(a.items for a in answers if a.model == old.model) == first.items
        await service.roll_back(None)
        assert (await service.recommend(request)).items == first.items
        for _ in range(3):  # older ones are closed
            await service.reload(None, own_run.root / "other")
        await asyncio.sleep(0.1)
        assert not service._closing

    served(service, work)


def test_a_grown_index_is_taken_up(own_run: RunFolder) -> None:
    service, index = Service(own_run), own_run.data.index
    sids, items = json.loads(index.read_text()), json.loads(own_run.data.item.read_text())

    async def work() -> None:
        before = service.versions(service.bundle(None)).index
        items["new"] = {"title": "A new item"}
        own_run.data.item.write_text(json.dumps(items))
        # as `gream index add` does: the text up to the last brace stays
        text = index.read_text().rstrip().removesuffix("}").rstrip()
        levels = [sorted(set(level)) for level in zip(*(sid[:3] for sid in sids.values()), strict=True)]
        taken = [sid[:3] for sid in sids.values()]
        free = next(list(sid) for sid in itertools.product(*levels) if list(sid) not in taken)
        index.write_text(f'{text},\n"new": {json.dumps(free)}\n}}\n')
        assert "new" not in service.bundle(None).recommender.index.sids
        await service.reload(None)
        assert "new" in service.bundle(None).recommender.index.sids
        assert service.versions(service.bundle(None)).index != before

    served(service, work)


@pytest.mark.parametrize("harm", ["torn", "missing", "index"])
def test_a_bad_bundle_is_refused_and_the_old_one_goes_on(own_run: RunFolder, harm: str) -> None:
    service, bad = Service(own_run), own_run.root / "bad"
    if harm != "missing":
        shutil.copytree(own_run.sft, bad)
    if harm == "torn":
        weights = bad / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1000])
    if harm == "index":
        own_run.data.index.write_text("{}")

    async def work() -> None:
        first = await service.recommend(RecommendRequest(user="1"))
        with pytest.raises(RefusedError, match="the old one goes on") as refused:
            await service.reload(None, bad)
        assert refused.value.status == 409
        assert (await service.recommend(RecommendRequest(user="1"))).items == first.items

    served(service, work)


def test_a_reload_that_fails_leaves_nothing_behind(own_run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service(own_run)
    service.settings = service.settings.model_copy(update={"reasoning": True})
    monkeypatch.setattr("gream_verl.serving.service.VllmThinker", None)  # fails when it is made
    before = {thread for thread in threading.enumerate() if thread.name == "gream-batcher"}

    async def work() -> None:
        with pytest.raises(RefusedError, match="the old one goes on"):
            await service.reload(None)
        assert {thread for thread in threading.enumerate() if thread.name == "gream-batcher"} == before

    served(service, work)


def test_two_checkpoints_of_one_name_are_refused(own_run: RunFolder) -> None:
    shutil.copytree(own_run.sft, own_run.root / "x" / "sft")
    with pytest.raises(InputError, match="two with one name"):
        Service(own_run, [own_run.sft, own_run.root / "x" / "sft"])


class SleepingThinker(CannedThinker):
    """Is not ready before it was waked twice."""

    waked = 0

    async def wake(self) -> bool:
        self.waked += 1
        return self.waked > 1


def test_asking_whether_it_is_ready_wakes_a_dead_engine(service: Service) -> None:
    thinking(service, SleepingThinker())

    async def work() -> list[bool]:
        return [await service.is_ready(), await service.is_ready()]

    assert served(service, work) == [False, True]
