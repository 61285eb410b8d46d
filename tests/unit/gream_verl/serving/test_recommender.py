from __future__ import annotations

from pathlib import Path

import pytest
from serving_run import ITEMS, make_served_run

from gream_verl.core.run_folder import RunFolder
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.decoding.beam_ranker import BeamRanker
from gream_verl.evaluation.direct import evaluate_direct
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.prompts import make_prompts
from gream_verl.serving.recommender import NO_HISTORY, Ask, Recommender


def test_the_answers_are_those_of_the_evaluation_item_for_item(run: RunFolder, recommender: Recommender) -> None:
    options = EvaluationOptions()
    prompts, _ = make_prompts(run.data.inter, "direct", options, recommender.index)
    rows = evaluate_direct(run.sft, prompts, recommender.index, options).rows
    asks = [Ask(tuple(recommender.catalogue.histories[row["user"]]), k=20) for row in rows]
    for row, answer in zip(rows, recommender.recommend(asks), strict=True):
        assert recommender.catalogue.histories[row["user"]] == list(prompts[rows.index(row)].history)
        assert list(answer.scores) == row["recommended"][:20]
        assert list(answer.scores.values()) == pytest.approx(row["scores"][:20], abs=1e-4)
        assert (answer.fallback, answer.unknown) == ("", ())


def test_a_batch_of_different_questions_is_answered_as_each_alone(recommender: Recommender) -> None:
    allow = frozenset(map(str, range(9)))
    asks = [
        Ask(("1", "2")), Ask(("5",), k=3, allow=allow), Ask(("7", "no item"), exclude=frozenset({"0", "4"})),
        Ask(("2", "1"), k=3, allow=allow), Ask(()), Ask(("1",), k=40),
    ]  # fmt: skip
    for ask, together in zip(asks, recommender.recommend(asks), strict=True):
        (alone,) = recommender.recommend([ask])
        assert list(together.scores) == list(alone.scores)
        assert list(together.scores.values()) == pytest.approx(list(alone.scores.values()), abs=1e-4)
        assert not {*ask.history, *ask.exclude} & together.scores.keys()
        assert ask.allow is None or together.scores.keys() <= ask.allow
    assert recommender.recommend(asks)[2].unknown == ("no item",)


def test_items_may_all_begin_with_one_code(tmp_path: Path) -> None:
    codes = [(0, item % 4, item // 4) for item in range(ITEMS)]
    run = make_served_run(tmp_path / "run", ItemIndex.from_codes(list(map(str, range(ITEMS))), codes))
    recommender = Recommender(RunFolder.open(run))
    ranker = BeamRanker(recommender.model, recommender.tokenizer, recommender.index)  # computes prompts as a whole
    for history in (("1", "2"), ("3",), ("4", "1", "9")):
        (answer,) = recommender.recommend([Ask(history)])
        (whole,) = ranker.rank([(recommender.prompt(history, "direct"), history)])
        assert list(answer.scores) == list(whole)[:10]


def test_an_allowed_set_only_leaves_out_the_others(recommender: Recommender) -> None:
    (every,) = recommender.recommend([Ask(("1", "2"), k=24)])
    allow = frozenset(list(every.scores)[1::2])
    (some,) = recommender.recommend([Ask(("1", "2"), k=24, allow=allow)])
    assert list(some.scores) == [item for item in every.scores if item in allow]


def test_a_fallback_and_a_shortage_are_said(recommender: Recommender) -> None:
    empty, unknown, few, none = recommender.recommend(
        [
            Ask(()),
            Ask(("x", "y"), k=2),
            Ask(("1",), allow=frozenset({"1", "2", "x"})),
            Ask(("1",), allow=frozenset({"x"})),
        ]
    )
    assert empty.fallback == unknown.fallback == NO_HISTORY
    assert unknown.unknown == ("x", "y")
    assert list(empty.scores)[:2] == list(unknown.scores)
    assert list(unknown.scores.values()) == sorted(recommender.catalogue.popularity.values(), reverse=True)[:2]
    assert (list(few.scores), few.fallback) == (["2"], "")
    assert few.shortage.startswith("1 items are left")
    assert (none.scores, none.shortage[:17]) == ({}, "0 items are left ")


def test_scores_of_given_items_are_those_of_the_search(recommender: Recommender) -> None:
    (answer,) = recommender.recommend([Ask(("4", "5"), k=24)])
    scores, others = recommender.score([(["4", "5"], list(answer.scores)[::-1]), (["1"], ["2", "3"])])
    assert list(scores) == list(answer.scores)
    assert list(scores.values()) == pytest.approx(list(answer.scores.values()), abs=1e-4)
    (alone,) = recommender.score([(["1"], ["3", "2"])])
    assert others == pytest.approx(alone, abs=1e-4)


def test_the_files_of_a_model_may_change_while_it_answers(tmp_path: Path) -> None:
    recommender = Recommender(RunFolder.open(make_served_run(tmp_path / "run")))
    before = recommender.recommend([Ask(("1", "2"))])
    weights = recommender.folder / "model.safetensors"
    with weights.open("r+b") as file:  # in place, as `cp` does
        file.seek(-100_000, 2)
        file.write(b"\0" * 100_000)
    assert recommender.recommend([Ask(("1", "2"))]) == before


def test_all_items_stay_ready_whatever_is_allowed(recommender: Recommender) -> None:
    recommender.recommend([Ask(("1",))])
    made = recommender.trees["made"]
    for number in range(2, 24):
        recommender.recommend([Ask(("1",), allow=frozenset({"2", str(number)})) for number in (number, number + 40)])
    assert len(recommender._rankers) <= 32
    recommender.recommend([Ask(("1",), k=30)])
    assert recommender.trees["made"] == made + 44
