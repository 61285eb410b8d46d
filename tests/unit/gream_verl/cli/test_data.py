"""`gream data prepare|stats|rl`."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from small_data import make_data
from typer.testing import CliRunner

from gream_verl.cli.data import data_app
from gream_verl.core.errors import InputError


def run(*arguments: object) -> str:
    """Run `gream data ...` in this process and return what it prints."""
    result = CliRunner().invoke(data_app, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def write_gzip(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))


@pytest.fixture
def amazon(tmp_path: Path) -> list[object]:
    """Raw Amazon files of 12 users who all had the same 8 items; the arguments that prepare them in `run`."""
    reviews = [
        {"reviewerID": f"u{user}", "asin": f"i{item}", "unixReviewTime": 10 * user + item, "reviewText": f"u{user}"}
        for user in range(12)
        for item in range(8)
    ]
    write_gzip(tmp_path / "R.json.gz", reviews)
    write_gzip(tmp_path / "M.json.gz", [{"asin": f"i{item}", "title": f"Title {item}"} for item in range(8)])
    files = ["--interactions", tmp_path / "R.json.gz", "--items", tmp_path / "M.json.gz"]
    return ["prepare", tmp_path / "D", "--source", "amazon2018", *files]


def test_raw_files_become_a_data_set_with_the_name_of_its_folder(amazon: list[object], tmp_path: Path) -> None:
    assert "statistics users" in run(*amazon)
    assert len(json.loads((tmp_path / "D/data/D.inter.json").read_text())) == 12
    out = run("stats", tmp_path / "D")
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in out.splitlines() if line.count("│") == 3}
    assert (rows["users"], rows["items"], rows["interactions"], rows["longest"]) == ("12", "8", "96", "8")
    run(*amazon, "--dataset", "other")
    assert (tmp_path / "D/data/other.item.json").is_file()


def test_a_data_set_goes_through_other_sources_unchanged(amazon: list[object], tmp_path: Path) -> None:
    run(*amazon)
    made = [tmp_path / f"D/data/D.{kind}.json" for kind in ("inter", "item")]
    run(
        "prepare",
        tmp_path / "layout",
        "--source",
        "layout",
        "--interactions",
        made[0],
        "--items",
        made[1],
        "--dataset",
        "D",
    )
    for path in made:
        assert (tmp_path / "layout/data" / path.name).read_bytes() == path.read_bytes()
    rows = [f"u{user},i{item},{10 * user + item}" for user in range(12) for item in range(8)]
    (tmp_path / "i.csv").write_text("\n".join(["who,item,timestamp", *rows]))
    (tmp_path / "m.csv").write_text("\n".join(["item,title", *(f"i{item},Title {item}" for item in range(8))]))
    table = [
        "--source",
        "table",
        "--interactions",
        tmp_path / "i.csv",
        "--items",
        tmp_path / "m.csv",
        "--column",
        "user=who",
    ]
    run("prepare", tmp_path / "T", *table)
    assert (tmp_path / "T/data/T.inter.json").read_bytes() == made[0].read_bytes()


def test_a_temporal_split_is_written_and_a_dry_run_writes_nothing(amazon: list[object], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--held-out 0\.1: expected two shares"):
        run(*amazon, "--split", "temporal", "--held-out", "0.1")
    temporal = [*amazon, "--split", "temporal", "--held-out", "0.35,0.2"]
    assert "split kind" in run(*temporal, "--dry-run")
    assert not (tmp_path / "D").exists()
    run(*temporal)
    split = json.loads((tmp_path / "D/data/D.split.json").read_text())
    assert split["users"]["u0"] == [8, None, None]
    assert split["users"]["u5"] == [3, 3, None]
    assert split["users"]["u9"] == [0, None, 5]


def test_reviews_are_kept_for_the_teacher_but_those_of_held_out_interactions(
    amazon: list[object], tmp_path: Path
) -> None:
    assert "18 reviews of 6 items" in run(*amazon, "--review-texts", "3")
    kept = pl.read_parquet(tmp_path / "D/data/D.reviews.parquet")
    assert set(kept["item"]) == {f"i{item}" for item in range(6)}


def test_bad_rows_stop_the_run_unless_they_are_allowed(amazon: list[object], tmp_path: Path) -> None:
    file = tmp_path / "R.json.gz"
    file.write_bytes(file.read_bytes() + gzip.compress(b"{torn\n" * 10))
    with pytest.raises(InputError, match=r"the first is row 97 \(not an object: '\{torn'\)"):
        run(*amazon)
    run(*amazon, "--bad-rows", "0.2")
    rejects = [json.loads(line) for line in (tmp_path / "D/data/D.rejects.jsonl").read_text().splitlines()]
    assert [reject["row"] for reject in rejects] == list(range(97, 107))


def test_prompts_are_written_next_to_the_data_set(tmp_path: Path) -> None:
    make_data(tmp_path)
    assert "rows test" in run("rl", tmp_path, "--rl-rows", "5", "--mode", "direct")
    assert len(pl.read_parquet(tmp_path / "small-rl-direct.parquet")) == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rl", "nowhere"], "holds no data set"),
        (["prepare", "D", "--source", "amazon2018"], "--source amazon2018 needs --interactions, --items"),
        (["prepare", "D", "--source", "recbole", "--items", "m"], "--source recbole needs"),
        (["prepare", "D", "--source", "movielens", "--items", "m"], "--source movielens takes no"),
        (["prepare", "D", "--source", "movielens", "--review-texts", "3"], "goes with the Amazon sources"),
        (
            ["prepare", "D", "--source=amazon2018", "--interactions=r.csv", "--items=m", "--review-texts=1"],
            "a file of ratings holds no texts",
        ),
        (["prepare", "D", "--source", "movielens", "--held-out", "0.2,0.2"], "goes with --split temporal"),
        (
            ["prepare", "D", "--source", "table", "--interactions", "i", "--items", "m", "--column", "user"],
            "NAME=VALUE",
        ),
        (
            ["prepare", "D", "--source", "table", "--interactions", "i", "--items", "m", *2 * ["--column", "item=b"]],
            "a name is given twice",
        ),
        (
            ["prepare", "D", "--source", "layout", "--interactions", "i", "--items", "m", "--column", "a=b"],
            "--source table",
        ),
        (
            ["prepare", "D", "--source", "layout", "--interactions", "i", "--items", "m", "--split", "temporal"],
            "it holds no times",
        ),
        (["prepare", "D", "--source=sequences", "--interactions=i", "--least-rating=4"], "holds no times or ratings"),
        (
            ["prepare", "D", "--source", "layout", "--interactions", "D/data/D.inter.json", "--items", "m"],
            "would be overwritten",
        ),
    ],
)
def test_a_wrong_call_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        run(*arguments)
    assert not list(tmp_path.iterdir())
