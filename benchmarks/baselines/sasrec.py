"""SASRec, or another of RecBole's sequential models, on the same split, users and candidates as every other result.

RecBole's pins clash with today's ray, so it runs in an environment of its own (`make recbole`), as a process that reads
and writes files. Users and items travel by number; nothing is pickled. The result is a file in ``RUN/evaluation``,
which `gream evaluate`, `gream compare` and `gream report` show next to the models:

    python benchmarks/baselines/sasrec.py runs/Beauty
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from rich import print as show
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gream_verl.core.errors import InputError
from gream_verl.core.files import write_json
from gream_verl.core.run_folder import RunFolder
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.core.split import UserSplit, read_interactions, read_splits
from gream_verl.evaluation.compare import protocol_table, results_table
from gream_verl.evaluation.floors import baseline_evaluation
from gream_verl.evaluation.options import read_options
from gream_verl.evaluation.prompts import Prompt, read_protocol, refuse_to_lose
from gream_verl.evaluation.results import Evaluation, measure, training_counts

WORKER = Path(__file__).with_name("recbole_worker.py")
PYTHON_VARIABLE = "GREAM_RECBOLE_PYTHON"
DATASET = "gream"
CUTOFFS = (1, 5, 10, 20)
TRAINING: Mapping[str, Any] = {
    "MAX_ITEM_LIST_LENGTH": 20,
    "epochs": 200,
    "stopping_step": 10,
    "train_batch_size": 512,
    "eval_batch_size": 512,
    "learner": "adam",
    "learning_rate": 0.001,
    "weight_decay": 0.0,
}
"""Training of every model, in RecBole's names: up to ``epochs``, until ``stopping_step`` + 1 epochs in a row have not
improved NDCG@10 on the validation items."""
MODELS: Mapping[str, Mapping[str, Any]] = {
    "SASRec": {
        "n_layers": 2,
        "n_heads": 2,
        "hidden_size": 64,
        "inner_size": 256,
        "hidden_dropout_prob": 0.5,
        "attn_dropout_prob": 0.5,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.02,
        "loss_type": "CE",
    }
}
"""Hyperparameters in RecBole's names. Models without an entry have RecBole's own."""


class Row(NamedTuple):
    """One prediction, by number: the target from the history."""

    user: int
    history: Sequence[int]
    target: int


def training_rows(
    sequences: Sequence[Sequence[int]], splits: Sequence[UserSplit], longest: int
) -> tuple[Iterator[Row], Iterator[Row]]:
    """Return the training rows, one per beginning of a user's training part, and the rows that choose the epoch.

    Args:
        sequences: Items of each user, in time order.
        splits: Split of each user.
        longest: Most items of a history, the last ones.
    """
    training = (
        Row(user, sequence[max(0, place - longest) : place], sequence[place])
        for user, (sequence, split) in enumerate(zip(sequences, splits, strict=True))
        for place in range(1, split.training)
    )
    validation = (
        Row(user, sequence[max(0, split.validation - longest) : split.validation], sequence[split.validation])
        for user, (sequence, split) in enumerate(zip(sequences, splits, strict=True))
        if split.validation is not None
    )
    return training, validation


def evaluate_recbole(
    inter_file: Path,
    prompts: Sequence[Prompt],
    items: Collection[str],
    protocol: Mapping[str, Any],
    *,
    model: str = "SASRec",
    parameters: Mapping[str, Any] | None = None,
    k: int = 30,
    minutes: float | None = None,
    seed: int = 0,
    python: Path | None = None,
    log_file: Path | None = None,
) -> Evaluation:
    """Train a model by RecBole on the training part of every user, and recommend to the users of the prompts.

    Longer than 60 lines, because it is one sequence of writing files, running the worker and reading its files.

    Args:
        inter_file: ``<D>.inter.json``.
        prompts: The users; their messages play no part.
        items: The items that may be recommended, those of the index.
        protocol: Protocol of the prompts; its ``drop_history`` is followed.
        model: Name of one of RecBole's sequential models.
        parameters: Changes to ``TRAINING`` and ``MODELS``, in RecBole's names.
        k: Length of the recommended lists.
        minutes: Stop the training after the epoch in which so many minutes are over; None for no limit.
        seed: Seed of the weights, of the order of the rows, and of dropout.
        python: Python of RecBole's environment; see ``recbole_python``.
        log_file: File of RecBole's log; None throws it away.

    Returns:
        Metrics: as in direct mode. Rows: ``user``, ``target``, ``history_length``, ``recommended``, ``scores`` (the
        model's). The settings hold ``recbole_metrics``: the numbers of RecBole's own evaluator for the same lists.

    Raises:
        InputError: When RecBole's environment is missing, a file cannot be used, or the training fails.
    """
    begin = time.perf_counter()
    interpreter = recbole_python(python)
    sequences = read_interactions(inter_file)
    known = sorted({item for sequence in sequences.values() for item in sequence})
    not_candidates = [row for row, item in enumerate(known) if item not in items]
    splits = list(read_splits(inter_file, sequences).values())
    k = min(k, len(known) - len(not_candidates))
    chosen = {**TRAINING, **MODELS.get(model, {}), **(parameters or {})}
    longest = chosen["MAX_ITEM_LIST_LENGTH"]
    if not isinstance(longest, int) or longest < 1:
        raise InputError(f"--set MAX_ITEM_LIST_LENGTH={longest}: expected a number of items, at least 1")
    with tempfile.TemporaryDirectory(prefix="gream-recbole-") as name:
        folder = Path(name)
        row_of = {item: row for row, item in enumerate(known)}
        numbered = [[row_of[item] for item in sequence] for sequence in sequences.values()]
        tests = _test_rows(inter_file, sequences, prompts, row_of)
        most = write_data(folder / DATASET, numbered, splits, tests, longest, inter_file)
        dropped = [[*not_candidates, *(row.history if protocol["drop_history"] else ())] for row in tests]
        np.savez(
            folder / "dropped.npz",
            items=np.array(list(chain.from_iterable(dropped)), dtype=np.int64),
            lengths=np.array(list(map(len, dropped)), dtype=np.int64),
        )
        job = {
            "model": model,
            "parameters": {**chosen, "MAX_ITEM_LIST_LENGTH": most},
            "seed": seed,
            "minutes": minutes,
            "cutoffs": sorted({*(cutoff for cutoff in CUTOFFS if cutoff < k), k}),
            "valid_metric": f"NDCG@{min(10, k)}",
            "data": name,
            "dataset": DATASET,
            "dropped": os.fspath(folder / "dropped.npz"),
            "lists": os.fspath(folder / "lists.npz"),
        }
        write_json(folder / "job.json", job)
        said = _run(interpreter, folder, model, log_file or Path(os.devnull))
        with np.load(folder / "lists.npz", allow_pickle=False) as lists:
            users, best, scores = lists["users"], lists["items"], lists["scores"]
    if users.tolist() != [row.user for row in tests]:
        raise RuntimeError("RecBole returned other users than it was given")

    found = [
        {
            "recommended": [known[item] for item in best_items if item >= 0],
            "scores": [round(float(score), 5) for item, score in zip(best_items, values, strict=True) if item >= 0],
        }
        for best_items, values in zip(best, scores, strict=True)
    ]
    settings = {
        "interactions": os.fspath(inter_file),
        "k": k,
        "seed": seed,
        "protocol": dict(protocol),
        "parameters": said["parameters"],
        "trained_parameters": said["trained_parameters"],
        **said["training"],
        "training_seconds": said["training"]["seconds"],
        "seconds": round(time.perf_counter() - begin, 2),
        "device": said["device"],
        "threads": said["threads"],
        "versions": said["versions"],
        "recbole_metrics": said["metrics"],
    }
    return baseline_evaluation(model, prompts, found, settings)


def read_parameters(texts: Sequence[str]) -> dict[str, Any]:
    """Return parameters written as ``NAME=VALUE``, values in YAML.

    >>> read_parameters(["learning_rate=0.01", "loss_type=BPR"])
    {'learning_rate': 0.01, 'loss_type': 'BPR'}
    """
    parameters = {}
    for text in texts:
        name, equals, value = text.partition("=")
        try:
            parameters[name] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not name or not equals:
            raise InputError(f"--set {text}: expected NAME=VALUE, such as hidden_size=128")
    return parameters


def recbole_python(python: Path | None = None) -> Path:
    """Return the Python of RecBole's environment.

    Args:
        python: Its path; None for that of the variable ``GREAM_RECBOLE_PYTHON``, else ``.venv-recbole``.

    Raises:
        InputError: When it is missing.
    """
    named = python or os.environ.get(PYTHON_VARIABLE)
    found = Path(named) if named else Path(__file__).parents[2] / ".venv-recbole" / "bin" / "python"
    if not found.is_file():
        raise InputError(f"{found}: no such file; build RecBole's environment with `make recbole`")
    return found.absolute()


def _test_rows(
    inter_file: Path, sequences: Mapping[str, Sequence[str]], prompts: Sequence[Prompt], row_of: Mapping[str, int]
) -> list[Row]:
    """Return the prompts by number, with all of their histories. Users that the interactions lack get new numbers."""
    user_of = {user: number for number, user in enumerate(sequences)}
    rows = []
    for prompt in prompts:
        if not prompt.history:
            raise InputError(f"user {prompt.user!r} has no history; a sequential model needs one: give prompts with it")
        try:
            history, target = [row_of[item] for item in prompt.history], row_of[prompt.target]
        except KeyError as error:
            raise InputError(f"user {prompt.user!r}: item {error} is not in {inter_file}; make both together") from None
        rows.append(Row(user_of.setdefault(prompt.user, len(user_of)), history, target))
    return rows


def write_data(
    folder: Path,
    sequences: Sequence[Sequence[int]],
    splits: Sequence[UserSplit],
    tests: Sequence[Row],
    longest: int,
    inter_file: Path,
) -> int:
    """Write RecBole's files: an item file with all items, and the rows of training, validation and test.

    Args:
        folder: A new folder.
        sequences: Items of each user, by number, in time order.
        splits: Split of each user.
        tests: Predictions of the test.
        longest: Most items of a history, the last ones.
        inter_file: Source of the sequences, for messages.

    Returns:
        Items of the longest history, at most ``longest``.

    Raises:
        InputError: When a part has no row.
    """
    folder.mkdir()
    training, validation = training_rows(sequences, splits, longest)
    test = (row._replace(history=row.history[-longest:]) for row in tests)
    most = 0
    for part, rows in (("train", training), ("valid", validation), ("test", test)):
        empty = True
        with (folder / f"{DATASET}.{part}.inter").open("w", encoding="utf-8") as file:
            file.write("user_id:token\titem_id_list:token_seq\titem_id:token\n")
            for user, history, target in rows:
                empty = False
                most = max(most, len(history))
                file.write(f"{user}\t{' '.join(map(str, history))}\t{target}\n")
        if empty:
            raise InputError(f"{inter_file}: its split leaves no row for {part}; bring users with more interactions")
    items = sorted({item for sequence in sequences for item in sequence})
    lines = "".join(f"{item}\n" for item in items)
    (folder / f"{DATASET}.item").write_text(f"item_id:token\n{lines}", encoding="utf-8")
    return most


def _run(python: Path, folder: Path, model: str, log_file: Path) -> dict[str, Any]:
    """Run the worker in ``folder``, show its epochs, and return its last message."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    message: dict[str, Any] = {}
    log_file.parent.mkdir(parents=True, exist_ok=True)
    running = folder / "worker.log"
    # -I: neither the folder of the worker nor PYTHONPATH belong to that environment.
    command = [os.fspath(python), "-I", "-W", "ignore", os.fspath(WORKER), os.fspath(folder / "job.json")]
    with (
        running.open("w", encoding="utf-8") as log,
        Progress(*columns) as progress,
        subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        try:
            task = progress.add_task(f"{model}: preparing", total=None)
            for line in process.stdout or ():
                message = json.loads(line)
                if "epoch" in message:
                    text = f"{model}: validation NDCG@10 {message['score']:.4f}"
                    progress.update(task, description=text, completed=message["epoch"], total=message["epochs"])
        except BaseException:
            process.kill()
            raise
    failed = process.returncode != 0 or "training" not in message
    if failed and log_file != Path(os.devnull):
        log_file = log_file.with_suffix(".failed.log")  # the other one belongs to the result that is there
    log_file.write_text(running.read_text(encoding="utf-8"), encoding="utf-8")
    if failed:
        reason = message.get("error", f"exit status {process.returncode}")
        raise InputError(f"RecBole could not train {model} ({reason}); its log: {log_file}")
    return message


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, save ``<model>.json`` and its log in ``RUN/evaluation``, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--dataset", help="name of the data set, where the run holds several")
    parser.add_argument("--config", type=Path, help="YAML file of `gream evaluate`, for the users and the seed")
    parser.add_argument("--limit", type=int, help="users in the seeded sample")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--model", default="SASRec", help="one of RecBole's sequential models")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter of RecBole")
    parser.add_argument("--minutes", type=float, help="stop after the epoch in which these are over")
    parser.add_argument("--overwrite", action="store_true", help="replace a result of other users or protocol")
    parser.add_argument("--python", type=Path, help="Python of RecBole's environment; default: that of `make recbole`")
    given = parser.parse_args(arguments)
    run = RunFolder.open(given.run, given.dataset)
    options = read_options(given.config, {"limit": given.limit, "seed": given.seed})
    index = ItemIndex.load(run.data.index)
    prompts, protocol = read_protocol(run.data, options, "direct", index)
    file = run.evaluation / f"{given.model.lower()}.json"
    if not given.overwrite:
        refuse_to_lose(file, prompts, protocol)
    evaluation = evaluate_recbole(
        run.data.inter, prompts, index.sids, protocol, model=given.model, parameters=read_parameters(given.set),
        minutes=given.minutes, seed=options.seed, python=given.python, log_file=file.with_suffix(".log"),
    )  # fmt: skip
    evaluation = measure(evaluation, index.sids, training_counts(run.data.inter, index.sids), seed=options.seed)
    evaluation.save(file)
    show(results_table({given.model: evaluation}), protocol_table({given.model: evaluation}))
    settings = evaluation.settings
    show(f"{settings['epochs']} epochs, the best {settings['best_epoch']}; stopped by {settings['stopped_by']}.")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(str(error))
