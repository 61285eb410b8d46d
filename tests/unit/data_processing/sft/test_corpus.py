from __future__ import annotations

from typing import Any

import pytest

from data_processing.sft.corpus import Corpus, description
from gream_verl.core.data_folder import Item
from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex

ITEMS = {str(number): Item(f"T{number}") for number in range(9)}
INDEX = ItemIndex.from_codes(list(ITEMS), [(number,) for number in range(9)])
TRAINING = {"none": [], "long": [str(number) for number in range(7)]}


def corpus(**texts: Any) -> Corpus:
    return Corpus(TRAINING, ITEMS, INDEX, **texts)


def test_sequences_lie_one_after_another() -> None:
    made = corpus()
    assert made.starts.tolist() == [0, 0, 7]
    assert made.sequence.tolist() == made.positions.tolist() == list(range(7))


def test_descriptions_are_cut_with_and_without_spaces() -> None:
    assert description(Item("T", "word " * 99)) == " ".join(["word"] * 40)
    assert description(Item("T", "語" * 999)) == "語" * 320


def test_chains_are_found_by_target() -> None:
    chains = {("long", 5): "x<answer><|a_6|></answer>", ("long", 4): "<answer><|a_5|></answer>"}
    made = corpus(chains=chains)
    targets, slices = made.chains
    assert targets.tolist() == [4, 5]
    texts = [made.arena.characters[start:end].tobytes().decode() for start, end in slices[:2]]
    assert texts == [chains["long", 4], chains["long", 5]]


@pytest.mark.parametrize(
    ("user", "position", "message"),
    [
        ("nobody", 4, "chain of user 'nobody', position 4: no training target"),
        ("long", 7, "chain of user 'long', position 7: no training target"),
        ("long", 8, "no training target"),
        ("long", 3, "no training target"),
        ("none", 0, "no training target"),
        ("long", 6, r"does not end with <answer><\|a_7\|></answer>; it was written for another index"),
    ],
)
def test_a_chain_for_a_held_out_target_or_of_another_index_is_refused(user: str, position: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        corpus(chains={(user, position): "<think>x</think><answer><|a_9|></answer>"})
