from __future__ import annotations

import importlib.util
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import make_data
from wheel_build import ROOT

from data_processing.sft import prompts
from data_processing.sft.corpus import Corpus, description, features
from data_processing.sft.fields import LENGTH, TARGET, TEMPLATE, TITLES_SHOWN
from data_processing.sft.rules import RuleTeacher, short_title
from data_processing.sft.tasks import REASONING, TASKS, Renderer, Row, draw_items, draw_windows
from gream_verl.core.data_folder import Item
from gream_verl.core.prompts import FIRST_REASONING_TARGET, TEMPLATES, messages
from gream_verl.core.semantic_ids import ItemIndex, find_sids

ITEM_TASKS = ("item2index", "index2item", "itemfeatureobtain")
USER_TASKS = tuple(task for task in TASKS if task not in ITEM_TASKS)
EVERYTHING = 10_000

Data = tuple[Mapping[str, Sequence[str]], dict[str, Item], ItemIndex]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = make_data(tmp_path_factory.mktemp("data"))
    items = folder.read_items()
    return folder.read_training(items), items, folder.read_index(items)


@pytest.fixture(scope="module")
def corpus(data: Data) -> Corpus:
    return Corpus(*data, history=6)


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    """The benchmark, which holds the readable definition of every row."""
    spec = importlib.util.spec_from_file_location("data_tasks", ROOT / "benchmarks" / "data_tasks.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(corpus: Corpus, task: str, count: int = EVERYTHING, seed: int = 0) -> list[Row]:
    specs = TASKS[task].draw(corpus, count, np.random.default_rng(seed))
    return Renderer(corpus, [task]).rows(np.zeros(len(specs), np.int64), specs)


def sids_in(data: Data, text: str) -> list[str]:
    """Return the items whose SIDs stand in ``text``, in order."""
    return [data[2].items[sid] for sid in find_sids(text)]


def small_index(keys: list[str]) -> ItemIndex:
    return ItemIndex.from_codes(keys, [(number // 7, number % 7) for number in range(len(keys))])


def awkward_data() -> Data:
    """Items with no traits, one, many and the same twice; letters outside of ASCII; braces; users of every length."""
    names = ["Käse", "{history}", "三", "Rock & Roll", "a, b", "%s", "\\", "Neo–Noir"]
    items = {
        f"k{number}": Item(
            title=f"{names[number % 8]}, {{sid}} {number}; " + "wort " * (number % 12),
            description="" if number % 3 else f"Über {names[number % 5]}. " + "so ein Satz " * (number % 20),
            brand="" if number % 4 else f"Brand {{{number}}}",
            categories=() if number % 5 == 1 else tuple(names[(number * step) % 8] for step in range(number % 6)),
        )
        for number in range(40)
    }
    generator = np.random.default_rng(3)
    sequences = {
        f"u{length}-{turn}": [f"k{item}" for item in generator.integers(40, size=length)]
        for length in range(14)
        for turn in range(5)
    }
    return sequences, items, small_index(list(items))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("awkward", [False, True])
def test_every_row_is_what_the_readable_definition_says(
    data: Data, benchmark: ModuleType, task: str, awkward: bool
) -> None:
    given = awkward_data() if awkward else data
    corpus, plain = Corpus(*given, history=9), benchmark.PlainCorpus(*given)
    for seed in range(4):
        specs = TASKS[task].draw(corpus, EVERYTHING, np.random.default_rng(seed))
        made = Renderer(corpus, [task]).rows(np.zeros(len(specs), np.int64), specs)
        expected = [plain.row(task, *spec) for spec in benchmark.plain_specs(corpus, task, specs)]
        assert [(row.user, row.assistant) for row in made] == expected
        assert len(made) > 30


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


def test_tasks_are_rendered_together_each_row_in_its_place(corpus: Corpus) -> None:
    tasks = list(TASKS)
    specs = [TASKS[task].draw(corpus, 20, np.random.default_rng(0)) for task in tasks]
    kinds = np.random.default_rng(1).permutation(np.repeat(np.arange(len(tasks)), 20))
    mixed = np.zeros((len(kinds), 3), np.int32)
    for kind, of_task in enumerate(specs):
        mixed[kinds == kind] = of_task
    made = Renderer(corpus, tasks).rows(kinds, mixed)
    for task in tasks:
        assert [row for row in made if row.task == task] == rows(corpus, task, 20)


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_rows_and_another_seed_others(corpus: Corpus, task: str) -> None:
    assert rows(corpus, task, 40, 1) == rows(corpus, task, 40, 1)
    assert rows(corpus, task, 40, 1) != rows(corpus, task, 40, 2)


@pytest.mark.parametrize("task", TASKS)
def test_as_many_rows_exist_as_can_be_drawn(corpus: Corpus, task: str) -> None:
    assert len(rows(corpus, task)) == TASKS[task].exist(corpus)


def test_chains_in_sentences_are_those_of_the_rules(data: Data) -> None:
    corpus, teacher = Corpus(*data, history=6, wording="sentences"), RuleTeacher(*data[1:], "sentences")
    specs = TASKS[REASONING].draw(corpus, 50, np.random.default_rng(0))
    for row, (target, length, _) in zip(rows(corpus, REASONING, 50), specs.tolist(), strict=True):
        *history, item = (corpus.keys[number] for number in corpus.sequence[target - length : target + 1])
        assert row.assistant == teacher.chain(history, item)


@pytest.mark.parametrize("task", ["seqrec", REASONING])
def test_history_and_target_follow_each_other_in_the_training_part_of_a_user(
    data: Data, corpus: Corpus, task: str
) -> None:
    parts = list(data[0].values())
    windows = {
        (tuple(sequence[start:position]), sequence[position])
        for sequence in parts
        for position in range(len(sequence))
        for start in range(max(position - 6, 0), position)
    }
    made = rows(corpus, task)
    asked = [(tuple(sids_in(data, row.user)), sids_in(data, row.assistant)[-1]) for row in made]
    assert set(asked) <= windows
    first = FIRST_REASONING_TARGET if task == REASONING else 1
    assert len(made) == sum(max(len(sequence) - first, 0) for sequence in parts)


def test_half_of_seqrec_uses_the_prompt_of_evaluation(data: Data, corpus: Corpus) -> None:
    made = rows(corpus, "seqrec")
    start, end = TEMPLATES["direct"][0].split("{history}")
    canonical = [row for row in made if row.user.startswith(start) and row.user.endswith(end)]
    assert 0.35 < len(canonical) / len(made) < 0.7
    shown = "".join(data[2].texts(sids_in(data, canonical[0].user)))
    assert messages(shown, "direct") == [{"role": "user", "content": canonical[0].user}]


def test_item_tasks_map_an_item_to_itself(data: Data, corpus: Corpus) -> None:
    items = data[1]
    for row in rows(corpus, "item2index"):
        (item,) = sids_in(data, row.assistant)
        assert items[item].title in row.user
    for row in rows(corpus, "index2item"):
        (item,) = sids_in(data, row.user)
        assert row.assistant in (items[item].title, description(items[item]))
    for row in rows(corpus, "itemfeatureobtain"):
        (item,) = sids_in(data, row.user + row.assistant)
        assert features(items[item]) in row.user + row.assistant


def test_history_reconstruction_names_the_same_items_on_both_sides(data: Data, corpus: Corpus) -> None:
    for row in rows(corpus, "historyreconstruction"):
        text = row.user + row.assistant
        assert "; ".join(short_title(data[1][item].title) for item in sids_in(data, text)) in text


def test_a_history_in_titles_is_short(data: Data) -> None:
    for row in rows(Corpus(*data), "fusionseqrec"):
        assert row.user.count(" Story") <= TITLES_SHOWN
    assert any(row.user.count(" Story") == TITLES_SHOWN for row in rows(Corpus(*data), "fusionseqrec"))


def test_a_telling_description_may_stand_for_an_item_and_a_borrowed_title_is_not_said_twice() -> None:
    text = "Vogue is the fashion authority and sets the tone for a century"
    items = {"v": Item("Vogue is the fashion authority", text, categories=("Women",)), "w": Item("Wired", text)}
    made = rows(Corpus({}, items, ItemIndex.from_codes(["v", "w"], [(0,), (1,)])), "item2index")
    assert any("Wired" not in row.user for row in made if row.assistant == "<|a_2|>")
    assert any(f"Wired. {text}" in row.user for row in made)
    assert all(row.user.count("fashion") == 1 for row in made if row.assistant == "<|a_1|>")
    assert any(f"{text}. Women" in row.user for row in made)


@given(st.integers(0, 200), st.integers(0, 99))
def test_windows_are_drawn_without_replacement_and_inside_the_training_part(count: int, seed: int) -> None:
    sequences = {str(length): [str(item) for item in range(length)] for length in (0, 1, 5, 28)}
    items = {str(item): Item(f"T{item}") for item in range(30)}
    corpus = Corpus(sequences, items, small_index(list(items)), history=5)
    specs = draw_windows(corpus, count, np.random.default_rng(seed), templates=3)
    assert len(specs) == min(count, 4 + 27)
    assert len(set(specs[:, TARGET].tolist())) == len(specs)
    users = np.searchsorted(corpus.starts, specs[:, TARGET], side="right") - 1
    positions = specs[:, TARGET] - corpus.starts[users]
    lengths = np.array([len(sequence) for sequence in sequences.values()])[users]
    assert (positions < lengths).all()
    assert ((specs[:, LENGTH] >= 1) & (specs[:, LENGTH] <= np.minimum(positions, 5))).all()
    assert (specs[:, TEMPLATE] < 3).all()


@pytest.mark.parametrize("task", USER_TASKS)
def test_users_without_a_training_part_give_no_rows(data: Data, task: str) -> None:
    assert rows(Corpus({"u": ["0"], "v": []}, *data[1:]), task) == []


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


def test_the_prompts_of_evaluation_are_those_that_are_trained(data: Data, corpus: Corpus) -> None:
    reasoning = rows(corpus, REASONING)[0]
    asked = messages("".join(data[2].texts(sids_in(data, reasoning.user))), "reasoning")
    assert [turn["content"] for turn in asked] == [reasoning.system, reasoning.user]


def llm_data(data: Data) -> tuple[str, int, dict[tuple[str, int], str]]:
    """Return a user with a long history, the position of its last item, and chains for its last two."""
    sequences, _, index = data
    user = max(sequences, key=lambda user: len(sequences[user]))
    last = len(sequences[user]) - 1
    chains = {
        (user, position): f"<think>Thought {position}.</think>{index.text(sequences[user][0])}"
        f"<answer>{index.text(sequences[user][position])}</answer>"
        for position in (last, last - 1)
    }
    return user, last, chains


def test_what_a_language_model_wrote_of_a_user_is_used_for_that_user_only(data: Data) -> None:
    sequences, _, index = data
    user, last, _ = llm_data(data)
    sentences, queries = [f"Likes number {number}." for number in range(3)], ["quiet {sid} evening", "rainy day"]
    corpus = Corpus(*data, history=6, preferences={user: sentences, "nobody": ["x"]}, queries={user: queries})
    plain = Corpus(*data, history=6)
    answers = [row.assistant for row in rows(corpus, "preferenceobtain")]
    changed = [new for new, old in zip(answers, rows(plain, "preferenceobtain"), strict=True) if new != old.assistant]
    assert set(changed) == set(sentences)
    assert len(changed) == last

    pairs = zip(rows(corpus, "itemsearch"), rows(plain, "itemsearch"), strict=True)
    ((asked, before),) = [(new, old) for new, old in pairs if new != old]
    assert any(query in asked.user for query in queries)
    assert asked.assistant == before.assistant == index.text(sequences[user][last])


def test_given_chains_are_the_reasoning_rows(data: Data) -> None:
    sequences = data[0]
    user, last, chains = llm_data(data)
    corpus = Corpus(*data, history=3, chains=chains)
    made = rows(corpus, REASONING)
    assert {row.assistant for row in made} == set(chains.values())
    assert len(made) == len(chains) == TASKS[REASONING].exist(corpus)
    row = next(row for row in made if row.assistant == chains[user, last])
    assert sids_in(data, row.user) == sequences[user][last - 3 : last]
    assert row.system
    assert len(rows(corpus, REASONING, 1)) == 1
    assert rows(corpus, "seqrec") == rows(Corpus(*data, history=3), "seqrec")
