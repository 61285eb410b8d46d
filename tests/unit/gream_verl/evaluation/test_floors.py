from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gream_verl.core.counting import cooccurrence, cooccurrence_scores, recommend
from gream_verl.evaluation.floors import evaluate_floors
from gream_verl.evaluation.prompts import Prompt

ITEMS = 6
sequences = st.lists(st.lists(st.integers(0, ITEMS - 1), max_size=9), min_size=1, max_size=5)
few = settings(deadline=None, max_examples=25)


@few
@given(sequences, st.integers(1, 4))
def test_cooccurrence_equals_a_loop_over_all_pairs(train: list[list[int]], window: int) -> None:
    slow = np.zeros((ITEMS, ITEMS))
    for sequence in train:
        for left in range(len(sequence)):
            for right in range(left + 1, min(left + window + 1, len(sequence))):
                slow[sequence[left], sequence[right]] += 1 / (right - left)
                slow[sequence[right], sequence[left]] += 1 / (right - left)
    assert cooccurrence(train, ITEMS, window=window).toarray() == pytest.approx(slow)


@few
@given(sequences, sequences, st.integers(1, 4))
def test_scores_weigh_the_last_items_by_recency(
    train: list[list[int]], histories: list[list[int]], recent: int
) -> None:
    counts = cooccurrence(train, ITEMS)
    slow = np.zeros((len(histories), ITEMS))
    for user, history in enumerate(histories):
        for back, item in enumerate(reversed(history[-recent:]), start=1):
            slow[user] += counts.toarray()[item] / back
    assert cooccurrence_scores(counts, histories, recent=recent).toarray() == pytest.approx(slow)


@few
@given(
    sequences,
    sequences,
    st.integers(1, ITEMS).flatmap(lambda candidates: st.permutations(range(candidates))),
    st.integers(1, ITEMS + 2),
    st.booleans(),
)
def test_lists_are_those_of_sorting_all_candidates(
    train: list[list[int]], histories: list[list[int]], order: list[int], k: int, drop_history: bool
) -> None:
    scores = cooccurrence_scores(cooccurrence(train, ITEMS)[:, : len(order)], histories)
    dropped: list[list[int]] = histories if drop_history else [[] for _ in histories]
    slow = [
        sorted(
            (item for item in range(len(order)) if item not in dropped[user]),
            key=lambda item, user=user: (-scores.toarray()[user, item], order.index(item)),
        )[:k]
        for user in range(len(histories))
    ]
    assert recommend(scores, dropped, np.array(order), k) == slow


@few
@given(
    train=st.lists(st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=7), min_size=1, max_size=5),
    candidates=st.sets(st.integers(0, ITEMS + 1), min_size=1),
    drop_history=st.booleans(),
)
def test_only_candidates_are_recommended_but_training_counts_all(
    tmp_path_factory: pytest.TempPathFactory, train: list[list[int]], candidates: set[int], drop_history: bool
) -> None:
    inter = {str(user): [str(item) for item in [*items, 0, 0]] for user, items in enumerate(train)}
    file = tmp_path_factory.mktemp("floors") / "D.inter.json"
    file.write_text(json.dumps(inter))
    prompts = [Prompt(user, str(min(candidates)), tuple(sequence[:-1]), [], "") for user, sequence in inter.items()]
    protocol = {"drop_history": drop_history, "split": "test"}
    floors = evaluate_floors(file, prompts, {str(item) for item in candidates}, protocol)
    popular = np.bincount([item for sequence in train for item in sequence], minlength=ITEMS + 2)
    near = cooccurrence(train, ITEMS + 2)
    assert list(floors) == ["popularity", "co-occurrence"]
    for name, evaluation in floors.items():
        assert (evaluation.settings["users"], evaluation.settings["protocol"]) == (len(prompts), protocol)
        for prompt, row in zip(prompts, evaluation.rows, strict=True):
            history = [int(item) for item in prompt.history]
            assert (row["user"], row["target"], row["history_length"]) == (prompt.user, prompt.target, len(history))
            scores = popular if name == "popularity" else cooccurrence_scores(near, [history]).toarray()[0]
            left = candidates - set(history if drop_history else ())
            found = [int(item) for item in row["recommended"]]
            assert sorted(found) == sorted(left)
            assert [scores[item] for item in found] == pytest.approx(sorted(scores[item] for item in left)[::-1])


def test_held_out_interactions_are_not_counted(tmp_path: Path) -> None:
    file = tmp_path / "D.inter.json"
    prompts = [Prompt("p", "5", ("0",), [], "")]
    firsts = []
    for end in (["20", "20", "21", "21"], ["20", "21"]):  # of these the last two are held out
        inter = {str(user): ["1", *end] for user in range(50)} | {"p": [str(item) for item in range(24)]}
        file.write_text(json.dumps(inter))
        floors = evaluate_floors(file, prompts, inter["p"], {"drop_history": True})
        firsts.append(floors["popularity"].rows[0]["recommended"][:2])
    assert firsts[0][0] == "20"
    assert "20" not in firsts[1]


def test_an_item_of_a_history_that_the_interactions_lack_counts_nothing(tmp_path: Path) -> None:
    file = tmp_path / "tiny.inter.json"
    file.write_text(json.dumps({"u": ["0", "0", "3", "1", "2"]}))
    floors = evaluate_floors(file, [Prompt("0", "0", ("4",), [], "")], ["3", "0"], {"drop_history": True})
    assert [one.rows[0]["recommended"] for one in floors.values()] == [["0", "3"]] * 2
