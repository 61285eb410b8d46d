from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import make_data

from data_processing.leaks import find_leak
from data_processing.sft.chain_leaks import ChainLeaks
from data_processing.sft.corpus import Corpus
from data_processing.sft.fields import LENGTH, TARGET
from data_processing.sft.rules import NOTES, WORDINGS, RuleTeacher, short_title
from data_processing.sft.tasks import REASONING, TASKS
from gream_verl.core.data_folder import DataFolder, Item
from gream_verl.core.semantic_ids import ItemIndex

Sequences = Mapping[str, Sequence[str]]
BEAUTY = Path(__file__).parents[5] / "shared" / "data" / "beauty2014"


def both_ways(
    sequences: Sequences, items: Mapping[str, Item], index: ItemIndex, rows: int = sys.maxsize, wording: str = NOTES
) -> list[tuple[str | None, str | None]]:
    """Return what is found in every chain by rule, and what the check of one chain alone finds."""
    corpus, teacher = Corpus(sequences, items, index, wording=wording), RuleTeacher(items, index, wording)
    specs = TASKS[REASONING].draw(corpus, rows, np.random.default_rng(0))
    expected = []
    for target, length in specs[:, [TARGET, LENGTH]].tolist():
        *history, item = (corpus.keys[number] for number in corpus.sequence[target - length : target + 1])
        expected.append(
            find_leak(
                teacher.chain(history, item),
                title=items[item].title,
                sid=index.sids[item],
                history_titles=[short_title(items[past].title) for past in history],
                history_sids={index.sids[past] for past in history},
            )
        )
    return list(zip(ChainLeaks(corpus).find(specs), expected, strict=True))


def catalogue(titles: Sequence[str], categories: Sequence[tuple[str, ...]]) -> tuple[dict[str, Item], ItemIndex]:
    items = {
        str(number): Item(title, categories=names)
        for number, (title, names) in enumerate(zip(titles, categories, strict=True))
    }
    return items, ItemIndex.from_codes(list(items), [(number,) for number in range(len(items))])


def users(items: Mapping[str, Item], count: int = 20) -> dict[str, list[str]]:
    generator = np.random.default_rng(len(items))
    return {str(user): generator.choice(list(items), 8).tolist() for user in range(count)}


# Titles that are, nearly are, contain or overlap what chains say.
TITLES = [
    "War",
    "War (1990)",
    "Western Drama",
    "Westren Drama!",
    "ウォー",
    "last War preference",
    "Crime 2",
    "M",
    "???",
]
TITLES += ["Likes War", "Evidence", "the same kind", "Drama of", "War last", "Something close to the lost"]
TITLES += ["<|a_1|>", "(Crime)"]
NAMES = ["War", "Western", "Drama", "Western Drama", "Crime", "ウォー", "é", "---", "Documentaries of Evidence"]


@pytest.mark.parametrize("wording", WORDINGS)
def test_what_is_found_is_what_the_check_of_one_chain_finds(wording: str) -> None:
    for marked in (False, True):
        titles = [title for title in TITLES if marked or "<" not in title]
        found = []
        for turn in range(len(NAMES)):
            names = [(NAMES[(place + turn) % 9], NAMES[place * (turn + 2) % 9]) for place in range(len(titles))]
            items, index = catalogue(titles, [tuple(dict.fromkeys(pair)) for pair in names])
            found += both_ways(users(items), items, index, wording=wording)
        assert all(fast == slow for fast, slow in found)
        assert len({leak for leak, _ in found}) == 2
        assert 20 < sum(leak is not None for leak, _ in found) < len(found) / 2


letters = st.text("abé (", min_size=1, max_size=12)


@given(st.lists(letters.filter(str.strip), min_size=3, max_size=8), st.lists(letters.filter(str.strip), min_size=1))
def test_the_quick_test_loses_nothing(titles: list[str], names: list[str]) -> None:
    categories = [(names[number % len(names)],) for number in range(len(titles))]
    items, index = catalogue(titles, categories)
    assert all(fast == slow for fast, slow in both_ways(users(items, 3), items, index))


def test_given_chains_are_checked_one_by_one(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    items = folder.read_items()
    sequences, index = folder.read_training(items), folder.read_index(items)
    user = max(sequences, key=lambda user: len(sequences[user]))
    chains = {}
    for position, thought in ((4, "They like drama."), (5, items[sequences[user][5]].title), (6, "x")):
        item = index.text(sequences[user][position])
        chains[user, position] = f"<think>{thought}</think>{item * (position == 6)}<answer>{item}</answer>"
    corpus = Corpus(sequences, items, index, chains=chains)
    specs = TASKS[REASONING].draw(corpus, 9, np.random.default_rng(0))
    found = dict(zip(specs[:, TARGET].tolist(), ChainLeaks(corpus).find(specs), strict=True))
    assert [found[target] for target in sorted(found)] == [None, "title", "sid"]


@pytest.mark.skipif(not BEAUTY.is_dir(), reason="needs ../shared/data/beauty2014")
def test_real_titles_give_the_same_leaks() -> None:
    folder = DataFolder(BEAUTY, "Beauty")
    items = folder.read_items()
    codes = np.stack(np.unravel_index(np.random.default_rng(0).permutation(2**16)[: len(items)], (256, 256)), axis=1)
    index = ItemIndex.from_codes(list(items), codes.tolist())
    assert all(fast == slow for fast, slow in both_ways(folder.read_training(items), items, index, rows=20_000))
