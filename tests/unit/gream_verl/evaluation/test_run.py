"""`gream evaluate` on a data set and checkpoints as the authors publish them."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import yaml
from assets import TITLES, make_index, make_tiny_model
from rich.console import Console
from small_data import make_data
from transformers import AutoTokenizer
from typer.testing import CliRunner

from gream_verl.cli.evaluate import evaluate_app
from gream_verl.core.data_folder import Item
from gream_verl.core.errors import InputError
from gream_verl.core.faithfulness import ClaimReader
from gream_verl.core.files import read_json, write_json
from gream_verl.core.semantic_ids import ItemIndex, parse_token
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.prompts import Prompt, make_prompts
from gream_verl.evaluation.results import Evaluation
from gream_verl.evaluation.run import faithful_shares

WORDS = [*TITLES, "History: Had Next item? Think, then recommend the next item."]


@pytest.fixture(scope="module")
def authors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose data lie in the folder itself: ids in the order of LC-Rec, *special* SID tokens."""
    root = tmp_path_factory.mktemp("authors")
    folder = make_data(root)
    index = ItemIndex.load(folder.index)
    rows = [
        {
            "data_source": "small",
            "prompt": [
                {"role": "system", "content": "You reason about purchases."},
                {"role": "user", "content": f"Had {', '.join(index.texts(prompt.history[-5:]))}. Next?"},
            ],
            "ability": "recommendation",
            "reward_model": {"style": "rule", "ground_truth": f"<answer>{prompt.truth}</answer>"},
            "extra_info": {"title": "A title", "type": "RL"},
        }
        for prompt in make_prompts(folder.inter, "reasoning", EvaluationOptions(split="val"), index)[0]
    ]
    pl.DataFrame(rows).write_parquet(folder.val)
    for name in ("plain", "special"):
        make_tiny_model(root / name, index, texts=WORDS)
    tokenizer = read_json(root / "special" / "tokenizer.json")
    for token in tokenizer["added_tokens"]:
        token["special"] = token["special"] or parse_token(token["content"]) is not None
    write_json(root / "special" / "tokenizer.json", tokenizer)
    kept = read_json(root / "special" / "generation_config.json")
    leaking = {"do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.1, "num_beams": 1, "max_new_tokens": 1}
    write_json(root / "special" / "generation_config.json", kept | leaking)
    return root


@pytest.fixture
def run(authors: Path, tmp_path: Path) -> Path:
    """A new folder with the authors' files, so that results of other tests are not there."""
    for path in authors.iterdir():
        if path.name != "evaluation":
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def evaluate(run: Path, *options: object, model: str | None = "special", **config: Any) -> str:
    """Run `gream evaluate` and return its text; raise its error."""
    console = Console(width=300, record=True, file=io.StringIO())
    arguments = ["evaluate", str(run), *([str(run / model)] if model else []), *map(str, options)]
    if config:
        (run / "evaluation.yaml").write_text(yaml.safe_dump(config))
        arguments += ["-c", str(run / "evaluation.yaml")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gream_verl.cli.evaluate.console", console)
        result = CliRunner().invoke(evaluate_app, arguments)
    if result.exception is not None:
        raise result.exception
    return console.export_text()


def load(run: Path, name: str) -> Evaluation:
    return Evaluation.load(run / "evaluation" / f"{name}.json")


def test_the_authors_files_evaluate_with_one_command(run: Path) -> None:
    printed = evaluate(run, "--mode", "direct", cutoffs=[2, 11])
    evaluation = load(run, "special-direct")
    inter = read_json(run / "small.inter.json")
    assert [(row["user"], row["target"]) for row in evaluation.rows] == [(user, row[-1]) for user, row in inter.items()]
    tokens = AutoTokenizer.from_pretrained(run / "special")
    assert tokens.decode(tokens.encode("<|a_1|>"), skip_special_tokens=True) == "", "else this tests nothing"
    # Neither that tokens are special nor what generation_config.json says changes anything.
    evaluate(run, "--mode", "direct", "--name", "other", model="plain")
    assert evaluation.rows == load(run, "other-direct").rows
    # Floors of the same users stand next to it, each with the protocol, which is printed, too.
    protocol = evaluation.settings["protocol"]
    assert protocol["prompts_are"] == "made of the interactions"
    for value in ("popularity", "co-occurrence", protocol["template"], "leave-one-out", protocol["index_sha256"]):
        assert value in printed
    evaluate(run, "--mode", "direct", cutoffs=[2, 11])
    for name in ("popularity", "co-occurrence", "special-direct"):
        one = load(run, name)
        assert not evaluation.disagreements(one)
        assert one.settings["protocol"]["template"] == protocol["template"]
        for k in (1, 2, 5, 10, 11):
            found = sum(row["target"] in row["recommended"][:k] for row in one.rows) / len(one.rows)
            assert one.metrics[f"recall@{k}"] == pytest.approx(found)
        assert one.intervals


def test_floors_need_no_model_and_no_index(run: Path) -> None:
    evaluate(run, "--mode", "direct")
    beside = load(run, "co-occurrence")
    shutil.rmtree(run / "evaluation")
    for path in run.glob("*.index.json"):
        path.unlink()
    console = Console(width=200, record=True, file=io.StringIO())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gream_verl.cli.evaluate.console", console)
        assert CliRunner().invoke(evaluate_app, ["floors", str(run)]).exit_code == 0
    assert "popularity" in console.export_text()
    assert load(run, "co-occurrence").rows == beside.rows


def test_validation_is_in_reasoning_mode_on_the_prompts_of_the_authors(run: Path) -> None:
    printed = evaluate(run, "--max-tokens", 6, "--beams", 4, "--chains", 2, split="val", engine="hf")
    assert not list((run / "evaluation").glob("*-direct.json"))
    evaluation = load(run, "special-val-reasoning")
    inter = read_json(run / "small.inter.json")
    assert [(row["user"], row["target"]) for row in evaluation.rows] == [
        (str(number), row[-2]) for number, row in enumerate(inter.values())
    ]
    protocol = evaluation.settings["protocol"]
    assert (protocol["split"], protocol["system"], protocol["template"]) == (
        "val", "You reason about purchases.", "Had {history}. Next?",
    )  # fmt: skip
    assert protocol["seen"] == "the items that the prompt shows"
    assert all(len(row["chains"]) == 2 and len(row["recommended"]) == 4 for row in evaluation.rows)
    assert (evaluation.settings["prompts"], evaluation.settings["users_in_file"]) == (
        str(run / "small-val.parquet"),
        12,
    )
    assert "You reason about purchases." in printed
    assert (run / "evaluation" / "popularity-val.json").is_file()


def test_a_file_of_prompts_is_named_or_the_wording_is(run: Path) -> None:
    prompts = run / "small-val.parquet"
    evaluate(run, "--prompts", prompts, "--mode", "direct", "--limit", 3, "--seed", 1, "--name", "named")
    named = load(run, "named-direct").settings
    assert (named["users"], named["users_in_file"], named["protocol"]["split"]) == (3, 12, "as in the file")
    worded = {"history": 2, "system": "Be brief.", "template": "After {history}?"}
    evaluate(run, "--mode", "direct", "--overwrite", drop_history=False, score="items", **worded)
    settings = load(run, "special-direct").settings
    assert {key: settings["protocol"][key] for key in worded} == worded
    assert settings["drop_history"] is settings["protocol"]["drop_history"] is False
    assert "items" in settings["score"]


def test_the_default_is_srpo_if_it_holds_a_checkpoint_else_sft(run: Path) -> None:
    (run / "sft").symlink_to(run / "plain")
    evaluate(run, "--mode", "direct", model=None)
    exported = run / "srpo" / "global_step_4" / "actor"
    exported.mkdir(parents=True)
    (exported / "huggingface").symlink_to(run / "plain")
    (run / "srpo" / "latest_checkpointed_iteration.txt").write_text("4")
    evaluate(run, "--mode", "direct", model=None)
    assert load(run, "srpo-direct").rows == load(run, "sft-direct").rows


def test_baselines_are_shown_for_the_users_of_the_evaluation(run: Path) -> None:
    assert "gru4rec" not in evaluate(run, "--mode", "direct")
    popular = load(run, "popularity")
    popular.save(run / "evaluation" / "gru4rec.json")
    Evaluation(popular.metrics, popular.settings | {"users": 5}, popular.rows[:5]).save(
        run / "evaluation" / "sasrec.json"
    )
    lines = evaluate(run, "--mode", "direct").splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(("popularity", "gru", "sas"))}
    assert cells.keys() == {"popularity", "gru4rec"}
    assert cells["gru4rec"] == cells["popularity"]
    assert "WARNING: sasrec cannot be compared with special-direct: 5 of 12 users in common." in lines


def test_results_of_another_protocol_are_not_lost(run: Path) -> None:
    evaluate(run, "--mode", "direct")
    evaluate(run, "--mode", "direct", batch_size=3)  # the same protocol
    kept = load(run, "special-direct")
    with pytest.raises(InputError, match=r"special-direct.json: holds another result \(3 of 12 users in common\)"):
        evaluate(run, "--mode", "direct", "--limit", 3)
    with pytest.raises(InputError, match=r"popularity.json: holds another result \(3 of 12 users in common\)"):
        evaluate(run, "--mode", "direct", "--limit", 3, "--name", "other")
    with pytest.raises(InputError, match=r"special-direct.json: .*; choose a --name or add --overwrite"):
        evaluate(run, "--mode", "direct", history=2)
    with pytest.raises(InputError, match=r"special-direct.json: holds another result \(the system differs\)"):
        evaluate(run, "--mode", "direct", system="Be brief.")
    assert load(run, "special-direct") == kept
    evaluate(run, "--mode", "direct", "--name", "short", history=2)
    evaluate(run, "--mode", "direct", "--limit", 3, "--overwrite")
    assert len(load(run, "popularity").rows) == 3


def test_modes_of_different_users_do_not_share_a_table(run: Path) -> None:
    rows = pl.read_parquet(run / "small-val.parquet").to_dicts()
    for number, row in enumerate(rows):
        row["extra_info"]["type"] = "direct" if number % 2 else "reasoning"
    pl.DataFrame(rows).write_parquet(run / "odd.parquet")
    with pytest.raises(InputError, match="its users differ between the modes; evaluate one mode at a time"):
        evaluate(run, "--prompts", run / "odd.parquet")


def test_chains_are_read_against_the_history_that_the_prompt_shows():
    index = make_index()
    items = {item: Item(f"Title {item} of one", categories=("Crime",)) for item in index.sids}
    question = {"role": "user", "content": f"History: {index.text('2')}{index.text('3')} Next?"}
    prompt = Prompt("u", "4", ("1", "2", "3"), [question], index.text("4"))
    chains = [
        {"text": f"<think>Crime {count}.</think>{index.text('2')}<answer>{index.text('4')}</answer>"}
        for count in (2, 3)
    ]
    evaluation = Evaluation({}, {}, [{"user": "u", "chains": chains}])
    shares = faithful_shares(evaluation, [prompt], ClaimReader(items, index), index)
    assert shares == {"faithful": 0.5, "true count": 0.5, "true denoised item": 1.0, "true order": 1.0}
