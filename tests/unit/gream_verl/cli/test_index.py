"""The commands of ``gream index`` one after the other."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from index_data import fake_embeddings
from typer.testing import CliRunner

from data_processing.indexing import growth, residual_index
from data_processing.indexing.embed import EmbeddingSettings, default_model
from gream_verl.cli.index import index_app
from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex

KINDS = ("shampoo", "perfume", "lipstick", "brush")


def run(*arguments: object) -> str:
    done = CliRunner(env={"COLUMNS": "100"}).invoke(index_app, [*map(str, arguments)])
    if done.exception:
        raise done.exception
    return done.output


def write_data(folder: Path, items: int) -> None:
    titles = {
        str(item): {"title": f"{KINDS[item % 4]} number {item}", "categories": [KINDS[item % 4]]}
        for item in range(items)
    }
    users = {f"u{user}": [str((user * 7 + step * 4) % items) for step in range(9)] for user in range(20)}
    (folder / "data").mkdir(exist_ok=True)
    (folder / "data/toy.item.json").write_text(json.dumps(titles))
    (folder / "data/toy.inter.json").write_text(json.dumps(users))


@pytest.fixture
def embedded(monkeypatch: pytest.MonkeyPatch) -> list[EmbeddingSettings]:
    """Replace the model; return the settings it was called with."""
    calls: list[EmbeddingSettings] = []

    def cached(folder: object, items: list, settings: EmbeddingSettings) -> np.ndarray:
        calls.append(settings)
        return fake_embeddings(items, settings)

    monkeypatch.setattr(residual_index, "cached_embeddings", cached)
    monkeypatch.setattr(growth, "embed_items", fake_embeddings)
    return calls


def test_items_that_nobody_took_are_added_from_a_file(tmp_path: Path, embedded: list[EmbeddingSettings]) -> None:
    write_data(tmp_path, 40)
    run("build", tmp_path)
    before, file = ItemIndex.load(tmp_path / "data/toy.index.json").sids, tmp_path / "new.json"
    file.write_text(json.dumps({"cold": {"title": "A <b>new</b> brush"}, "3": {"title": "Other"}}))
    run("add", tmp_path, "--items", file)
    after = ItemIndex.load(tmp_path / "data/toy.index.json").sids
    assert {item: sid for item, sid in after.items() if item != "cold"} == before
    assert "cold" in after
    texts = json.loads((tmp_path / "data/toy.item.json").read_text())
    assert (texts["cold"]["title"], texts["3"]["title"]) == ("A new brush", "brush number 3")
    file.write_text(json.dumps({"colder": {"brand": "Acme"}}))
    with pytest.raises(InputError, match=r"new\.json: item 'colder' has neither title nor description"):
        run("add", tmp_path, "--items", file)
    assert "colder" not in json.loads((tmp_path / "data/toy.item.json").read_text())


def test_an_index_is_built_extended_examined_and_read_by_others(
    tmp_path: Path, embedded: list[EmbeddingSettings]
) -> None:
    index = tmp_path / "data/toy.index.json"
    write_data(tmp_path, 40)
    (tmp_path / "without.txt").write_text("38\n\n39\n")
    out = run("build", tmp_path, "--levels", 2, "--codes", 8, "--unique", "--without", tmp_path / "without.txt")
    assert "38 items; 0 collide" in out
    assert embedded == [EmbeddingSettings()]
    built = index.read_text()

    write_data(tmp_path, 43)
    out = run("add", tmp_path)
    assert "distortion_ratio" in out
    assert "43 items" in out
    assert index.read_text().startswith(built.rstrip().removesuffix("}"))
    assert json.loads((tmp_path / "data/toy.index-report.json").read_text())["items"] == 43
    assert "by 10" in re.sub(r"\s+", " ", run("report", tmp_path))
    assert "43" in run("check", tmp_path)

    kept = dict(ItemIndex.load(index).sids)
    letter = {item: [re.sub(r"\|", "", token) for token in sid] for item, sid in kept.items()}
    counted_from_0 = {
        item: [re.sub(r"\d+", lambda code: str(int(code[0]) - 1), t) for t in sid] for item, sid in letter.items()
    }
    (tmp_path / "letter.json").write_text(json.dumps(counted_from_0))
    assert "LETTER" in run("check", tmp_path / "letter.json")
    run("import", tmp_path, tmp_path / "letter.json")
    assert ItemIndex.load(index).sids == kept
    with pytest.raises(InputError, match=r"codebooks\.npz: no such file"):
        run("add", tmp_path)


def test_collisions_of_an_imported_index_are_resolved_where_asked(tmp_path: Path) -> None:
    write_data(tmp_path, 4)
    (tmp_path / "data/toy.inter.json").write_text('{"u": ["0"]}')
    file, index = tmp_path / "tiger.json", tmp_path / "data/toy.index.json"
    file.write_text(json.dumps({"3": [1, 0], "0": [0, 1], "1": [0, 1], "2": [1, 1]}))
    for command in (["check", file], ["import", tmp_path, file]):
        with pytest.raises(InputError, match="--resolve"):
            run(*command)
    assert not index.exists()
    assert "items that share a SID" in run("import", tmp_path, file, "--resolve")
    assert list(ItemIndex.load(index).sids) == ["0", "1", "2", "3"]
    assert ItemIndex.load(index).text("1") == "<|a_1|><|b_2|><|c_2|>"
    write_data(tmp_path, 5)
    with pytest.raises(InputError, match="no SID for 1 of the 5 items"):
        run("check", tmp_path)


def test_settings_of_the_embedding_come_from_a_file_and_from_the_line(
    tmp_path: Path, embedded: list[EmbeddingSettings]
) -> None:
    write_data(tmp_path, 40)
    file = tmp_path / "embedding.yaml"
    file.write_text("model: m\npooling: mean\nfields: [title, brand]\nnormalize: false\ndevices: [cpu, cpu]\n")
    run("build", tmp_path, "-c", file, "--model", "other")
    assert embedded == [EmbeddingSettings("other", "mean", ("title", "brand"), normalize=False, devices=("cpu", "cpu"))]
    for wrong, said in (
        ("fields: [titel]", "fields.0: Input should be 'title', 'categories', 'description' or 'brand'"),
        ("poling: mean", "poling: Unexpected keyword argument; known keys are model, pooling, fields"),
    ):
        file.write_text(wrong)
        with pytest.raises(InputError, match=said):
            run("build", tmp_path, "-c", file)
    file.write_text("\n")
    with pytest.raises(InputError, match="holds no item id"):
        run("build", tmp_path, "--without", file)


def test_a_default_build_with_the_real_model_gives_the_same_bytes_twice(tmp_path: Path) -> None:
    try:
        default_model()
    except InputError as missing:
        pytest.skip(str(missing))
    write_data(tmp_path, 40)
    run("build", tmp_path)
    first = (tmp_path / "data/toy.index.json").read_bytes()
    for file in (tmp_path / "data").glob("*.text-emb-*"):
        file.unlink()
    run("build", tmp_path)
    assert (tmp_path / "data/toy.index.json").read_bytes() == first
