from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_processing.sft.texts import Arena, Templates, join, render, string_array
from gream_verl.core.errors import InputError

words = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=6)
TEMPLATES = ("{a} and {b}", "", "{b}{b}", "no field: é", "<{pair[0]}|{pair[1]}>")


@given(words, st.lists(st.tuples(st.integers(0, 4), st.integers(0, 5), st.integers(0, 5)), max_size=20))
def test_templates_are_filled_in_as_str_format_does(texts: list[str], chosen: list[tuple[int, int, int]]) -> None:
    arena = Arena()
    templates = Templates(TEMPLATES)
    slices = arena.add(texts)
    numbers, first, second = np.array(chosen, np.int64).reshape(-1, 3).T
    first, second = first % len(texts), second % len(texts)
    fields = SimpleNamespace(a=slices[first], b=slices[second], pair=[slices[second], slices[first]])
    places = np.random.default_rng(len(chosen)).permutation(len(chosen))
    made = string_array(*render(arena.characters, [(templates.fill(numbers, fields), places)])).to_pylist()
    for row, place in enumerate(places):
        a, b = texts[first[row]], texts[second[row]]
        assert made[place] == TEMPLATES[numbers[row]].format(a=a, b=b, pair=[b, a])


@given(words)
def test_a_run_of_joined_texts_is_a_slice(texts: list[str]) -> None:
    arena = Arena("utf-32-le")
    slices, between = arena.add(texts), arena.add(["; "])
    text, offsets = join(arena.characters, [slices, np.broadcast_to(between, slices.shape)])
    whole = text.tobytes().decode("utf-32-le")
    assert whole == "".join(f"{one}; " for one in texts)
    assert whole[offsets[0] : offsets[1]] == f"{texts[0]}; "


def test_an_arena_grows() -> None:
    arena = Arena()
    first = arena.add(["one", "é"])
    assert first.tolist() == [[0, 3], [3, 5]]
    assert arena.characters.tobytes() == "oneé".encode()
    assert arena.append(np.frombuffer(b"two", np.uint8)) == 5
    assert arena.add([]).shape == (0, 2)
    assert arena.characters.tobytes() == "oneétwo".encode()


def test_more_text_than_arrow_takes_at_once_is_one_sentence() -> None:
    with pytest.raises(InputError, match="shorter histories"):
        string_array(np.zeros(0, np.uint8), np.array([0, 2**31]))
