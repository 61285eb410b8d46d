from __future__ import annotations

from pathlib import Path

import pytest

from data_processing.teacher.templates import FIELDS, read_prompts, write_prompts
from gream_verl.core.errors import InputError


def test_our_prompts_can_be_written_edited_and_read(tmp_path: Path) -> None:
    assert set(read_prompts()) == set(FIELDS)
    paths = write_prompts(tmp_path / "mine")
    assert read_prompts(tmp_path / "mine") == read_prompts()
    paths[0].write_text("Be brief.\n---\nItem $title for $$5")
    (tmp_path / "mine/again.txt").write_text("No: $reason")
    write_prompts(tmp_path / "mine")  # leaves what is there
    prompts = read_prompts(tmp_path / "mine")
    filled = prompts["item"].messages(title="$5 ${gift} {card}", brand="", categories="", description="", reviews="")
    assert filled == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Item $5 ${gift} {card} for $5"},
    ]
    assert prompts["again"].messages(reason="x") == [{"role": "user", "content": "No: x"}]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("chain", b"$history $targets", r"chain.txt: unknown or missing: \$target, \$targets"),
        ("chain", b"$history", r"unknown or missing: \$target; the fields are \$history, \$target"),
        ("item", b"$title costs 5$", r"a \$ that begins no field"),
        ("item", "Größe $title".encode("latin-1"), "not UTF-8"),
        ("user", None, "no such file.*gream data prompts"),
    ],
)
def test_a_prompt_that_cannot_be_filled_in_is_named(tmp_path: Path, name: str, text: bytes | None, said: str) -> None:
    write_prompts(tmp_path)
    path = tmp_path / f"{name}.txt"
    path.unlink() if text is None else path.write_bytes(text)
    with pytest.raises(InputError, match=said):
        read_prompts(tmp_path)
