"""Against RecBole itself, where its environment is present (`make recbole`)."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_files import load_benchmark

from gream_verl.core.errors import InputError
from gream_verl.evaluation.metrics import coverage, rank_of, ranking_metrics
from gream_verl.evaluation.prompts import Prompt
from gream_verl.evaluation.results import Evaluation

sasrec = load_benchmark("baselines/sasrec.py")
try:
    PYTHON = sasrec.recbole_python()
except InputError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]

EVALUATE = """
import json, sys
import numpy as np
import torch
from recbole.config import Config
from recbole.evaluator import Collector, Evaluator

folder = sys.argv.pop()
cutoffs = [1, 5, 10, 20]
config = Config(model="SASRec", dataset="none", config_dict={
    "metrics": ["Recall", "NDCG", "MRR", "Precision", "Hit", "ItemCoverage"], "topk": cutoffs,
    "metric_decimal_place": 12, "train_neg_sample_args": None,
})
collector = Collector(config)
scores, targets = np.load(folder + "/scores.npy"), np.load(folder + "/targets.npy")
for rows in np.array_split(np.arange(len(scores)), 3):
    collector.eval_batch_collect(
        torch.tensor(scores[rows]), None, torch.arange(len(rows)), torch.tensor(targets[rows])
    )
struct = collector.get_data_struct()
struct.set("data.num_items", scores.shape[1])  # RecBole itself counts its padding as an item, too
print(json.dumps({name: float(value) for name, value in Evaluator(config).evaluate(struct).items()}))
"""

ITEMS = 30


def in_recbole(folder: Path, script: str, *arguments: str) -> str:
    file = folder / "script.py"
    file.write_text(script)
    command = [os.fspath(PYTHON), "-I", "-W", "ignore", os.fspath(file), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_metrics_are_those_of_recboles_evaluator(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    users, items = 200, 300
    scores = generator.permuted(np.tile(np.arange(items, dtype=np.float32), (users, 1)), axis=1)
    targets = generator.integers(items, size=users)
    scores[np.arange(0, users, 2), targets[::2]] = items - generator.integers(40, size=users // 2) - 0.5
    np.save(tmp_path / "scores.npy", scores)
    np.save(tmp_path / "targets.npy", targets)
    theirs = json.loads(in_recbole(tmp_path, EVALUATE, str(tmp_path)))

    lists = [[str(item) for item in np.argsort(-row)[:20]] for row in scores]
    ranks = [rank_of(str(target), ranking) for target, ranking in zip(targets, lists, strict=True)]
    cutoffs = (1, 5, 10, 20)
    ours = ranking_metrics(ranks, cutoffs)
    ours |= {f"hit@{k}": ours[f"recall@{k}"] for k in cutoffs}
    ours |= {f"itemcoverage@{k}": coverage(lists, {str(item) for item in range(items)}, k) for k in cutoffs}
    assert ours == pytest.approx(theirs, abs=1e-10)
    assert 0.05 < ours["recall@10"] < 0.95  # neither all hits nor none


@pytest.fixture(scope="module")
def interactions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users who take one item after the other, in a circle."""
    file = tmp_path_factory.mktemp("circle") / "circle.inter.json"
    users = {
        f"u{number}": [f"item {(number + step) % ITEMS}" for step in range(4 + number % 7)] for number in range(120)
    }
    file.write_text(json.dumps(users))
    return file


def evaluate(interactions: Path, model: str = "SASRec", **options: Any) -> Evaluation:
    parameters = {"train_batch_size": 32, "MAX_ITEM_LIST_LENGTH": 6, **options.pop("parameters", {})}
    users = json.loads(interactions.read_text())
    prompts = [Prompt(user, items[-1], tuple(items[:-1]), [], "") for user, items in reversed(users.items())]
    index = options.pop("items", {f"item {number}" for number in range(ITEMS)})
    protocol = options.pop("protocol", {"drop_history": True})
    return sasrec.evaluate_recbole(
        interactions, prompts, index, protocol, model=model, parameters=parameters, k=12, **options
    )


def test_sasrec_learns_and_recommends_as_the_protocol_says(interactions: Path) -> None:
    first = evaluate(interactions, parameters={"epochs": 25, "hidden_dropout_prob": 0.1, "learning_rate": 0.005})
    users = json.loads(interactions.read_text())
    assert [row["user"] for row in first.rows] == [*reversed(users)]
    for row in first.rows:
        items = users[row["user"]]
        assert (row["target"], row["history_length"]) == (items[-1], len(items) - 1)
        assert not set(row["recommended"]) & set(items[:-1])
        assert len(set(row["recommended"])) == 12
        assert row["scores"] == sorted(row["scores"], reverse=True)
    assert first.metrics["recall@1"] > 0.8
    assert {name: first.settings["recbole_metrics"][name] for name in first.metrics} == pytest.approx(first.metrics)
    assert first.settings["best_epoch"] <= first.settings["epochs"] <= 25


def test_the_same_seed_gives_the_same_lists_and_time_limits_the_training(interactions: Path) -> None:
    first, again, other = (evaluate(interactions, minutes=0, seed=seed) for seed in (1, 1, 2))
    assert first.rows == again.rows
    assert first.metrics == again.metrics
    assert first.rows != other.rows
    settings = first.settings
    assert (settings["epochs"], settings["best_epoch"], settings["stopped_by"]) == (1, 1, "minutes")


def test_another_model_and_kept_histories(interactions: Path) -> None:
    protocol = {"drop_history": False, "users_in_file": 500}
    index = {f"item {number}" for number in range(5, ITEMS)}
    evaluation = evaluate(interactions, "BERT4Rec", items=index, parameters={"epochs": 2}, protocol=protocol)
    assert all(set(row["recommended"]) < index for row in evaluation.rows)
    assert evaluation.settings["mode"] == "BERT4Rec"
    assert evaluation.settings["protocol"] == protocol
    users = json.loads(interactions.read_text())
    assert any(set(row["recommended"]) & set(users[row["user"]][:-1]) for row in evaluation.rows)


@pytest.mark.parametrize(
    ("model", "parameters", "message"),
    [
        ("BPR", {}, "no such sequential model; there are .*, SASRec,"),
        ("SASRec", {"hiden_size": 32}, "SASRec has no parameter hiden_size"),
        ("SASRec", {"topk": 5}, "topk: fixed by the comparison"),
    ],
)
def test_what_recbole_lacks_is_refused(
    interactions: Path, model: str, parameters: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=rf"could not train {model}.*{message}"):
        evaluate(interactions, model, parameters=parameters)
