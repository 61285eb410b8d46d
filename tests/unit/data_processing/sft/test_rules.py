from __future__ import annotations

import re
from pathlib import Path

import pytest
from small_data import GENRES, make_data

from data_processing.sft.rules import KEPT, RuleTeacher, Wording
from gream_verl.core.data_folder import Item
from gream_verl.core.semantic_ids import parse_sid

RESPONSE = re.compile(r"<think>[^<]+</think>((?:<\|[a-z]_\d+\|>)+)<answer>((?:<\|[a-z]_\d+\|>)+)</answer>")


ITEMS = {
    "alien": Item("Alien", categories=("Films", "Horror", "Sci-Fi")),
    "fargo": Item("Fargo", categories=("Films", "Crime", "Drama")),
    "heat": Item("Heat", categories=("Films", "Crime", "Thriller")),
    "jaws": Item("Jaws", categories=("Films", "Thriller")),
    "plain": Item("Plain"),
    "vogue": Item("Vogue", brand="Conde Nast"),
}


def rules(items: dict[str, Item], wording: Wording = "notes") -> RuleTeacher:
    return RuleTeacher(items, {key: f"<|a_{n}|><|b_1|><|c_1|>" for n, key in enumerate(items, start=1)}, wording)


@pytest.fixture
def teacher() -> RuleTeacher:
    return rules(ITEMS)


def test_a_chain_says_evidence_preference_and_intent_then_keeps_what_speaks_for_it(teacher: RuleTeacher) -> None:
    assert teacher.chain(["alien", "fargo", "heat"], "jaws") == (
        "<think>Evidence: Crime 2, Horror 1, Sci-Fi 1 of 3; last Heat. Preference: Crime and Horror. "
        "Intent: Thriller.</think><|a_1|><|b_1|><|c_1|><|a_2|><|b_1|><|c_1|><|a_3|><|b_1|><|c_1|>"
        "<answer><|a_4|><|b_1|><|c_1|></answer>"
    )


def test_a_chain_can_be_written_in_sentences() -> None:
    teacher = rules(ITEMS, "sentences")
    assert teacher.chain(["alien", "fargo", "heat"], "jaws").startswith(
        "<think>Evidence: of the 3 items in this history, 2 are Crime, 1 Horror, 1 Sci-Fi; the latest is Heat. "
        "Preference: this user likes Crime and Horror. Intent: the next item should be Thriller.</think>"
    )
    assert teacher.chain(["plain"], "plain").startswith(
        "<think>Evidence: the latest item in this history is Plain. Preference: this user likes more of the same kind. "
        "Intent: the next item should be close to the latest.</think>"
    )


def test_a_category_of_nearly_all_items_is_not_evidence() -> None:
    items = {str(number): Item(f"T{number}", categories=("Root", GENRES[number % 5])) for number in range(10)}
    assert "Root" not in rules(items).chain(["0", "1"], "2")


def test_the_intent_is_the_targets_category_that_the_history_has_most(teacher: RuleTeacher) -> None:
    assert "Intent: Thriller." in teacher.chain(["jaws", "jaws", "fargo"], "heat")
    assert "Intent: Crime." in teacher.chain(["alien"], "heat")
    assert "Intent: something close" in teacher.chain(["fargo"], "plain")


def test_the_denoised_history_is_short_recent_and_in_order(teacher: RuleTeacher) -> None:
    history = ["plain", "fargo"] * 6
    assert f"</think>{'<|a_2|><|b_1|><|c_1|>' * KEPT}<answer>" in teacher.chain(history, "heat")
    history = ["plain"] * 9  # nothing to choose by
    assert f"</think>{'<|a_5|><|b_1|><|c_1|>' * KEPT}<answer>" in teacher.chain(history, "plain")


def test_the_preference_is_the_most_frequent_traits_or_the_last_title(teacher: RuleTeacher) -> None:
    assert teacher.preference(["alien", "fargo", "heat"]) == "Crime, Horror, Sci-Fi"
    assert teacher.preference(["vogue", "plain"]) == "Conde Nast"
    assert teacher.preference(["plain"]) == "Plain"


def test_items_without_categories_work(teacher: RuleTeacher) -> None:
    assert teacher.chain(["plain"], "plain") == (
        "<think>Evidence: last Plain. Preference: more of the same kind. Intent: something close to the last.</think>"
        "<|a_5|><|b_1|><|c_1|><answer><|a_5|><|b_1|><|c_1|></answer>"
    )
    assert "Conde Nast 2 of 2" in teacher.chain(["vogue", "vogue"], "vogue")


def test_every_chain_of_a_data_set_has_the_form_and_the_answer(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    items = folder.read_items()
    index = folder.read_index(items)
    teacher = RuleTeacher(items, {item: index.text(item) for item in items})
    for sequence in folder.read_inter(items).values():
        for position in range(1, len(sequence)):
            match = RESPONSE.fullmatch(teacher.chain(sequence[:position], sequence[position]))
            assert match
            assert index.items[parse_sid(match[2]) or ()] == sequence[position]
            kept = re.findall(r"<\|a_.*?(?=<\|a_|$)", match[1])
            assert set(kept) <= set(index.texts(sequence[:position]))
            assert 1 <= len(kept) <= KEPT
