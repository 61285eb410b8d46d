"""Trains one of RecBole's sequential models and ranks all items by it: run by ``recbole_baseline`` in RecBole's own
environment, so it imports nothing of this package.

Called as ``python recbole_worker.py JOB``, where JOB is a JSON file (see ``recbole_baseline``). It prints a JSON line
after every epoch and at the end; RecBole's log goes to the standard error.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import recbole
import torch
import yaml
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.evaluator import Collector, Evaluator
from recbole.model import sequential_recommender
from recbole.utils import get_trainer, init_seed
from recbole.utils.logger import RemoveColorFilter

METRICS = ["Recall", "NDCG", "MRR", "Precision", "Hit"]
"""Without ItemCoverage and AveragePopularity: RecBole's collector fails on the counts that they need."""
PROTOCOL = {
    "benchmark_filename": ["train", "valid", "test"],
    "alias_of_item_id": ["item_id_list"],
    "load_col": {"inter": ["user_id", "item_id_list", "item_id"], "item": ["item_id"]},
    "eval_args": {"split": {"LS": "valid_and_test"}, "group_by": None, "order": "TO", "mode": "full"},
    "metrics": METRICS,
    "metric_decimal_place": 12,
    "show_progress": False,
    "save_dataset": False,
}
"""Fixed settings of the comparison, next to those of the job: our split, all items candidates."""


class OutOfTimeError(Exception):
    """The minutes given are over."""


MODELS: dict[str, Any] = {
    name: model for name, model in vars(sequential_recommender).items() if hasattr(model, "full_sort_predict")
}


def configure(job: dict[str, Any]) -> Config:
    """Return RecBole's configuration: its defaults for the model, then the job's parameters, then the protocol.

    Raises:
        ValueError: When there is no such sequential model, or a parameter is not one of its.
    """
    name = job["model"]
    if name not in MODELS:
        raise ValueError(f"no such sequential model; there are {', '.join(sorted(MODELS))}")
    fixed = {**PROTOCOL, "seed": job["seed"], "topk": job["cutoffs"], "valid_metric": job["valid_metric"]}
    if taken := [key for key in job["parameters"] if key in fixed]:
        raise ValueError(f"{', '.join(taken)}: fixed by the comparison")
    settings = {**job["parameters"], **fixed, "data_path": job["data"]}
    defaults = model_defaults(name)
    if {**defaults, **job["parameters"]}.get("loss_type", "CE") == "CE":
        settings["train_neg_sample_args"] = None
    config = Config(model=name, dataset=job["dataset"], config_dict=settings)
    known = {key for keys in config.parameters.values() for key in keys} | defaults.keys()
    if unknown := [key for key in job["parameters"] if key not in known]:
        raise ValueError(f"RecBole's {name} has no parameter {', '.join(unknown)}")
    return config


def model_defaults(name: str) -> dict[str, Any]:
    """Return the hyperparameters of a model and RecBole's values of them."""
    path = Path(recbole.__file__).parent / "properties" / "model" / f"{name}.yaml"
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.is_file() else {}


def train(trainer: Any, train_data: Any, valid_data: Any, minutes: float | None) -> dict[str, Any]:
    """Train until RecBole stops, or the time is over, and leave the trainer's model as it was after its best epoch.

    Returns:
        ``epochs``, ``best_epoch`` (from 1), ``valid_score`` of it, ``stopped_by`` and the seconds of all epochs.
    """
    begin = time.perf_counter()
    best: dict[str, Any] = {"score": -np.inf}
    done = 0

    def after_epoch(epoch: int, score: float) -> None:
        nonlocal done
        done = epoch + 1
        if score >= best["score"]:
            best.update(score=score, epoch=done, state=copy.deepcopy(trainer.model.state_dict()))
        tell(epoch=done, epochs=trainer.epochs, loss=float(trainer.train_loss_dict[epoch]), score=float(score))
        if minutes is not None and time.perf_counter() - begin > 60 * minutes:
            raise OutOfTimeError

    # Nothing is saved: RecBole's checkpoints are pickles, which torch no longer loads by default.
    stopped_by = "epochs"
    try:
        trainer.fit(train_data, valid_data, saved=False, show_progress=False, callback_fn=after_epoch)
        if done < trainer.epochs:
            stopped_by = "validation"
    except OutOfTimeError:
        stopped_by = "minutes"
    trainer.model.load_state_dict(best["state"])
    return {
        "epochs": done,
        "best_epoch": best["epoch"],
        "valid_score": float(best["score"]),
        "stopped_by": stopped_by,
        "seconds": round(time.perf_counter() - begin, 2),
    }


@torch.no_grad()
def rank(
    trainer: Any, config: Config, train_data: Any, test_data: Any, dropped: list[np.ndarray]
) -> tuple[dict[str, float], np.ndarray, np.ndarray, np.ndarray]:
    """Rank all items for every test row, without those to drop.

    Args:
        trainer: Holds the trained model.
        config: As the model was trained.
        train_data: For the popularity of items.
        test_data: n rows, in the order of the file.
        dropped: Items (our numbers) never recommended, for each row.

    Returns:
        RecBole's metrics of these rankings; the users [n] and the items [n, k] by our numbers, k the largest cut-off,
        -1 where none is left; the scores [n, k], float32.
    """
    dataset = test_data._dataset
    user_field, item_field = dataset.uid_field, dataset.iid_field
    numbers = np.array([-1, *map(int, dataset.field2id_token[item_field][1:])])
    internal = np.empty(len(numbers) - 1, dtype=np.int64)
    internal[numbers[1:]] = np.arange(1, len(numbers))

    trainer.model.eval()
    trainer.tot_item_num = dataset.item_num
    collector, evaluator = Collector(config), Evaluator(config)
    collector.data_collect(train_data)
    users, items, values = [], [], []
    row = 0
    for batch in test_data:
        interaction, scores, positive_u, positive_i = trainer._full_sort_batch_eval(batch)
        for place in range(len(scores)):
            scores[place, internal[dropped[row + place]]] = -np.inf
        row += len(scores)
        collector.eval_batch_collect(scores, interaction, positive_u, positive_i)
        top = torch.topk(scores, max(config["topk"]), dim=-1)  # the same call as the collector's
        users += dataset.id2token(user_field, interaction[user_field].cpu()).tolist()
        items.append(np.where(np.isneginf(top.values.cpu()), -1, numbers[top.indices.cpu()]))
        values.append(top.values.float().cpu().numpy())
    metrics = evaluator.evaluate(collector.get_data_struct())
    return (
        {name: float(value) for name, value in metrics.items()},
        np.array(users, dtype=np.int64),
        np.concatenate(items).astype(np.int32),
        np.concatenate(values),
    )


def tell(**message: Any) -> None:
    """Print a JSON line for the process that waits."""
    print(json.dumps(message), flush=True, file=sys.__stdout__)


def main(job_file: str) -> None:
    """Do the job, and write the lists to the file that it names."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(RemoveColorFilter())
    logging.basicConfig(level=logging.INFO, handlers=[handler], format="%(asctime)s %(message)s")

    config = configure(job)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    train_data, valid_data, test_data = data_preparation(config, dataset)
    init_seed(config["seed"], config["reproducibility"])
    model = MODELS[config["model"]](config, train_data._dataset).to(config["device"])
    # RecBole's SINE switches this on for every model: all gradients are looked through for NaN, a third of the time.
    torch.autograd.set_detect_anomaly(False)
    logging.info(model)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    training = train(trainer, train_data, valid_data, job["minutes"])

    with np.load(job["dropped"], allow_pickle=False) as kept:
        dropped = np.split(kept["items"], np.cumsum(kept["lengths"])[:-1])
    metrics, users, items, scores = rank(trainer, config, train_data, test_data, dropped)
    np.savez(job["lists"], users=users, items=items, scores=scores)
    names = [*model_defaults(job["model"]), *job["parameters"]]
    tell(
        training=training,
        metrics=metrics,
        parameters={name: config[name] for name in dict.fromkeys(names)},
        trained_parameters=sum(parameter.numel() for parameter in model.parameters()),
        device=str(config["device"]),
        threads=torch.get_num_threads(),
        versions={name: version(name) for name in ("recbole", "torch", "numpy")},
    )


if __name__ == "__main__":
    arguments = sys.argv[1:]
    sys.argv = sys.argv[:1]  # RecBole reads the command line for parameters
    sys.stdout = sys.stderr  # and some of its models print
    try:
        main(*arguments)
    except Exception as error:
        logging.exception("the training failed")
        tell(error=f"{type(error).__name__}: {error}")
        sys.exit(1)
