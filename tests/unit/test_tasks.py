from __future__ import annotations

import string
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import make_data

from data_processing.layout import Item
from data_processing.sft import prompts
from data_processing.sft.tasks import REASONING, TASKS, Corpus, Row, draw_items, draw_windows
from gream_verl.next_item import FIRST_REASONING_TARGET, TEMPLATES, messages
from gream_verl.semantic_ids import ItemIndex, find_tokens

ITEM_TASKS = ("item2index", "index2item", "itemfeatureobtain")
USER_TASKS = tuple(task for task in TASKS if task not in ITEM_TASKS)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = make_data(tmp_path_factory.mktemp("data"))
    items = folder.read_items()
    return Corpus(folder.read_inter(items), items, folder.read_index(items), history=6)


def rows(corpus: Corpus, task: str, count: int = 10_000, seed: int = 0) -> list[Row]:
    specs = TASKS[task].draw(corpus, count, np.random.default_rng(seed))
    return [TASKS[task].render(corpus, spec) for spec in specs.tolist()]


def sids_in(corpus: Corpus, text: str) -> list[str]:
    """Return the items whose SIDs stand in ``text``, in order."""
    found: list[list[str]] = []
    for token in find_tokens(text):
        if token.startswith("<|a_"):
            found.append([])
        found[-1].append(token)
    return [corpus.index.items[tuple(sid)] for sid in found]


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_filled_in_and_named(corpus: Corpus, task: str) -> None:
    made = rows(corpus, task)
    assert made
    for row in made:
        assert row.task == task
        assert row.user.strip()
        assert row.assistant.strip()
        assert "{" not in row.user + row.assistant
        assert bool(row.system) == (task == REASONING)


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_rows_and_another_seed_others(corpus: Corpus, task: str) -> None:
    assert rows(corpus, task, 40, 1) == rows(corpus, task, 40, 1)
    assert rows(corpus, task, 40, 1) != rows(corpus, task, 40, 2)


@pytest.mark.parametrize("task", USER_TASKS)
def test_held_out_interactions_are_in_no_row_by_sid_or_title(corpus: Corpus, task: str) -> None:
    held_out = [str(number) for number in range(50, 60)]
    assert all(item in held_out for sequence in corpus.sequences.values() for item in sequence[-2:])
    for row in rows(corpus, task):
        text = row.system + row.user + row.assistant
        for item in held_out:
            assert corpus.index.text(item) not in text
            assert corpus.items[item].title.casefold() not in text.casefold()


@pytest.mark.parametrize("task", ["seqrec", REASONING])
def test_history_and_target_follow_each_other_in_the_training_part_of_a_user(corpus: Corpus, task: str) -> None:
    windows = {
        (tuple(sequence[start:position]), sequence[position])
        for sequence in corpus.training
        for position in range(len(sequence))
        for start in range(max(position - 6, 0), position)
    }
    made = rows(corpus, task)
    asked = [(tuple(sids_in(corpus, row.user)), sids_in(corpus, row.assistant)[-1]) for row in made]
    assert set(asked) <= windows
    first = FIRST_REASONING_TARGET if task == REASONING else 1
    assert len(made) == sum(max(len(sequence) - first, 0) for sequence in corpus.training)


def test_half_of_seqrec_uses_the_prompt_of_evaluation(corpus: Corpus) -> None:
    made = rows(corpus, "seqrec")
    start, end = TEMPLATES["direct"][0].split("{history}")
    canonical = [row for row in made if row.user.startswith(start) and row.user.endswith(end)]
    assert 0.35 < len(canonical) / len(made) < 0.7
    shown = corpus.sids(sids_in(corpus, canonical[0].user))
    assert messages(shown, "direct") == [{"role": "user", "content": canonical[0].user}]


def test_item_tasks_map_an_item_to_itself(corpus: Corpus) -> None:
    for row in rows(corpus, "item2index"):
        (item,) = sids_in(corpus, row.assistant)
        assert corpus.items[item].title in row.user
    for row in rows(corpus, "index2item"):
        (item,) = sids_in(corpus, row.user)
        assert row.assistant in (corpus.items[item].title, corpus.description(item))
    for row in rows(corpus, "itemfeatureobtain"):
        (item,) = sids_in(corpus, row.user + row.assistant)
        assert corpus.features(item) in row.user + row.assistant


def test_history_reconstruction_names_the_same_items_on_both_sides(corpus: Corpus) -> None:
    for row in rows(corpus, "historyreconstruction"):
        assert corpus.titles(sids_in(corpus, row.user + row.assistant)) in row.user + row.assistant


def test_a_telling_description_may_stand_for_an_item_and_a_borrowed_title_is_not_said_twice() -> None:
    text = "Vogue is the fashion authority and sets the tone for a century"
    items = {"v": Item("Vogue is the fashion authority", text, categories=("Women",)), "w": Item("Wired", text)}
    corpus = Corpus({}, items, ItemIndex.from_codes(["v", "w"], [(0,), (1,)]))
    made = rows(corpus, "item2index")
    assert any("Wired" not in row.user for row in made if row.assistant == "<|a_2|>")
    assert any(f"Wired. {text}" in row.user for row in made)
    assert all(row.user.count("fashion") == 1 for row in made if row.assistant == "<|a_1|>")
    assert any(f"{text}. Women" in row.user for row in made)


@given(st.integers(0, 200), st.integers(0, 99))
def test_windows_are_drawn_without_replacement_and_inside_the_training_part(count: int, seed: int) -> None:
    sequences = {str(length): [str(item) for item in range(length)] for length in (0, 1, 2, 3, 7, 30)}
    items = {str(item): Item(f"T{item}") for item in range(30)}
    corpus = Corpus(sequences, items, ItemIndex.from_codes(list(items), [(item,) for item in range(30)]), history=5)
    specs = draw_windows(corpus, count, np.random.default_rng(seed), templates=3)
    assert len(specs) == min(count, 4 + 27)
    assert len({(user, position) for user, position, _, _ in specs.tolist()}) == len(specs)
    for user, position, length, template in specs.tolist():
        assert 1 <= length <= min(position, 5)
        assert position < len(list(sequences.values())[user]) - 2
        assert template < 3


def test_users_without_a_training_part_give_no_windows(corpus: Corpus) -> None:
    short = Corpus({"u": ["0", "1", "2"]}, corpus.items, corpus.index)
    assert draw_windows(short, 5, np.random.default_rng(0), templates=2).shape == (0, 4)
    assert rows(short, REASONING) == []


def test_items_are_drawn_evenly(corpus: Corpus) -> None:
    drawn = Counter(draw_items(corpus, 150, np.random.default_rng(0), templates=3)[:, 0].tolist())
    assert set(drawn.values()) == {2, 3}
    assert len(draw_items(corpus, 10_000, np.random.default_rng(0), templates=3)) == 180


def templates() -> list[str]:
    groups = (prompts.INDEX_TO_ITEM, prompts.FUSION, prompts.ITEM_SEARCH, prompts.FEATURES, prompts.RECONSTRUCTION)
    flat = [*TEMPLATES["direct"], *prompts.ITEM_TO_INDEX, *prompts.PREFERENCE, *TEMPLATES["reasoning"]]
    return flat + [template for group in groups for kind in group.values() for template in kind]


def test_templates_are_all_different_and_name_only_known_fields() -> None:
    assert len(set(templates())) == len(templates()) == 17 + 19 + 17 + 12 + 11 + 11 + 10 + 15 + 1
    known = {"history", "titles", "sid", "text", "query", "preference"}
    for template in templates():
        fields = {field for _, field, _, _ in string.Formatter().parse(template) if field}
        assert fields
        assert fields <= known


def test_the_prompts_of_evaluation_are_those_that_are_trained(corpus: Corpus) -> None:
    reasoning = rows(corpus, REASONING)[0]
    asked = messages(corpus.sids(sids_in(corpus, reasoning.user)), "reasoning")
    assert [turn["content"] for turn in asked] == [reasoning.system, reasoning.user]
