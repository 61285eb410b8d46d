from __future__ import annotations

from pathlib import Path

import pytest

from data_processing.teacher.templates import FIELDS, read_prompts, write_prompts
from gream_verl.core.errors import InputError


def test_our_prompts_are_whole_and_can_be_written_edited_and_read(tmp_path: Path) -> None:
    assert set(read_prompts()) == set(FIELDS)
    paths = write_prompts(tmp_path / "mine")
    assert read_prompts(tmp_path / "mine") == read_prompts()
    paths[0].write_text("Be brief.\n---\nItem $title for $$5")
    write_prompts(tmp_path / "mine")
    messages = read_prompts(tmp_path / "mine")["item"].messages(
        title="$5 ${gift} {card}", brand="", categories="", description="", reviews=""
    )
    assert messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Item $5 ${gift} {card} for $5"},
    ]


def test_a_prompt_without_divider_has_no_system_turn(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    (tmp_path / "again.txt").write_text("No: $reason")
    assert read_prompts(tmp_path)["again"].messages(reason="x") == [{"role": "user", "content": "No: x"}]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("chain", "$history $targets", r"chain.txt: field \$targets is not known; did you mean \$target\?"),
        ("chain", "$history", r"field \$target is missing"),
        ("item", "$title costs 5$", r"a \$ that begins no field"),
    ],
)
def test_a_prompt_that_cannot_be_filled_in_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    write_prompts(tmp_path)
    (tmp_path / f"{name}.txt").write_text(text)
    with pytest.raises(InputError, match=said):
        read_prompts(tmp_path)


def test_a_prompt_in_another_encoding_is_named(tmp_path: Path) -> None:
    write_prompts(tmp_path)
    (tmp_path / "item.txt").write_bytes("Größe $title".encode("latin-1"))
    with pytest.raises(InputError, match="not text in UTF-8"):
        read_prompts(tmp_path)


def test_a_missing_prompt_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="gream data prompts"):
        read_prompts(tmp_path)
