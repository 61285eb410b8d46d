from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from assets import make_index
from evaluation_files import write_prompts
from hypothesis import given, settings
from hypothesis import strategies as st

from gream_verl.evaluation.floors import cooccurrence, cooccurrence_scores, evaluate_floors, popularity, recommend
from gream_verl.files import InputError

ITEMS = 6
sequences = st.lists(st.lists(st.integers(0, ITEMS - 1), max_size=9), min_size=1, max_size=5)


@given(sequences, st.integers(1, 4))
@settings(deadline=None)
def test_cooccurrence_equals_a_loop_over_all_pairs(train: list[list[int]], window: int) -> None:
    slow = np.zeros((ITEMS, ITEMS))
    for sequence in train:
        for left in range(len(sequence)):
            for right in range(left + 1, min(left + window + 1, len(sequence))):
                slow[sequence[left], sequence[right]] += 1 / (right - left)
                slow[sequence[right], sequence[left]] += 1 / (right - left)
    assert cooccurrence(train, ITEMS, window=window).toarray() == pytest.approx(slow)


@given(sequences, sequences, st.integers(1, 4))
@settings(deadline=None)
def test_scores_weigh_the_last_items_by_recency(
    train: list[list[int]], histories: list[list[int]], recent: int
) -> None:
    counts = cooccurrence(train, ITEMS)
    slow = np.zeros((len(histories), ITEMS))
    for user, history in enumerate(histories):
        for back, item in enumerate(reversed(history[-recent:]), start=1):
            slow[user] += counts.toarray()[item] / back
    assert cooccurrence_scores(counts, histories, recent=recent) == pytest.approx(slow)


def test_recommendations_leave_out_the_history_and_break_ties_as_told() -> None:
    popular = popularity([[0, 1, 1], [2, 1, 3]], ITEMS)
    assert popular.tolist() == [1, 3, 1, 1, 0, 0]
    tie_break = np.array([1.0, 2.0, 3.0, 4.0, 6.0, 5.0])
    lists = recommend(lambda chunk: np.tile(popular, (len(chunk), 1)), [[], [1], [0, 1, 2, 4]], tie_break, 3)
    assert lists == [[1, 3, 2], [3, 2, 0], [3, 5]]


def test_held_out_interactions_are_not_counted(tmp_path: Path) -> None:
    index = make_index()
    prompts = write_prompts(tmp_path / "tiny-test.parquet", index, users=4)
    inter = {str(user): ["0", "1", "2", "20", "20", "21", "21"] for user in range(50)}
    inter |= {"p": [*index.sids]}
    held_out_last = {user: [*sequence[:3], "20", "21"] for user, sequence in inter.items() if user != "p"}
    for number, content in enumerate([inter, inter | held_out_last]):
        (tmp_path / f"{number}.inter.json").write_text(json.dumps(content))
    counted = evaluate_floors(tmp_path / "0.inter.json", prompts)["popularity"].rows[0]["recommended"]
    held_out = evaluate_floors(tmp_path / "1.inter.json", prompts)["popularity"].rows[0]["recommended"]
    assert "20" in counted[:2]
    assert "20" not in held_out[:2]


def test_an_item_that_the_interactions_lack_is_named(tmp_path: Path) -> None:
    prompts = write_prompts(tmp_path / "tiny-test.parquet", make_index(), users=5)
    (tmp_path / "tiny.inter.json").write_text(json.dumps({"u": ["0", "1", "2"]}))
    with pytest.raises(InputError, match=r"item '3' is not in .*tiny.inter.json"):
        evaluate_floors(tmp_path / "tiny.inter.json", prompts)
