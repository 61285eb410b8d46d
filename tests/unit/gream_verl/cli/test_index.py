"""The commands of ``gream index`` one after the other, with the real embedding model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from gream_verl.cli.main import main as cli
from gream_verl.core.semantic_ids import ItemIndex

KINDS = ("shampoo", "perfume", "lipstick", "brush")


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    monkeypatch.setattr(sys, "argv", ["gream", "index", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    printed = capsys.readouterr()
    return int(caught.value.code or 0), printed.out + printed.err


def write_data(folder: Path, items: int) -> None:
    titles = {
        str(item): {"title": f"{KINDS[item % 4]} number {item}", "categories": [KINDS[item % 4]]}
        for item in range(items)
    }
    users = {f"u{user}": [str((user * 7 + step * 4) % items) for step in range(9)] for user in range(20)}
    (folder / "toy.item.json").write_text(json.dumps(titles))
    (folder / "toy.inter.json").write_text(json.dumps(users))


def test_an_index_is_built_extended_examined_and_read_by_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ["--data", str(tmp_path), "--dataset", "toy"]
    write_data(tmp_path, 40)
    status, out = run(monkeypatch, capsys, "build", *where, "--levels", "2", "--codes", "8", "--unique")
    assert status == 0
    assert "Collisions" in out
    index = tmp_path / "toy.index.json"
    built = index.read_text()

    write_data(tmp_path, 43)
    status, out = run(monkeypatch, capsys, "add", *where)
    assert status == 0
    assert "new" in out
    assert "distortion_ratio" in out.replace(" ", "_")
    assert index.read_text().startswith(built.rstrip().removesuffix("}"))
    assert len(ItemIndex.load(index)) == 43

    status, out = run(monkeypatch, capsys, "remove", "41", *where)
    assert (status, "1 item retired" in out) == (0, True)
    assert "41" not in ItemIndex.load(index).sids
    assert ItemIndex.load(index).text("41")
    status, out = run(monkeypatch, capsys, "remove", "41", "--undo", *where)
    assert (status, "1 item brought back" in out) == (0, True)

    status, out = run(monkeypatch, capsys, "report", *where)
    assert status == 0
    page = (tmp_path / "toy.index-report.html").read_text()
    assert "shampoo number" in page
    assert json.loads((tmp_path / "toy.index-report.json").read_text())["items"] == 43

    letter = {item: [token.replace("|", "") for token in sid] for item, sid in ItemIndex.load(index).sids.items()}
    (tmp_path / "letter.json").write_text(
        json.dumps({item: [f"{t[:3]}{int(t[3:-1]) - 1}>" for t in sid] for item, sid in letter.items()})
    )
    kept = dict(ItemIndex.load(index).sids)
    assert run(monkeypatch, capsys, "check", str(tmp_path / "letter.json"))[0] == 0
    assert run(monkeypatch, capsys, "import", str(tmp_path / "letter.json"), *where)[0] == 0
    assert ItemIndex.load(index).sids == kept


def test_an_item_that_is_not_there_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ItemIndex({"shampoo": ("<|a_1|>",), "soap": ("<|a_2|>",)}).save(tmp_path / "toy.index.json")
    status, out = run(monkeypatch, capsys, "remove", "shampo", "--data", str(tmp_path), "--dataset", "toy")
    assert status == 1
    assert "no item 'shampo'; check the id" in " ".join(out.split())
