from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from assets import TITLES, make_index, reasoning_response
from rich.console import Console

from gream_verl.core.errors import InputError
from gream_verl.evaluation.inspection import list_table, read_rollouts, rollout_table

INDEX = make_index()
NAMES = {item: f"{TITLES[place % len(TITLES)]} {item}" for place, item in enumerate(INDEX.sids)}


def row(output: str, score: float) -> dict[str, object]:
    prompt = f"user\nHistory: {INDEX.text('0')}{INDEX.text('22')}, <|a_4|> {INDEX.text('23')} What is next?"
    return {"input": prompt, "output": output, "gts": INDEX.text("3"), "score": score, "step": 7}


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def shown(path: Path, limit: int) -> tuple[int, list[list[str]]]:
    table = rollout_table(read_rollouts(path), limit, INDEX, NAMES)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    lines = console.export_text().splitlines()
    return table.row_count, [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if "│" in line]


def test_the_worst_comes_first_and_the_last_step_of_a_folder_is_read(tmp_path: Path) -> None:
    write(tmp_path / "2.jsonl", [row("x", 0.0)])
    texts = [(reasoning_response(INDEX.text("3")), 1.0), ("<think>[red]half a chain", 0.0), (INDEX.text("1"), 0.5)]
    write(tmp_path / "10.jsonl", [row(*one) for one in texts])
    count, cells = shown(tmp_path, 5)
    history = ", ".join(NAMES[item] for item in ("0", "22", "23"))
    assert count == 3
    assert cells == [
        ["0.000", "0", "(no item)", history], ["", "", NAMES["3"], "[red]half a chain"],
        ["0.500", "2", NAMES["1"], history], ["", "", NAMES["3"], ""],
        ["1.000", "3", NAMES["3"], history], ["", "", NAMES["3"], "likes Alien."],
    ]  # fmt: skip


def test_lists_have_titles_the_best_first() -> None:
    lists = {"u": ["0", "3"], "v": ["3", "1"], "w": ["0", "1"], "x": ["1", "0", "3"]}
    rows = [{"user": user, "target": "3", "recommended": items} for user, items in lists.items()]
    table = list_table(rows, 1, {"3": "[b]Heat", "1": "Alien"})
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(table)
    cells = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in console.export_text().splitlines() if "│" in line
    ]
    assert cells == [
        ["v", "1", "[b]Heat", "1. [b]Heat"], ["", "", "", "2. Alien"],
        ["w", "none", "[b]Heat", "1. 0"], ["", "", "", "2. Alien"],
    ]  # fmt: skip
    with pytest.raises(InputError, match="has no lists"):
        list_table([{"user": "u", "target": "3"}], 1, {})


@pytest.mark.parametrize(("rollouts", "limit", "rows"), [(5, 2, 4), (3, 2, 3), (1, 2, 1)])
def test_no_rollout_is_shown_twice(tmp_path: Path, rollouts: int, limit: int, rows: int) -> None:
    assert shown(write(tmp_path / "1.jsonl", [row("x", n / 10) for n in range(rollouts)]), limit)[0] == rows


@pytest.mark.parametrize("line", [b"{", b"[]", b"\xff"])
def test_a_file_of_other_lines_is_named(tmp_path: Path, line: bytes) -> None:
    (tmp_path / "3.jsonl").write_bytes(json.dumps(row("x", 0.0)).encode() + b"\n" + line + b"\n")
    with pytest.raises(InputError, match=r"3\.jsonl: not rollouts of verl"):
        read_rollouts(tmp_path)
    (tmp_path / "3.jsonl").write_text('{"output": "x"}\n')
    with pytest.raises(InputError, match=r"3\.jsonl: not rollouts of verl"):
        read_rollouts(tmp_path)


@pytest.mark.parametrize(("path", "name"), [(".", r"<step>\.jsonl"), ("9.jsonl", r"9\.jsonl")])
def test_missing_rollouts_are_named(tmp_path: Path, path: str, name: str) -> None:
    with pytest.raises(InputError, match=rf"{name}: no such file"):
        read_rollouts(tmp_path / path)
