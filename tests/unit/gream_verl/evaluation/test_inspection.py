from __future__ import annotations

import json

import pytest
from assets import TITLES, make_index, reasoning_response
from rich.console import Console

from gream_verl.core.errors import InputError
from gream_verl.core.files import write_json
from gream_verl.evaluation.inspection import read_rollouts, read_titles, rollout_table, titles_in

INDEX = make_index()
NAMES = {item: TITLES[place % len(TITLES)] for place, item in enumerate(INDEX.sids)}


def row(output: str, score: float, **more: object) -> dict[str, object]:
    prompt = f"user\nHistory: {INDEX.text('0')}{INDEX.text('22')} What is next?"
    return {"input": prompt, "output": output, "gts": INDEX.text("3"), "score": score, "step": 7, **more}


def write(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def test_semantic_ids_become_titles_the_longest_first():
    text = f"x {INDEX.text('23')}{INDEX.text('0')}<|a_4|> y {INDEX.text('22')}"
    assert titles_in(text, INDEX, {"23": "Brazil", "0": "Alien", "22": "[Jaws]"}) == ["Brazil", "Alien", "[Jaws]"]


def test_the_worst_comes_first_and_the_last_step_of_a_folder_is_read(tmp_path):
    write(tmp_path / "2.jsonl", [row("x", 0.0)])
    write(
        tmp_path / "10.jsonl",
        [
            row(reasoning_response(INDEX.text("3")), 1.0, depth=3.0),
            row("<think>[red]half a chain", 0.0, depth=0.0),
            row(INDEX.text("1"), 0.5),
        ],
    )
    worst, middle, best = read_rollouts(tmp_path, INDEX, NAMES)
    assert (worst.reward, worst.chain, worst.answer, worst.depth) == (0.0, "[red]half a chain", "(no item)", 0)
    assert (middle.answer, middle.depth) == (NAMES["1"], 2)
    assert (best.chain, best.answer, best.truth, best.depth) == ("likes Alien.", NAMES["3"], NAMES["3"], 3)
    assert best.history == [NAMES["0"], NAMES["22"]]


@pytest.mark.parametrize(("rollouts", "limit", "rows"), [(5, 2, 4), (3, 2, 3), (1, 2, 1), (0, 2, 0)])
def test_no_rollout_is_shown_twice(tmp_path, rollouts, limit, rows):
    path = write(tmp_path / "1.jsonl", [row("[red]x", number / 10) for number in range(rollouts)])
    table = rollout_table(read_rollouts(path, INDEX, NAMES), limit)
    assert table.row_count == rows
    console = Console(width=100, record=True, file=(tmp_path / "out").open("w"))
    console.print(table)
    assert ("[red]x" in console.export_text()) == (rollouts > 0)


def test_titles_are_read_from_the_item_file(tmp_path):
    write_json(tmp_path / "tiny.item.json", {"1": {"title": "Heat"}, "2": {"title": ""}})
    assert read_titles(tmp_path / "tiny.item.json") == {"1": "Heat", "2": "2"}


def test_bad_input_is_one_sentence(tmp_path):
    with pytest.raises(InputError, match=r"no file <step>\.jsonl"):
        read_rollouts(tmp_path, INDEX, NAMES)
    with pytest.raises(InputError, match=r"9\.jsonl: no such file"):
        read_rollouts(tmp_path / "9.jsonl", INDEX, NAMES)
    for line in (b"{", b"[]", b'{"output": "x"}', b"\xff"):
        (tmp_path / "3.jsonl").write_bytes(json.dumps(row("x", 0.0)).encode() + b"\n" + line + b"\n")
        with pytest.raises(InputError, match=r"3\.jsonl: line 2: not a rollout"):
            read_rollouts(tmp_path, INDEX, NAMES)
    write_json(tmp_path / "tiny.item.json", {"1": "Heat"})
    with pytest.raises(InputError, match=r"tiny\.item\.json: expected"):
        read_titles(tmp_path / "tiny.item.json")
