import json

import polars as pl
import pytest
from assets import TITLES, make_index, make_tiny_model
from rich.console import Console
from small_data import make_data
from transformers import AutoTokenizer

from data_processing.rl import write_prompts
from data_processing.sft.mix import MixOptions, write_mix
from gream_verl.cli import evaluate as cli_evaluate
from gream_verl.cli.main import main as cli
from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, write_json, write_text
from gream_verl.core.semantic_ids import ItemIndex, parse_token
from gream_verl.evaluation.prompts import make_prompts
from gream_verl.evaluation.results import Evaluation
from gream_verl.evaluation.run import report_run, resolve_model
from gream_verl.pipeline.runner import Step, run_steps


@pytest.fixture
def run(tmp_path):
    """A run whose trainings and evaluations are done."""
    folder = make_data(tmp_path / "data", users=40)
    write_mix(folder, MixOptions({"seqrec": 50, "reasoning": 20}))
    write_prompts(folder, seed=0)
    test = pl.read_parquet(folder.test).unnest("extra_info")
    users = test.filter(type="reasoning").select("user", "item").rows()
    items = list(folder.read_items())
    for stage in ("sft", "srpo"):
        for mode in ("direct", "reasoning"):
            rows = [
                {"user": user, "target": item, "recommended": items[:10], "scores": [0.0] * 10, "rsvr": 0.5,
                 "chains": [{"text": "<think>A < B</think><answer></answer>"}]}
                for user, item in users
            ]  # fmt: skip
            settings = {"mode": mode, "users": len(rows), "users_in_file": len(rows), "seed": 0}
            evaluation = Evaluation({"recall@10": 0.1, "rsvr": 0.5}, settings, rows)
            evaluation.save(tmp_path / "evaluation" / f"{stage}-{mode}.json")
    write_json(tmp_path / "sft" / "trainer_state.json", {"log_history": [{"step": 1, "loss": 2.0}, {"train_loss": 1}]})
    log = {"step": 1, "data": {"critic/rewards/mean": 0.1}}
    write_text(tmp_path / "srpo" / "logs" / "now" / "gream" / "srpo.jsonl", json.dumps(log) + "\n")
    return tmp_path


def test_a_report_is_made_of_a_run_that_the_pipeline_ran(run):
    run_steps(run, [Step("idle", "true")], Console(quiet=True))
    report_run(run, "small")
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics["results"]) == [
        "popularity", "co-occurrence", "SFT, direct", "SFT, reasoning", "SRPO, direct", "SRPO, reasoning",
    ]  # fmt: skip
    assert "idle" in metrics["details"]["Steps"]
    page = (run / "report.html").read_text()
    assert "A &lt; B" in page
    assert "SRPO: mean reward" in page


def test_a_report_takes_the_baselines_that_are_there(run):
    folder = run / "evaluation"
    report_run(run, "small")
    computed = read_json(run / "metrics.json")["results"]
    assert computed["popularity"]["breakdown"]
    assert "coverage@10" in computed["popularity"]["metrics"]
    rows = [
        {"user": row["user"], "target": row["target"], "recommended": [row["target"]]}
        for row in Evaluation.load(folder / "sft-direct.json").rows
    ]
    for name in ("popularity", "co-occurrence", "gru4rec"):
        Evaluation({"recall@10": 1.0}, {"mode": name, "users": len(rows), "k": 30}, rows).save(folder / f"{name}.json")
    report_run(run, "small")
    shown = read_json(run / "metrics.json")["results"]
    assert list(shown)[:3] == ["popularity", "co-occurrence", "gru4rec"]
    assert all(shown[name]["metrics"]["recall@10"] == 1 for name in ("popularity", "co-occurrence", "gru4rec"))
    assert computed["popularity"]["metrics"]["recall@10"] < 1
    Evaluation({"recall@10": 1.0}, {"mode": "popularity", "users": 3, "k": 30}, rows[:3]).save(
        folder / "popularity.json"
    )
    report_run(run, "small")
    assert read_json(run / "metrics.json")["results"]["popularity"] == computed["popularity"]


def test_a_run_without_its_evaluations_names_the_command(tmp_path):
    with pytest.raises(InputError, match="gream evaluate"):
        report_run(tmp_path, "small")


def test_the_latest_export_of_verl_is_found(tmp_path):
    exported = make_tiny_model(tmp_path / "srpo" / "global_step_4" / "actor" / "huggingface", make_index())
    write_text(tmp_path / "srpo" / "latest_checkpointed_iteration.txt", "4")
    assert resolve_model(tmp_path / "srpo") == exported
    assert resolve_model(exported) == exported
    write_text(tmp_path / "srpo" / "latest_checkpointed_iteration.txt", "5")
    with pytest.raises(InputError, match="hf_model"):
        resolve_model(tmp_path / "srpo")
    with pytest.raises(InputError, match="neither"):
        resolve_model(tmp_path)


WORDS = [*TITLES, "History: Had Next item? Think, then recommend the next item."]


@pytest.fixture(scope="module")
def authors(tmp_path_factory):
    """A data set and a checkpoint as the authors publish them: ids in the order of LC-Rec, *special* SID tokens."""
    root = tmp_path_factory.mktemp("authors")
    folder = make_data(root / "data")
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
        for prompt in make_prompts(folder.inter, index, "reasoning", split="val")[0]
    ]
    pl.DataFrame(rows).write_parquet(folder.val)
    make_tiny_model(root / "plain", index, texts=WORDS)
    make_tiny_model(root / "special", index, texts=WORDS)
    tokenizer = read_json(root / "special" / "tokenizer.json")
    for token in tokenizer["added_tokens"]:
        token["special"] = token["special"] or parse_token(token["content"]) is not None
    write_json(root / "special" / "tokenizer.json", tokenizer)
    kept = read_json(root / "special" / "generation_config.json")
    leaking = {"do_sample": True, "temperature": 0.1, "top_k": 1, "top_p": 0.1, "num_beams": 1, "max_new_tokens": 1}
    write_json(root / "special" / "generation_config.json", kept | leaking)
    return root


def evaluate(monkeypatch, capsys, root, *options, model="special", status=0):
    """Run `gream evaluate`; return its folder of results and what it printed."""
    output = root / "evaluation" / "-".join([model, *map(str, options)]).replace("/", "_")
    arguments = ["--model", root / model, "--data", root / "data", "--dataset", "small", "--output", output, *options]
    monkeypatch.setattr("sys.argv", ["gream", "evaluate", *map(str, arguments)])
    monkeypatch.setattr(cli_evaluate, "console", Console(width=300))
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as caught:
        cli.main()
    printed = capsys.readouterr()
    assert (caught.value.code or 0) == status, printed.err
    return output, printed.out + printed.err


def test_the_authors_files_evaluate_with_one_command(monkeypatch, capsys, authors):
    output, printed = evaluate(monkeypatch, capsys, authors, "--mode", "direct")
    evaluation = Evaluation.load(output / "model-direct.json")
    inter = read_json(authors / "data" / "small.inter.json")
    assert [(row["user"], row["target"]) for row in evaluation.rows] == [(user, row[-1]) for user, row in inter.items()]
    tokens = AutoTokenizer.from_pretrained(authors / "special")
    assert tokens.decode(tokens.encode("<|a_1|>"), skip_special_tokens=True) == "", "else this tests nothing"
    # Neither that tokens are special nor what generation_config.json says changes anything.
    plain = Evaluation.load(evaluate(monkeypatch, capsys, authors, "--mode", "direct", model="plain")[0]
                            / "model-direct.json")  # fmt: skip
    assert evaluation.rows == plain.rows
    # Floors of the same users stand beside, each with the protocol, which is printed, too.
    protocol = evaluation.settings["protocol"]
    assert protocol["prompts_are"] == "made of the interactions"
    for floor in ("popularity", "co-occurrence"):
        beside = Evaluation.load(output / f"{floor}.json")
        assert floor in printed
        assert not evaluation.disagreements(beside)
        assert beside.settings["protocol"]["template"] == protocol["template"]
    for value in (protocol["template"], "leave-one-out", "all items", protocol["index_sha256"]):
        assert value in printed


def test_the_prompts_of_the_authors_are_taken_where_they_are(monkeypatch, capsys, authors):
    options = ["--split", "val", "--engine", "hf", "--max-tokens", "6", "--beams", "4", "--chains", "2"]
    output, printed = evaluate(monkeypatch, capsys, authors, *options)
    assert not list(output.glob("model*-direct.json")), "validation is in reasoning mode"
    evaluation = Evaluation.load(output / "model-val-reasoning.json")
    inter = read_json(authors / "data" / "small.inter.json")
    assert [(row["user"], row["target"]) for row in evaluation.rows] == [
        (str(number), row[-2]) for number, row in enumerate(inter.values())
    ]
    protocol = evaluation.settings["protocol"]
    assert (protocol["split"], protocol["system"], protocol["template"], protocol["between_items"]) == (
        "val", "You reason about purchases.", "Had {history}. Next?", ", ",
    )  # fmt: skip
    assert protocol["seen"] == "the items that the prompt shows"
    assert all(len(row["chains"]) == 2 and len(row["recommended"]) == 4 for row in evaluation.rows)
    assert "You reason about purchases." in printed


def test_a_file_of_prompts_is_named_or_the_wording_is(monkeypatch, capsys, authors):
    named, _ = evaluate(monkeypatch, capsys, authors, "--prompts", authors / "data" / "small-val.parquet",
                        "--mode", "direct", "--limit", "3", "--seed", "1")  # fmt: skip
    evaluation = Evaluation.load(named / "model-direct.json")
    assert (evaluation.settings["users"], evaluation.settings["users_in_file"]) == (3, 12)
    assert evaluation.settings["protocol"]["split"] == "as in the file"
    worded, _ = evaluate(monkeypatch, capsys, authors, "--mode", "direct", "--history", "2", "--system", "Be brief.",
                         "--template", "After {history}?", "--keep-history", "--score", "items")  # fmt: skip
    settings = Evaluation.load(worded / "model-direct.json").settings
    told = {key: settings["protocol"][key] for key in ("history", "system", "template", "drop_history")}
    assert told == {"history": 2, "system": "Be brief.", "template": "After {history}?", "drop_history": False}
    assert settings["drop_history"] is False
    assert "items" in settings["score"]


def test_metrics_are_measured_at_the_lengths_asked_for(monkeypatch, capsys, authors):
    output, _ = evaluate(monkeypatch, capsys, authors, "--mode", "direct", "--cutoffs", "2,11", "--cutoffs", "20")
    for name in ("model-direct", "popularity", "co-occurrence"):
        evaluation = Evaluation.load(output / f"{name}.json")
        for k in (1, 2, 5, 10, 11, 20):
            found = sum(row["target"] in row["recommended"][:k] for row in evaluation.rows) / len(evaluation.rows)
            assert evaluation.metrics[f"recall@{k}"] == pytest.approx(found)
    _, printed = evaluate(monkeypatch, capsys, authors, "--beams", "5", "--cutoffs", "7", status=1)
    assert "--cutoffs 7: a list is only as long as --beams, 5" in printed
    _, printed = evaluate(monkeypatch, capsys, authors, "--cutoffs", "2,x", status=1)
    assert "--cutoffs 2,x: expected numbers of items" in printed


def test_nothing_is_measured_beyond_the_beams(monkeypatch, capsys, authors):
    output, _ = evaluate(monkeypatch, capsys, authors, "--mode", "direct", "--beams", "4", "--cutoffs", "3")
    evaluation = Evaluation.load(output / "model-direct.json")
    assert {metric.partition("@")[2] for metric in evaluation.metrics} == {"1", "3", ""}
    assert list(evaluation.intervals) == ["rsvr"]
    output, _ = evaluate(monkeypatch, capsys, authors, "--mode", "direct", "--beams", "12")
    for name in ("model-direct", "popularity", "co-occurrence"):
        assert {len(row["recommended"]) for row in Evaluation.load(output / f"{name}.json").rows} == {12}


def test_without_interactions_there_are_no_floors(monkeypatch, capsys, authors, tmp_path):
    for name in ("small.index.json", "small-val.parquet"):
        write_text(tmp_path / "data" / "x", "")
        (tmp_path / "data" / name).write_bytes((authors / "data" / name).read_bytes())
    (tmp_path / "special").symlink_to(authors / "special")
    output, printed = evaluate(monkeypatch, capsys, tmp_path, "--split", "val", "--mode", "reasoning", "--engine", "hf",
                               "--max-tokens", "2")  # fmt: skip
    assert "No floors: " in printed
    assert not (output / "popularity.json").exists()
    assert Evaluation.load(output / "model-val-reasoning.json").settings["protocol"]["held_out"] == "as in the file"
    _, printed = evaluate(monkeypatch, capsys, tmp_path, status=1)
    assert "small.inter.json: no such file" in printed


def test_baselines_are_shown_for_the_users_of_the_evaluation(monkeypatch, capsys, authors):
    whole, printed = evaluate(monkeypatch, capsys, authors, "--mode", "direct")
    assert "gru4rec" not in printed
    popular = Evaluation.load(whole / "popularity.json")
    options = ["--mode", "direct", "--limit", "6", "--cutoffs", "3"]
    output, _ = evaluate(monkeypatch, capsys, authors, *options)
    popular.save(output / "gru4rec.json")
    told = popular.settings["protocol"] | {"split": "as in the file", "template": "another"}
    Evaluation(popular.metrics, popular.settings | {"protocol": told}, popular.rows).save(output / "sasrec.json")
    lines = evaluate(monkeypatch, capsys, authors, *options)[1].splitlines()
    cells = {line.split()[0]: line.split()[1:] for line in lines if line.startswith(("popularity", "gru", "sas"))}
    assert cells["gru4rec"] == cells["sasrec"] == cells["popularity"]
    assert cells["popularity"][-1] == "6"
    Evaluation(popular.metrics, popular.settings | {"users": 5}, popular.rows[:5]).save(output / "sasrec.json")
    printed = evaluate(monkeypatch, capsys, authors, *options)[1]
    assert "users in common" in next(line for line in printed.splitlines() if line.startswith("Not shown: "))
    assert "sasrec" not in printed.replace("sasrec.json", "")


def test_results_of_another_protocol_are_not_lost(monkeypatch, capsys, authors, tmp_path):
    def run(*options, status=0):
        arguments = ["--mode", "direct", "--output", tmp_path / "evaluation", *options]
        return " ".join(evaluate(monkeypatch, capsys, authors, *arguments, status=status)[1].split())

    run()
    run("--batch-size", "3")  # the same protocol
    kept = Evaluation.load(tmp_path / "evaluation" / "model-direct.json")
    run("--split", "val")
    names = {path.stem for path in (tmp_path / "evaluation").glob("*.json")}
    assert names == {"model-direct", "model-val-direct", "popularity", "popularity-val", "co-occurrence",
                     "co-occurrence-val"}  # fmt: skip
    printed = run("--limit", "3", status=1)
    assert "popularity.json: holds a result that cannot be compared with this one (3 of 12 users in common)" in printed
    printed = run("--history", "2", status=1)
    assert "another --output or --name, or replace it by --overwrite" in printed
    assert Evaluation.load(tmp_path / "evaluation" / "model-direct.json") == kept
    run("--history", "2", "--name", "short")
    run("--limit", "3", "--overwrite")
    assert len(Evaluation.load(tmp_path / "evaluation" / "popularity.json").rows) == 3
    # What was made of a file that has changed since is out of date.
    for name in ("model-direct", "popularity", "co-occurrence"):
        old = Evaluation.load(tmp_path / "evaluation" / f"{name}.json")
        protocol = old.settings["protocol"] | {"index_sha256": "another"}
        Evaluation(old.metrics, old.settings | {"protocol": protocol}, old.rows).save(
            tmp_path / "evaluation" / f"{name}.json"
        )
    run()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--template", "Next?"], "--template 'Next?': has no {history}"),
        (["--prompts", "x.parquet", "--history", "3"], "--prompts x.parquet: its prompts have a wording already"),
        (["--beams", "0", "--mode", "direct"], "--beams 0 goes with --mode reasoning only"),
        (["--prompts", "x.parquet"], "x.parquet: no such file"),
    ],
)
def test_options_that_do_not_go_together_are_refused(monkeypatch, capsys, authors, options, sentence):
    assert sentence in " ".join(evaluate(monkeypatch, capsys, authors, *options, status=1)[1].split())


def test_modes_of_different_users_do_not_share_a_table(monkeypatch, capsys, authors):
    rows = pl.read_parquet(authors / "data" / "small-val.parquet").to_dicts()
    for number, row in enumerate(rows):
        row["extra_info"]["type"] = "direct" if number % 2 else "reasoning"
    pl.DataFrame(rows).write_parquet(authors / "odd.parquet")
    printed = evaluate(monkeypatch, capsys, authors, "--prompts", authors / "odd.parquet", status=1)[1]
    assert "its users differ between the modes; evaluate one --mode at a time" in " ".join(printed.split())
