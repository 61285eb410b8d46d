from __future__ import annotations

from difflib import SequenceMatcher

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from data_processing.leaks import SIMILAR, find_leak, names_title

SID = ("<|a_1|>", "<|b_2|>", "<|c_3|>")
OTHER = ("<|a_1|>", "<|b_2|>", "<|c_4|>")
ANSWER = f"<answer>{''.join(SID)}</answer>"


def leak(thought: str, title: str = "The Godfather", **history: list) -> str | None:
    return find_leak(f"{thought}{ANSWER}", title=title, sid=SID, **history)


@pytest.mark.parametrize(
    "thought",
    [
        "<think>They want The Godfather.</think>",
        "<think>they want the GODFATHER</think>",
        "<think>they want the God-father... no, the Godfather!</think>",
        "<think>the Godfahter</think>",
        "<think>the god-father</think>",
        "<think>Thé Gòdfather</think>",
    ],
)
def test_a_named_title_is_found(thought: str) -> None:
    assert leak(thought) == "title"


@pytest.mark.parametrize(
    "thought",
    [
        f"<think>{''.join(SID)}</think>",
        f"<think>x</think>{''.join(OTHER)}{''.join(SID)}",
        "<think>it is <|a_1|> <|b_2|> <|c_3|></think>",
        "<think>it begins with <|a_1|><|b_2|></think>",
        f"{ANSWER} I said.",
        f"<think>{''.join(SID)}<|d_1|></think>",
    ],
)
def test_a_named_sid_is_found(thought: str) -> None:
    assert leak(thought) == "sid"


@pytest.mark.parametrize(
    "thought",
    [
        "<think>They like crime.</think>",
        f"<think>x</think>{''.join(OTHER)}",
        "<think>a father and a god</think>",
        "<think>begins with <|a_1|></think>",
        "",
    ],
)
def test_a_clean_chain_passes(thought: str) -> None:
    assert leak(thought) is None


def test_what_the_user_had_before_may_be_named() -> None:
    assert leak(f"<think>last The Godfather.</think>{''.join(SID)}", history_titles=["The Godfather"]) == "sid"
    assert (
        leak(f"<think>The Godfather</think>{''.join(SID)}", history_titles=["The Godfather"], history_sids=[SID])
        is None
    )
    assert leak("<think>last Alien 3.</think>", "Alien", history_titles=["Alien 3"]) is None
    assert leak("<think>last Alien 3, then Alien.</think>", "Alien", history_titles=["Alien 3"]) == "title"


def test_short_titles_are_matched_as_whole_words_only() -> None:
    assert not names_title("they like heated drama", "Heat")
    assert names_title("they like Heat, and drama", "Heat")


def test_a_title_is_found_without_its_brackets() -> None:
    assert names_title("next is Seven", "Seven (Se7en)")
    assert names_title("next is Seven Se7en", "Seven (Se7en)")


def test_a_title_without_words_is_never_found() -> None:
    assert not names_title("... ???", "???")
    assert not names_title("", "")


any_text = st.text("aAbéß熱,.- ", max_size=20)
word = st.text("abcdeghiklmnoprstu", min_size=1, max_size=5)


@given(st.lists(word, min_size=2, max_size=4), st.lists(word, max_size=6), st.data())
@settings(max_examples=30)
def test_the_quick_test_before_the_fuzzy_one_loses_nothing(
    title_words: list[str], text_words: list[str], data: st.DataObject
) -> None:
    title = " ".join(title_words)
    assume(len(title) >= 12)
    changed = list(title)
    changed[data.draw(st.integers(0, len(title) - 1))] = "f"
    text = " ".join([*text_words, "".join(changed)])
    windows, width = text.split(), len(title_words)
    similar = any(
        SequenceMatcher(None, " ".join(windows[start : start + length]), title, False).ratio() >= SIMILAR
        for start in range(len(windows))
        for length in (width - 1, width, width + 1)
    )
    assert names_title(text, title) or not similar


@given(any_text, any_text, any_text)
@settings(max_examples=30)
def test_a_title_of_two_words_is_found_in_any_text(before: str, title: str, after: str) -> None:
    title = f"{title} a"
    assert names_title(f"{before} {title.upper()} {after}", title)


@pytest.mark.parametrize(
    ("text", "title", "allowed", "named"),
    [
        ("The user wants Alien 3 now.", "Alien 3", ["Alien"], True),
        ("Wants Harry Potter and the Goblet of Fire.", "Harry Potter and the Goblet of Fire", ["Harry Potter"], True),
        ("Liked Alien 3.", "Alien", ["Alien 3"], False),
        ("Liked Harry Potter.", "Harry Potter 2", ["Harry Potter"], False),
        ("Liked Alien 3, Alien 3.", "Alien", ["Alien 3"], False),
        ("Next comes Great Lash Very Long Washable Mascara By Maybelline", "Great Lash Very Long Washable Mascara By "
         "Maybelline, Very Black 201, .43 oz", [], True),
        ("Likes the heat of summer.", "Heat", [], False),
        ("Wants Heat.", "Heat (1995)", [], True),
        ("Wants HEAT.", "Heat", [], True),
        ("Read 1984 before.", "1984", [], True),
        ("Wants 熱.", "熱", [], True),
    ],
)  # fmt: skip
def test_sequels_long_titles_and_titles_of_one_word(text: str, title: str, allowed: list[str], named: bool) -> None:
    assert names_title(text, title, allowed) == named
