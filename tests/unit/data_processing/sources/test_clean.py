from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_processing.sources.clean import clean_item, clean_text, clean_title
from gream_verl.core.data_folder import Item


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ('<span class="a-size-medium a-color-secondary"', ""),
        ('" Magazines" />', ""),
        ("I <3 Cats & Dogs", "I <3 Cats & Dogs"),
        ("AT&amp;amp;T", "AT&T"),
        ("Caf&eacute;\n  au   lait", "Café au lait"),
        ("<a href='x'>Link</a> text</span>", "Link text"),
        ("var aPageStart = (new Date()).getTime(); var ue", ""),
        ("...", ""),
        ("日本語", "日本語"),
        ("if a<b then", "if a<b then"),
        ("Love <Live! The best", "Love <Live! The best"),
        ('27" > 24" monitor', '27" > 24" monitor'),
        ('Fine <span class="a-size', "Fine"),
        ("Fine <IMG", "Fine"),
        ("Fine <custom data='x", "Fine"),
        ("Fine</b", "Fine"),
        ("Fine <!-- more", "Fine"),
        ('size">Fine', "Fine"),
    ],
)
def test_titles_lose_html_and_nothing_else(text: str, clean: str) -> None:
    assert clean_title(text) == clean


@settings(max_examples=40)
@given(st.text("<>/!&;=\"' \n\tabspn", max_size=40))
def test_cleaning_leaves_no_tags_and_single_blanks(text: str) -> None:
    cleaned = clean_text(text)
    assert cleaned == " ".join(cleaned.split())
    assert "<span" not in clean_text(f"<span {text}")


def test_an_item_loses_html_empty_categories_and_unknown_ones() -> None:
    item = Item("<b>Heat</b>", "A&amp;B", "Fox ", ("Drama", "", "Unknown", "<i>Drama</i>"))
    assert clean_item(item, str.upper) == Item("HEAT", "A&B", "Fox", ("Drama",))
