import json

import polars as pl
import pytest
from assets import make_index, make_tiny_model
from small_data import make_data

from data_processing.rl import write_prompts
from data_processing.sft.mix import write_mix
from gream_verl.evaluation.results import Evaluation
from gream_verl.evaluation.run import report_run, resolve_model
from gream_verl.files import InputError, write_json, write_text
from gream_verl.steps import Pipeline, Step


@pytest.fixture
def run(tmp_path):
    """A run whose trainings and evaluations are done."""
    folder = make_data(tmp_path / "data", users=40)
    write_mix(folder, rows={"seqrec": 50, "reasoning": 20}, seed=0)
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
    Pipeline(run).run([Step("idle", "Idle", ["true"])])
    report_run(run, "small")
    metrics = json.loads((run / "metrics.json").read_text())
    assert list(metrics["results"]) == [
        "popularity", "co-occurrence", "SFT, direct", "SFT, reasoning", "SRPO, direct", "SRPO, reasoning",
    ]  # fmt: skip
    assert "idle" in metrics["details"]["Steps"]
    page = (run / "report.html").read_text()
    assert "A &lt; B" in page
    assert "SRPO: mean reward" in page


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
