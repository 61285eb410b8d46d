from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_data import make_data
from typer.testing import CliRunner

from gream_verl.cli.main import app
from gream_verl.core.errors import InputError

RUNNER = CliRunner()
TEACHER = ["--model", "m", "--endpoint", "http://127.0.0.1:9/v1"]


def enrich(*arguments: Any) -> str:
    result = RUNNER.invoke(app, ["data", "enrich", *map(str, arguments)])
    if result.exception:
        raise result.exception
    return result.output


def test_an_estimate_with_ones_own_prompts_asks_nobody_and_writes_nothing(tmp_path: Path) -> None:
    folder = make_data(tmp_path / "run/data")
    result = RUNNER.invoke(app, ["data", "prompts", str(tmp_path / "mine")])
    assert (result.exit_code, (tmp_path / "mine/chain.txt").is_file()) == (0, True)
    (tmp_path / "mine/item.txt").write_text("$title")
    before = sorted(folder.root.iterdir())
    arguments = [tmp_path / "run", "items", *TEACHER, "--dry-run"]
    long, short = enrich(*arguments), enrich(*arguments, "--prompts", tmp_path / "mine")
    assert all("to ask" in out and "60" in out for out in (long, short))
    assert long != short
    assert sorted(folder.root.iterdir()) == before


@pytest.mark.parametrize(
    ("settings", "options", "said"),
    [
        ("model: m\nendpoint: http://x\nmax_tokens: 7", [], None),
        ("model: m", ["--endpoint", "http://x"], None),
        ("model: m", [], "endpoint: Field required"),
        ("max_tokens: 0", TEACHER, "max_tokens: Input should be greater"),
        ("top_k: 5", TEACHER, "top_k: Extra inputs.*known keys are model"),
        ("model: [", [], "not valid YAML"),
        ("7", [], "expected one option per line"),
    ],
)
def test_settings_come_from_a_file_and_from_the_line(
    tmp_path: Path, settings: str, options: list[str], said: str | None
) -> None:
    make_data(tmp_path / "run/data")
    (tmp_path / "teacher.yaml").write_text(settings)
    arguments = [tmp_path / "run", "items", "-c", tmp_path / "teacher.yaml", *options, "--dry-run"]
    if said is None:
        assert "60" in enrich(*arguments)
    else:
        with pytest.raises(InputError, match=f"(?s)teacher.yaml.*{said}"):
            enrich(*arguments)
