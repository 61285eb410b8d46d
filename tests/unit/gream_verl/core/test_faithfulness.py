from __future__ import annotations

import re
from pathlib import Path

import pytest
from small_data import make_data

from data_processing.sft.rules import RuleTeacher, Wording
from gream_verl.core.data_folder import Item
from gream_verl.core.faithfulness import ClaimReader, faithfulness
from gream_verl.core.semantic_ids import ItemIndex

ITEMS = {
    "story": Item("Toy Story", categories=("Comedy", "Arts, Crafts & Sewing")),
    "carol": Item("A Christmas Carol Once Told in Nine Long Words", categories=("Drama",)),
    "heat": Item("Heat", categories=("Crime", "Drama"), brand="Warner"),
    "fargo": Item("Dr. Fargo", categories=("Crime", "Crime Drama")),
    "other": Item("The Other Toy Story", categories=("Horror",)),
}
INDEX = ItemIndex.from_codes(list(ITEMS), [(n, n) for n in range(len(ITEMS))])
HISTORY = ["story", "carol", "heat"]
READER = ClaimReader(ITEMS, INDEX)
SID = {item: INDEX.text(item) for item in ITEMS}


def untrue(chain: str) -> list[str]:
    return [kind for kind, truths in READER.read(chain, HISTORY).items() if not all(truths)]


@pytest.mark.parametrize(
    ("thought", "kinds"),
    [
        ("Evidence: Drama 2, Crime 1 of 3; last Heat. Preference: Drama.", []),
        ("Evidence: of the 3 items in this history, 2 are Drama, 1 Crime; the latest is Heat. Preference: x.", []),
        ("They have 1 Warner and 1 Arts, Crafts & Sewing; Crime Drama 0. In 1995 Drama was new.", []),
        ("Evidence: Drama 1, Crime 1 of 3; last Heat. Preference: Drama.", ["count"]),
        ("Evidence: Horror 1 of 3; last Heat. Preference: Horror.", ["count"]),
        ("Evidence: of the 3 items in this history, 2 are Crime; the latest is Heat. Preference: x.", ["count"]),
        ("2 Crime Drama", ["count"]),
        ("Crime 2", ["count"]),
        ("Evidence: Drama 2 of 12; last Heat. Preference: Drama.", ["length"]),
        ("Evidence: of the 4 items in this history, 2 are Drama; the latest is Heat. Preference: x.", ["length"]),
        ("Evidence: last Toy Story. Preference: x.", ["last item"]),
        ("Evidence: the latest item in this history is Heat 2. Preference: x.", ["last item"]),
        ("Evidence: last Dr. Fargo. Preference: x.", ["last item", "title"]),
        ("It is like Toy Story, and like A Christmas Carol Once Told in Nine Long!", []),
        ("It is like The Other Toy Story.", ["title"]),
        (f"After {SID['heat']} and {SID['story']}", []),
        (f"After {SID['fargo']}", ["SID"]),
    ],
)
def test_a_thought_is_held_against_the_history(thought: str, kinds: list[str]) -> None:
    assert untrue(f"<think>{thought}</think>{SID['story']}<answer>{SID['fargo']}</answer>") == kinds


@pytest.mark.parametrize(
    ("kept", "kinds"),
    [
        (["story", "heat"], []),
        (["heat", "story"], ["order"]),
        (["heat", "heat"], ["order"]),
        (["story", "other"], ["denoised item"]),
        (["other", "heat", "carol"], ["denoised item", "order"]),
    ],
)
def test_the_denoised_history_holds_items_of_the_history_in_order(kept: list[str], kinds: list[str]) -> None:
    assert untrue(f"<think>x</think>{''.join(SID[item] for item in kept)}<answer>{SID['fargo']}</answer>") == kinds


@pytest.mark.parametrize(
    "response", ["", "<think>", "a", "<answer>", "<|b_1|></think><|c_2|>", "9 9 9", "</think>" * 3]
)
def test_no_response_raises(response: str) -> None:
    READER.read(response, HISTORY)
    READER.read(response, [])


@pytest.mark.parametrize("wording", ["notes", "sentences"])
def test_chains_by_rule_are_true_and_with_another_number_untrue(tmp_path: Path, wording: Wording) -> None:
    folder = make_data(tmp_path)
    items = folder.read_items()
    index = folder.read_index(items)
    reader, teacher = (
        ClaimReader(items, index),
        RuleTeacher(items, dict(zip(items, index.texts(items), strict=True)), wording),
    )
    seen = 0
    for sequence in folder.read_inter(items).values():
        for chain in teacher.chains(sequence[:-1], sequence[-1]):
            claims = reader.read(chain, sequence[:-1])
            assert all(all(truths) for truths in claims.values())
            assert len(claims["length"]) == len(claims["last item"]) == len(claims["order"]) == 1
            thought = chain.partition("</think>")[0]
            for number in re.finditer(r"\d+", thought):
                wrong = f"{thought[: number.start()]}{int(number[0]) + 1}{thought[number.end() :]}"
                assert faithfulness([reader.read(wrong, sequence[:-1])])["faithful"] == 0
                seen += 1
    assert seen > 100


def test_items_may_lack_texts() -> None:
    reader = ClaimReader({item: text for item, text in ITEMS.items() if item != "heat"}, INDEX)
    assert reader.read("<think>last Toy Story. Preference: none.</think><answer>", ["heat"])["last item"] == [False]


def test_a_chain_that_claims_nothing_is_not_faithful() -> None:
    assert faithfulness([READER.read("<think></think><answer></answer>", HISTORY)]) == {"faithful": 0.0}
