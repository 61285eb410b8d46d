from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gream_verl.core.errors import InputError
from gream_verl.evaluation.floors import cooccurrence, cooccurrence_scores, evaluate_floors, popularity, recommend
from gream_verl.evaluation.prompts import Prompt

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
    assert cooccurrence_scores(counts, histories, recent=recent).toarray() == pytest.approx(slow)


@given(
    sequences,
    sequences,
    st.integers(1, ITEMS).flatmap(lambda candidates: st.permutations(range(candidates))),
    st.integers(1, ITEMS + 2),
    st.booleans(),
)
@settings(deadline=None)
def test_lists_are_those_of_sorting_all_candidates(
    train: list[list[int]], histories: list[list[int]], order: list[int], k: int, drop_history: bool
) -> None:
    counts = cooccurrence(train, ITEMS)
    scores = cooccurrence_scores(counts, histories).toarray()
    counts = counts[:, : len(order)]
    slow = [
        sorted(
            (item for item in range(len(order)) if not (drop_history and item in history)),
            key=lambda item, user=user: (-scores[user, item], order.index(item)),
        )[:k]
        for user, history in enumerate(histories)
    ]
    found = recommend(
        lambda chunk: cooccurrence_scores(counts, chunk), histories, np.array(order), k, drop_history=drop_history
    )
    assert found == slow


def test_popularity_is_counted_with_repetitions() -> None:
    assert popularity([[0, 1, 1], [2, 1, 3]], ITEMS).tolist() == [1, 3, 1, 1, 0, 0]


@pytest.fixture
def prompts() -> list[Prompt]:
    """Users with histories of 1 to 5 items."""
    return [
        Prompt(str(user), str(user + 5), tuple(str(user + step) for step in range(1 + user % 5)), [], "")
        for user in range(8)
    ]


def write_interactions(path: Path, sequences: dict[str, list[str]]) -> Path:
    path.write_text(json.dumps(sequences))
    return path


def test_held_out_interactions_are_not_counted(tmp_path: Path, prompts: list[Prompt]) -> None:
    inter = {str(user): ["0", "1", "2", "20", "20", "21", "21"] for user in range(50)}
    inter |= {"p": [str(item) for item in range(24)]}
    held_out_last = {user: [*sequence[:3], "20", "21"] for user, sequence in inter.items() if user != "p"}
    files = [
        write_interactions(tmp_path / f"{number}.inter.json", content)
        for number, content in enumerate([inter, inter | held_out_last])
    ]
    counted, held_out = (evaluate_floors(file, prompts)["popularity"].rows[0]["recommended"] for file in files)
    assert "20" in counted[:2]
    assert "20" not in held_out[:2]


@pytest.mark.parametrize("drop_history", [True, False])
def test_the_protocol_decides_on_the_history_and_is_kept(
    tmp_path: Path, prompts: list[Prompt], drop_history: bool
) -> None:
    inter = {str(user): [str((user + step) % 24) for step in range(9)] for user in range(24)}
    protocol = {"drop_history": drop_history, "users_in_file": 99, "split": "test"}
    floors = evaluate_floors(write_interactions(tmp_path / "t.inter.json", inter), prompts, protocol=protocol, k=24)
    assert list(floors) == ["popularity", "co-occurrence"]
    for evaluation in floors.values():
        assert (evaluation.settings["users"], evaluation.settings["users_in_file"]) == (8, 99)
        assert evaluation.settings["protocol"] == protocol
        for row, prompt in zip(evaluation.rows, prompts, strict=True):
            assert (row["user"], row["target"]) == (prompt.user, prompt.target)
            assert row["history_length"] == len(prompt.history)
            dropped = set(prompt.history) if drop_history else set()
            assert sorted(row["recommended"]) == sorted({str(item) for item in range(24)} - dropped)


@given(
    train=st.lists(st.lists(st.integers(0, ITEMS - 1), min_size=1, max_size=7), min_size=1, max_size=5),
    candidates=st.sets(st.integers(0, ITEMS + 1), min_size=1),
    drop_history=st.booleans(),
)
@settings(deadline=None, max_examples=40)
def test_only_candidates_are_recommended_but_training_counts_all(
    tmp_path_factory: pytest.TempPathFactory, train: list[list[int]], candidates: set[int], drop_history: bool
) -> None:
    inter = {str(user): [str(item) for item in [*items, 0, 0]] for user, items in enumerate(train)}
    file = write_interactions(tmp_path_factory.mktemp("floors") / "D.inter.json", inter)
    prompts = [Prompt(user, str(min(candidates)), tuple(sequence[:-1]), [], "") for user, sequence in inter.items()]
    floors = evaluate_floors(
        file, prompts, items=[str(item) for item in candidates], protocol={"drop_history": drop_history}
    )
    popular = popularity(train, ITEMS + 2)
    near = cooccurrence(train, ITEMS + 2)
    for name, evaluation in floors.items():
        for prompt, row in zip(prompts, evaluation.rows, strict=True):
            history = [int(item) for item in prompt.history]
            scores = popular if name == "popularity" else cooccurrence_scores(near, [history]).toarray()[0]
            left = candidates - set(history if drop_history else ())
            found = [int(item) for item in row["recommended"]]
            assert sorted(found) == sorted(left)
            assert [scores[item] for item in found] == pytest.approx(sorted(scores[item] for item in left)[::-1])


def test_naming_the_items_of_the_interactions_changes_nothing(tmp_path: Path, prompts: list[Prompt]) -> None:
    inter = {str(user): [str((user * user + step) % 24) for step in range(9)] for user in range(24)}
    file = write_interactions(tmp_path / "t.inter.json", inter)
    items = {str(item): ("<|a_1|>",) for item in reversed(range(24))}
    assert evaluate_floors(file, prompts, items=items) == evaluate_floors(file, prompts)


def test_an_item_that_the_interactions_lack_is_named(tmp_path: Path, prompts: list[Prompt]) -> None:
    inter = write_interactions(tmp_path / "tiny.inter.json", {"u": ["0", "1", "2"]})
    with pytest.raises(InputError, match=r"item '3' is not in .*tiny.inter.json"):
        evaluate_floors(inter, prompts)
    with pytest.raises(InputError, match=r"item '4' is not in .*tiny.inter.json"):
        evaluate_floors(inter, prompts, items=["0", "3"])
