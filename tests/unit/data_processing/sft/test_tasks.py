"""The texts of rows. The digests in test_mix hold the bytes of every task's rows."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_data import make_data

from data_processing.sft import tasks
from data_processing.sft.tasks import (
    ITEM_TASKS,
    ITEM_TEXTS,
    LENGTH,
    REASONING,
    TARGET,
    TASKS,
    TEMPLATE,
    TITLES_SHOWN,
    Corpus,
    SftRow,
    TeacherTexts,
    Window,
    description,
    features,
)
from gream_verl.core.data_folder import Item, short_title
from gream_verl.core.prompts import FIRST_REASONING_TARGET, TEMPLATES, messages
from gream_verl.core.semantic_ids import ItemIndex, find_sids

Data = tuple[Mapping[str, Sequence[str]], dict[str, Item], ItemIndex]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = make_data(tmp_path_factory.mktemp("data"))
    items = folder.read_items()
    return folder.read_training(items), items, folder.read_index(items)


@pytest.fixture(scope="module")
def corpus(data: Data) -> Corpus:
    return Corpus(*data, history=6)


def rows(corpus: Corpus, task: str, count: int | None = None, seed: int = 0) -> list[SftRow]:
    return [corpus.row(task, *spec) for spec in corpus.draw(task, count, seed).tolist()]


def sids_in(data: Data, text: str) -> list[str]:
    """Return the items whose SIDs are in ``text``, in order."""
    return [data[2].items[sid] for sid in find_sids(text)]


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_filled_in_and_named_and_the_seed_draws_them(corpus: Corpus, task: str) -> None:
    made = rows(corpus, task)
    assert len(made) == corpus.exist(task) > 0
    for row in made:
        assert row.task == task
        assert row.user.strip()
        assert row.assistant.strip()
        assert "{" not in row.user + row.assistant
        assert bool(row.system) == (task == REASONING)
    assert rows(corpus, task, 40, 1) == rows(corpus, task, 40, 1) != rows(corpus, task, 40, 2)


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


def test_reasoning_rows_have_the_system_turn_and_every_wording_of_training(data: Data, corpus: Corpus) -> None:
    seen = set()
    for row in rows(corpus, REASONING):
        history = "".join(data[2].texts(sids_in(data, row.user)))
        template = row.user.replace(history, "{history}")
        assert messages(history, "reasoning", template) == [
            {"role": "system", "content": row.system},
            {"role": "user", "content": row.user},
        ]
        seen.add(template)
    assert seen == set(TEMPLATES["reasoning"])


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


def test_histories_in_titles_are_short_and_name_the_same_items(data: Data) -> None:
    corpus = Corpus(*data)
    for row in rows(corpus, "historyreconstruction"):
        text = row.user + row.assistant
        assert "; ".join(short_title(data[1][item].title) for item in sids_in(data, text)) in text
    assert max(row.user.count(" Story") for row in rows(corpus, "fusionseqrec")) == TITLES_SHOWN


def test_texts_of_an_item() -> None:
    text = "Vogue is the fashion authority and sets the tone for a century"
    vogue, wired = Item("Vogue is the fashion authority", text, categories=("Women",)), Item("Wired", text)
    telling, both = ITEM_TEXTS["telling_text"], ITEM_TEXTS["title_and_description"]
    assert telling(vogue) == both(vogue) == f"{text}. Women"  # the title is not said twice
    assert (telling(wired), both(wired)) == (text, f"Wired. {text}")
    assert telling(Item("Wired", "Short!")) == "Wired. Short!"
    assert both(Item("T")) == description(Item("T")) == features(Item("T")) == "T"
    assert description(Item("T", "word " * 99)) == " ".join(["word"] * 40)
    assert description(Item("T", "語" * 999)) == "語" * 320
    assert features(Item("T", brand="B", categories=("C", "D"))) == "C, D, B"


@settings(max_examples=25)
@given(st.integers(0, 200), st.integers(0, 99))
def test_windows_are_drawn_without_replacement_and_inside_the_sequence(count: int, seed: int) -> None:
    sequences = {str(length): [str(item) for item in range(length)] for length in (0, 1, 5, 28)}
    items = {str(item): Item(f"T{item}") for item in range(30)}
    corpus = Corpus(sequences, items, ItemIndex.from_codes(list(items), [(item,) for item in range(30)]), history=5)
    specs = corpus.draw("fusionseqrec", count, seed)
    assert len(specs) == min(count, 4 + 27)
    assert len(set(specs[:, TARGET].tolist())) == len(specs)
    users = np.searchsorted(corpus.starts, specs[:, TARGET], side="right") - 1
    positions = specs[:, TARGET] - corpus.starts[users]
    assert ((specs[:, LENGTH] >= 1) & (specs[:, LENGTH] <= np.minimum(positions, 5))).all()
    assert (specs[:, TEMPLATE] < len(TASKS["fusionseqrec"])).all()


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 9), max_size=6),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(0, 99),
    st.sampled_from(tasks.WINDOW_TASKS),
)
def test_every_pass_of_windows_asks_for_every_target_once(
    lengths: list[int], count: int, longest: int, seed: int, task: str
) -> None:
    sequences = {str(user): [str(item) for item in range(length)] for user, length in enumerate(lengths)}
    items = {str(item): Item(f"T{item}") for item in range(9)}
    corpus = Corpus(sequences, items, ItemIndex.from_codes(list(items), [(item,) for item in range(9)]))
    everything = sorted((user, place) for user, length in enumerate(lengths) for place in range(1, length))
    corpus._longest[task] = longest
    exist = corpus.exist(task)
    specs = corpus.draw(task, count, seed)
    phased = corpus._cut(task, np.arange(len(lengths))).T.tolist()
    assert exist == sum(-(-max(length - 1, 0) // longest) for length in lengths)
    assert len(specs) == (count if exist else 0)
    assert (specs[:, LENGTH] <= longest).all()
    for part in [phased, specs[:exist, :2].tolist()] if count >= exist else [phased]:
        asked = []
        for target, length in part:
            user = int(np.searchsorted(corpus.starts, target, side="right")) - 1
            place = target - int(corpus.starts[user])
            asked += [(user, place - back) for back in range(length)]
        assert sorted(asked) == everything


def test_windows_of_later_passes_leave_out_a_quarter_of_the_items(data: Data) -> None:
    items = list(data[1])
    corpus = Corpus({str(user): (items * 2)[user : user + 20] for user in range(50)}, *data[1:])
    specs = corpus.draw("window", 50 * 40, 0)
    shown = [len(Window(corpus, *spec).history) for spec in specs.tolist()]
    assert shown[:50] == specs[:50, LENGTH].tolist() == [19] * 50
    whole = specs[50:, LENGTH].sum()
    assert sum(shown[50:]) / whole == pytest.approx(1 - tasks.THINNING, abs=0.02)
    for spec in specs[50:].tolist():
        history, thinned = Window(corpus, *spec[:2]).history, Window(corpus, *spec).history
        assert thinned == [item for item in history if item in thinned] != []
        assert thinned == Window(corpus, *spec).history
        assert corpus.row("window", *spec).user.count("<|a_") == len(thinned)


def test_users_without_a_training_part_give_no_rows(data: Data) -> None:
    corpus = Corpus({"u": ["0"], "v": []}, *data[1:])
    assert [task for task in TASKS if task not in ITEM_TASKS and rows(corpus, task)] == []


def test_items_are_drawn_evenly(corpus: Corpus) -> None:
    drawn = Counter(corpus.draw("item2index", 150, 0)[:, TARGET].tolist())
    assert set(drawn.values()) == {2, 3}
    assert len(corpus.draw("item2index", 10_000, 0)) == 60 * 19


def test_templates_are_all_different_and_name_only_known_fields() -> None:
    assert TASKS["window"] == TASKS["seqrec"]
    questions = [question for task, templates in TASKS.items() if task != "window" for question, _ in templates]
    assert len(set(questions)) == len(questions) == 17 + 19 + 17 + 12 + 11 + 11 + 10 + 15 + 4 + 8
    of_items = {"sid", *ITEM_TEXTS}
    of_windows = of_items | {"history", "titles", "query", "preference", "taste", "chain", "first", "following"}
    for task, templates in TASKS.items():
        for template in templates:
            fields = [{field for _, field, _, _ in string.Formatter().parse(text) if field} for text in template]
            assert all(fields)
            assert set.union(*fields) <= (of_items if task in ITEM_TASKS else of_windows)


def test_texts_of_a_language_model_are_used_for_their_user_only(data: Data) -> None:
    sequences, _, index = data
    user = max(sequences, key=lambda user: len(sequences[user]))
    last = len(sequences[user]) - 1
    sentences, queries = [f"Likes number {number}." for number in range(3)], ["quiet {sid} evening", "rainy day"]
    texts = TeacherTexts({user: sentences, "nobody": ["x"]}, {user: queries})
    corpus, plain = Corpus(*data, history=6, texts=texts), Corpus(*data, history=6)
    answers = [row.assistant for row in rows(corpus, "preferenceobtain")]
    changed = [new for new, old in zip(answers, rows(plain, "preferenceobtain"), strict=True) if new != old.assistant]
    assert set(changed) == set(sentences)
    assert len(changed) == last
    pairs = zip(rows(corpus, "itemsearch"), rows(plain, "itemsearch"), strict=True)
    ((asked, before),) = [(new, old) for new, old in pairs if new != old]
    assert any(query in asked.user for query in queries)
    assert asked.assistant == before.assistant == index.text(sequences[user][last])


def test_chains_of_a_language_model_are_the_reasoning_rows(data: Data) -> None:
    sequences, _, index = data
    user = max(sequences, key=lambda user: len(sequences[user]))
    last = len(sequences[user]) - 1
    chains = {
        (user, place): f"<think>Thought {place}.</think><answer>{index.text(sequences[user][place])}</answer>"
        for place in (last, last - 1)
    }
    corpus = Corpus(*data, history=3, texts=TeacherTexts(chains={key: [chain] for key, chain in chains.items()}))
    made = rows(corpus, REASONING)
    assert len(made) == len(chains) == corpus.exist(REASONING)
    assert {row.assistant for row in made} == set(chains.values())
    row = next(row for row in made if row.assistant == chains[user, last])
    assert sids_in(data, row.user) == sequences[user][last - 3 : last]
    assert rows(corpus, "seqrec") == rows(Corpus(*data, history=3), "seqrec")
