from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from gream_verl.core.errors import InputError
from gream_verl.evaluation.options import EvaluationOptions, read_options


def test_the_line_overrides_the_file_and_the_file_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.yaml"
    file.write_text("beams: 5\nmodes: [direct]\nprompts: x.parquet\ncutoffs: [3]\n")
    options = read_options(file, {"beams": 7, "seed": None})
    assert options == EvaluationOptions(beams=7, modes=("direct",), prompts=Path("x.parquet"), cutoffs=(3,))
    assert read_options(None, {}) == EvaluationOptions()
    file.write_text("")
    assert read_options(file, {}) == EvaluationOptions()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("beamz: 5", "evaluation.yaml.beamz: .*known keys are modes, split, .*beams"),
        ("temperature: -1", "evaluation.yaml.temperature: "),
        ("{temperature: 0, chains: 2}", "are one chain"),
        ("modes: [thinking]", "evaluation.yaml.modes.0: "),
        ("[1, 2]", "expected one option per line"),
        ("beams: [", "not valid YAML"),
        ("engine: server", "needs an endpoint"),
        ("endpoint: http://x/v1", "no other engine takes one"),
        ("beams: 0", "reasoning mode only"),
        ("{beams: 5, cutoffs: [7]}", "only as long as beams, 5"),
        ("cutoffs: [0]", "evaluation.yaml.cutoffs.0: "),
        ("template: Next?", r"has no \{history\}"),
        ("{prompts: x.parquet, history: 3}", "x.parquet: its prompts have a wording"),
    ],
)
def test_options_that_cannot_be_used_are_named(tmp_path: Path, text: str, sentence: str) -> None:
    file = tmp_path / "evaluation.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=sentence):
        read_options(file, {})


def test_free_answers_alone_need_no_beams() -> None:
    assert read_options(None, {"beams": 0, "modes": ["reasoning"]}).beams == 0


def test_the_documented_file_holds_all_options_with_their_defaults(tmp_path: Path) -> None:
    page = (Path(__file__).parents[4] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    file = tmp_path / "evaluation.yaml"
    file.write_text(page.partition("```yaml\n")[2].partition("```")[0])
    assert list(yaml.safe_load(file.read_text())) == list(EvaluationOptions.model_fields)
    assert read_options(file, {}) == EvaluationOptions(modes=("direct", "reasoning"))
