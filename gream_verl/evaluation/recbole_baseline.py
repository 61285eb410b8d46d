"""SASRec, or another of RecBole's sequential models, on the same split, users and candidates as every other result.

RecBole's pins clash with today's ray, so it runs in an environment of its own (`make recbole`), as a process that gets
files and writes files. Users and items travel by number; nothing is pickled.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import yaml
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from gream_verl.core.errors import InputError
from gream_verl.core.files import write_json
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.core.split import UserSplit, read_interactions, read_splits
from gream_verl.evaluation.breakdown import Catalogue, describe
from gream_verl.evaluation.floors import baseline_evaluation, evaluate_floors
from gream_verl.evaluation.prompts import Prompt
from gream_verl.evaluation.protocol import protocol_table
from gream_verl.evaluation.results import Evaluation
from gream_verl.evaluation.run import BASELINES, refuse_to_lose, unranked
from gream_verl.evaluation.tables import results_table

if TYPE_CHECKING:
    from rich.console import Console

    from gream_verl.evaluation.protocol import PromptSource

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
"""How every model is trained, in RecBole's names: up to ``epochs``, until ``stopping_step`` + 1 epochs in a row have
not bettered NDCG@10 on the validation items."""
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
"""Hyperparameters in RecBole's names. Models that are not named here have RecBole's own."""


class Row(NamedTuple):
    """One thing to predict, by number: the target from the history. The longest histories keep their last items."""

    user: int
    history: Sequence[int]
    target: int


def training_rows(
    sequences: Sequence[Sequence[int]], splits: Sequence[UserSplit], longest: int
) -> tuple[Iterator[Row], Iterator[Row]]:
    """Return what the model trains on, every beginning of a user's training part, and what the epoch is chosen by.

    Args:
        sequences: Items of each user, in time order.
        splits: How each is split.
        longest: Items that a history may have.
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
    inter_file: str | os.PathLike[str],
    prompts: Sequence[Prompt],
    *,
    items: Collection[str] | None = None,
    protocol: Mapping[str, Any] | None = None,
    model: str = "SASRec",
    parameters: Mapping[str, Any] | None = None,
    k: int = 30,
    minutes: float | None = None,
    seed: int = 0,
    python: str | os.PathLike[str] | None = None,
    log_file: str | os.PathLike[str] | None = None,
) -> Evaluation:
    """Train a model by RecBole on the training part of every user, and recommend to the users of the prompts.

    Args:
        inter_file: ``<D>.inter.json``.
        prompts: The users; their messages play no part.
        items: The items that may be recommended, those of the index; None for all of the interactions.
        protocol: What the prompts say of themselves. Its ``drop_history`` (true where it is not told) is followed: an
            item of the user's history is never recommended.
        model: Name of one of RecBole's sequential models.
        parameters: Changes to ``TRAINING`` and ``MODELS``, in RecBole's names.
        k: Length of the recommended lists.
        minutes: Stop the training after the epoch in which so many minutes are over; None for no limit.
        seed: Seed of the weights, of the order of the rows, and of dropout.
        python: Python of RecBole's environment; see ``recbole_python``.
        log_file: Where RecBole's log goes; None throws it away.

    Returns:
        Metrics: as in direct mode. Rows: ``user``, ``target``, ``history_length``, ``recommended``, ``scores`` (the
        model's). The settings hold ``recbole_metrics``: what RecBole's own evaluator says about the same lists.

    Raises:
        InputError: When RecBole's environment is not there, a file cannot be used, or the training fails.
    """
    begin = time.perf_counter()
    protocol = dict(protocol or {})
    drop_history = protocol.get("drop_history", True)
    interpreter = recbole_python(python)
    sequences = read_interactions(inter_file)
    known = sorted({item for sequence in sequences.values() for item in sequence})
    retired = [row for row, item in enumerate(known) if items is not None and item not in items]
    splits = list(read_splits(inter_file, sequences).values())
    k = min(k, len(known) - len(retired))
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
        dropped = [[*retired, *(row.history if drop_history else ())] for row in tests]
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
        said = _run(interpreter, folder, model, os.devnull if log_file is None else log_file)
        with np.load(folder / "lists.npz", allow_pickle=False) as lists:
            users, best, scores = lists["users"], lists["items"], lists["scores"]
    if users.tolist() != [row.user for row in tests]:
        raise RuntimeError("RecBole gave back other users than it was given")

    found = [
        {
            "recommended": [known[item] for item in best_items if item >= 0],
            "scores": [round(float(score), 5) for item, score in zip(best_items, values, strict=True) if item >= 0],
        }
        for best_items, values in zip(best, scores, strict=True)
    ]
    training = said["training"]
    more = {
        "parameters": said["parameters"],
        "trained_parameters": said["trained_parameters"],
        "epochs": training["epochs"],
        "best_epoch": training["best_epoch"],
        "stopped_by": training["stopped_by"],
        "valid_ndcg@10": training["valid_score"],
        "training_seconds": training["seconds"],
        "seconds": round(time.perf_counter() - begin, 2),
        "device": said["device"],
        "threads": said["threads"],
        "versions": said["versions"],
        "recbole_metrics": said["metrics"],
    }
    return baseline_evaluation(model, inter_file, prompts, found, protocol=protocol, k=k, seed=seed, more=more)


def evaluate_baseline(
    source: PromptSource,
    *,
    model: str,
    parameters: Mapping[str, Any],
    drop_history: bool,
    minutes: float | None,
    python: Path | None,
    output: Path,
    overwrite: bool = False,
    console: Console,
) -> None:
    """Evaluate a model of RecBole, save it as ``<output>/<model>.json`` and print it beside the floors.

    Args:
        source: Where the users come from, and the seed.
        model: See ``evaluate_recbole``; likewise ``parameters``, ``minutes`` and ``python``.
        parameters: Changes to how it is trained.
        drop_history: Whether items of a user's history are never recommended.
        minutes: Limit of the training.
        python: Python of RecBole's environment.
        output: Folder of the results; RecBole's log lies there, too.
        overwrite: Replace results of other users or another protocol.
        console: Where to print.

    Raises:
        InputError: When RecBole's environment is not there, a file cannot be used, or the training fails.
    """
    recbole_python(python)  # before files are read
    index = ItemIndex.load(source.index)
    prompts, about = source.read("direct", index, drop_history=drop_history)
    protocol, name = about.describe(), model.lower()
    if not overwrite:
        for file in (name, *BASELINES):
            refuse_to_lose(output / f"{file}.json", unranked(prompts, protocol), "--output")
    evaluation = evaluate_recbole(
        source.interactions, prompts, items=index.sids, protocol=protocol, model=model, parameters=parameters,
        minutes=minutes, seed=source.seed, python=python, log_file=output / f"{name}.log",
    )  # fmt: skip
    floors = evaluate_floors(source.interactions, prompts, items=index.sids, protocol=protocol, seed=source.seed)
    catalogue = Catalogue.load(source.interactions, index.sids)
    described = {
        label: describe(result, catalogue, seed=source.seed) for label, result in {**floors, name: evaluation}.items()
    }
    for label, result in described.items():
        result.save(output / f"{label}.json")
    console.print(results_table(described))
    console.print(protocol_table({model: protocol}))
    settings = evaluation.settings
    console.print(
        f"{model}: {settings['epochs']} epochs in {settings['training_seconds'] / 60:.1f} minutes on "
        f"{settings['threads']} threads; the best, {settings['best_epoch']}, by NDCG@10 on the validation items "
        f"({settings['valid_ndcg@10']:.4f}). Stopped by: {settings['stopped_by']}.",
        highlight=False,
    )


def read_parameters(texts: Sequence[str]) -> dict[str, Any]:
    """Return parameters written as ``NAME=VALUE``, values in YAML.

    Raises:
        InputError: When one is not.

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


def recbole_python(python: str | os.PathLike[str] | None = None) -> Path:
    """Return the Python of RecBole's environment.

    Args:
        python: Its path; None for that of the environment variable ``GREAM_RECBOLE_PYTHON``, else for
            ``.venv-recbole`` in the repository or the working folder.

    Raises:
        InputError: When it is not there.
    """
    named = python or os.environ.get(PYTHON_VARIABLE)
    roots = (Path(__file__).parents[2], Path.cwd())
    places = [Path(named)] if named else [root / ".venv-recbole" / "bin" / "python" for root in roots]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise InputError(
            f"{places[0]}: no such file; build RecBole's environment with `make recbole`, or name the Python of "
            f"another with --python or {PYTHON_VARIABLE}"
        )
    return found.absolute()


def _test_rows(
    inter_file: str | os.PathLike[str],
    sequences: Mapping[str, Sequence[str]],
    prompts: Sequence[Prompt],
    row_of: Mapping[str, int],
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
            raise InputError(
                f"user {prompt.user!r}: item {error} is not in {inter_file}; make both from the same data"
            ) from None
        rows.append(Row(user_of.setdefault(prompt.user, len(user_of)), history, target))
    return rows


def write_data(
    folder: Path,
    sequences: Sequence[Sequence[int]],
    splits: Sequence[UserSplit],
    tests: Sequence[Row],
    longest: int,
    inter_file: str | os.PathLike[str],
) -> int:
    """Write RecBole's files: an item file with all items, and the rows of training, validation and test.

    Args:
        folder: A new folder.
        sequences: Items of each user, by number, in time order.
        splits: How each is split.
        tests: What to predict in the end.
        longest: Items that a history may have; of a longer one the last are kept.
        inter_file: Where the sequences are from, for messages.

    Returns:
        How many items the longest history has, at most ``longest``.

    Raises:
        InputError: When there is nothing to train on, or nothing to validate on.
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
            raise InputError(
                f"{inter_file}: its split leaves no row for {part}; bring users with more interactions, or split "
                "otherwise"
            )
    items = sorted({item for sequence in sequences for item in sequence})
    lines = "".join(f"{item}\n" for item in items)
    (folder / f"{DATASET}.item").write_text(f"item_id:token\n{lines}", encoding="utf-8")
    return most


def _run(python: Path, folder: Path, model: str, log_file: str | os.PathLike[str]) -> dict[str, Any]:
    """Run the worker in ``folder``, show its epochs, and return its last message."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    message: dict[str, Any] = {}
    Path(log_file).parent.mkdir(parents=True, exist_ok=True)
    running = folder / "worker.log"
    # -I: neither this package's folder, which has modules of like names, nor PYTHONPATH belong to that environment.
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
    log_file = Path(log_file)
    if failed and log_file != Path(os.devnull):
        log_file = log_file.with_suffix(".failed.log")  # the other one belongs to the result that is there
    log_file.write_text(running.read_text(encoding="utf-8"), encoding="utf-8")
    if failed:
        reason = message.get("error", f"exit status {process.returncode}")
        raise InputError(f"RecBole could not train {model} ({reason}); its log: {log_file}")
    return message
