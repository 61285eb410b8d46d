"""`gream data tasks` and `gream data mix`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from assets import make_tiny_model
from small_data import make_data
from typer.testing import CliRunner

from gream_verl.cli.main import app
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    return make_data(tmp_path / "data", users=40)


def gream(*arguments: Any) -> str:
    result = CliRunner().invoke(app, ["data", *map(str, arguments)])
    if result.exception:
        raise result.exception
    return result.output


def counts(file: Path) -> dict[str, int]:
    return dict(pl.read_parquet(file)["task"].value_counts().iter_rows())


def test_alignment_tasks_alone_go_to_a_file_of_their_own(folder: DataFolder, tmp_path: Path) -> None:
    out = gream("tasks", tmp_path, "--dry-run")
    assert all(task in out for task in ("historyreconstruction", "itemsearch", "preferenceobtain"))
    assert not folder.align.exists()
    gream("tasks", tmp_path, "--rows", "seqrec=50%", "--rows", "item2index=20")
    report = json.loads(folder.align.with_suffix(".json").read_text())
    assert counts(folder.align) == {"seqrec": round(report["seqrec"]["exist"] / 2), "item2index": 20}


def test_mixes_of_several_names_lie_next_to_each_other(folder: DataFolder, tmp_path: Path) -> None:
    gream("mix", tmp_path, "--total", "40", "--rows", "seqrec=3", "--rows", "reasoning=1")
    gream("mix", tmp_path, "--dataset", "small", "--rows", "reasoning=9", "--name", "thoughts", "--chains", "sentences")
    assert counts(folder.mix) == {"seqrec": 30, "reasoning": 10}
    assert counts(folder.root / "small-thoughts.parquet") == {"reasoning": 9}
    assert {"small-mix", "small-thoughts", "small-mix-eval-seqrec"} <= json.loads(
        folder.dataset_info.read_text()
    ).keys()


def test_histories_are_shortened_to_what_the_trainer_takes(folder: DataFolder, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", folder.read_index(folder.read_items()))
    out = gream("mix", tmp_path, "--rows", "seqrec=50", "--tokenizer", model, "--longest", "60")
    assert all(name in out for name in ("longest", "shortened", "left out"))
    report = json.loads(folder.mix.with_suffix(".json").read_text())["seqrec"]
    assert report["made"] == 50
    assert report["shortened"] > 0
    assert report["longest"] <= 60


def test_a_judge_chooses_among_the_chains_of_a_row(folder: DataFolder, tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model", folder.read_index(folder.read_items()))
    mixes = []
    for arguments in ([], ["--best-of", f"1={model}"], ["--best-of", f"4={model}"]):
        out = gream("mix", tmp_path, "--rows", "reasoning=30", *arguments)
        assert ("Gain over the first chain" in out) == bool(arguments)
        mixes.append(folder.mix.read_bytes())
    assert mixes[0] == mixes[1] != mixes[2]
    report = json.loads(folder.mix.with_suffix(".json").read_text())["reasoning"]
    assert report["made"] == 30
    assert report["best of"]["nats of the target"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mix", "nowhere"], "gream data prepare"),
        (["mix", "RUN", "--rows", "seqrec"], "--rows 'seqrec': expected NAME=VALUE"),
        (["mix", "RUN", "--rows", "seqrec=many"], "seqrec=40%"),
        (["mix", "RUN", "--rows", "seqrec=9", "--name", "chains"], "none of align"),
        (["mix", "RUN", "--tokenizer", "nowhere"], "nowhere: cannot be loaded"),
        (["mix", "RUN", "--longest", "256"], "goes with --tokenizer"),
        (["mix", "RUN", "--best-of", "sft=4"], "such as 4=runs/Beauty/sft"),
        (["mix", "RUN", "--best-of", "4"], "--best-of '4': expected NAME=VALUE"),
        (["tasks", "RUN", "--rows", "reasoning=5"], "no alignment task"),
    ],
)
def test_a_wrong_call_names_the_remedy(
    folder: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        gream(*(tmp_path if word == "RUN" else word for word in arguments))
