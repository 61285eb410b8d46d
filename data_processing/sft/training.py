"""What a SFT run of LLaMA-Factory did, as numbers and as a picture: loss by task, lengths, speed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_processing.sft.config import SftConfig
from data_processing.sft.losses import Floats, Ints, OrderError, Schedule, loss_by_task, smooth, task_shares
from data_processing.sft.row_lengths import turn_counter
from data_processing.sft.rows import Row
from gream_verl.core.errors import InputError
from gream_verl.core.files import atomic_path, read_json, write_json
from gream_verl.evaluation.pictures import BLUE, GREY, color, dress

CUTOFF = 2048
BATCH = 8
"""LLaMA-Factory's ``cutoff_len`` and ``per_device_train_batch_size`` where a config says nothing."""
NEEDED = "include_num_input_tokens_seen: non_padding"
SMOOTHING = 40
"""Parts of a training over which its raw loss is averaged."""


@dataclass(frozen=True)
class Lengths:
    """The rows of a SFT data set as the trainer counts them.

    Attributes:
        tasks: Names of the tasks, sorted.
        kinds: Task of every row, a place in ``tasks``, ``[rows]``.
        cut: Whether the trainer cuts the row, ``[rows]``.
        tokens: Tokens of every row after that, ``[rows]``.
        supervised: How many of them are trained, ``[rows]``.
    """

    tasks: list[str]
    kinds: Ints
    cut: npt.NDArray[np.bool_]
    tokens: Ints
    supervised: Ints

    @classmethod
    def count(cls, config: SftConfig) -> Lengths:
        """Count the tokens of the rows that a config trains.

        Raises:
            InputError: When the model has no usable tokenizer, or a file is not a SFT file.
        """
        if not config.model.is_dir():
            raise InputError(f"{config.model}: no such folder; set model_name_or_path to the model that was trained")
        rows = config.rows()
        tasks = sorted(rows["task"].unique())
        kinds = np.searchsorted(tasks, rows["task"].to_numpy())
        turns = turn_counter(config.tokenizer())([Row(*values) for values in rows.iter_rows()]).astype(np.int64)
        limit = config.keys.get("cutoff_len") or CUTOFF
        prompt, response = _cut(turns[:, 0], turns[:, 1], limit)
        tokens = prompt + response
        supervised = tokens if config.keys.get("train_on_prompt") else response
        return cls(tasks, kinds, turns.sum(1) > limit, tokens, supervised)


def _cut(prompt: Ints, response: Ints, limit: int) -> tuple[Ints, Ints]:
    """Return what LLaMA-Factory leaves of rows: the longer one of prompt and response is cut first, or both."""
    both = (limit * (response / (prompt + response))).astype(np.int64)
    room = np.where(response * 2 < limit, limit, np.where(prompt * 2 < limit, limit - prompt, both))
    response = np.minimum(room, response)
    return np.minimum(limit - response, prompt), response


def report_training(config: SftConfig) -> dict[str, Any]:
    """Write ``training.json`` and ``training_loss.png`` beside the trained model, and return what the first holds.

    Args:
        config: The config of the run, overrides included.

    Returns:
        ``steps``, ``epochs``, ``tokens``, ``minutes``, ``tokens_per_second``, ``padding``, ``memory_gb`` (None where
        the log does not tell); ``loss`` with every logged ``steps`` and ``losses``; ``evaluation``, the same for every
        evaluated data set; ``tasks`` with their rows, lengths and ``curve``; ``remarks``, sentences on what is missing.

    Raises:
        InputError: When the run has not logged anything, or its data or model are missing.
    """
    state, remarks = read_state(config.output), []
    log = [row for row in state["log_history"] if "loss" in row]
    if broken := [place for place, row in enumerate(log) if not math.isfinite(row["loss"])]:
        remarks.append(f"The loss is no number at step {log[broken[0]]['step']}: what is told ends before it.")
        log = log[: broken[0]]
    if not log:
        raise InputError(f"{config.output}: its log has no loss yet; wait for a step with a loss")
    training: dict[str, Any] = {
        "steps": int(log[-1]["step"]),
        "epochs": float(log[-1]["epoch"]),
        "tokens": None,
        "minutes": None,
        "tokens_per_second": None,
        "padding": None,
        "memory_gb": _memory(config.output),
        "loss": {"steps": [row["step"] for row in log], "losses": [row["loss"] for row in log]},
        "evaluation": _evaluations(state["log_history"]),
        "tasks": {},
        "remarks": remarks,
    }
    rows = Lengths.count(config)
    _add_tasks(training, config, rows)
    if all(row.get("num_input_tokens_seen") for row in log):
        seconds = trained_seconds(log)
        training["tokens"] = log[-1]["num_input_tokens_seen"]
        training["minutes"] = seconds / 60
        training["tokens_per_second"] = training["tokens"] / seconds
        _add_curves(training, config, rows, log)
    else:
        remarks.append(
            f"No loss by task, no speed: set `{NEEDED}` and `logging_steps: 1` in the config, and train anew."
        )
    write_json(config.output / "training.json", training, indent=1)
    draw_training(config.output / "training_loss.png", training)
    return training


def read_state(output: Path) -> dict[str, Any]:
    """Return the trainer's state: of a finished run, or of the last checkpoint of one that goes on or was stopped.

    Raises:
        InputError: When there is none.
    """
    found = [output / "trainer_state.json", *output.glob("checkpoint-*/trainer_state.json")]
    states = [read_json(path) for path in found if path.is_file()]
    if not states:
        raise InputError(f"{output}: no trainer_state.json there, nor in a checkpoint; train first")
    return max(states, key=lambda state: state["global_step"])


def trained_seconds(log: Sequence[Mapping[str, float]]) -> float:
    """Return the seconds behind the logged steps, also when the run was stopped and went on.

    Every start of the trainer counts time and tokens from zero: from ``train_runtime`` and ``train_tokens_per_second``
    follows how many tokens had been seen when it started. Steps that a stop undid do not count.

    Args:
        log: Rows of ``log_history`` with a loss and a count of tokens.
    """
    seconds, started, before = 0.0, 0.0, None
    for row in log:
        start = row["num_input_tokens_seen"] - row["train_tokens_per_second"] * row["train_runtime"]
        if before is not None and start > (started + before["num_input_tokens_seen"]) / 2:
            seconds, started = seconds + before["train_runtime"], start
        before = row
    return seconds + before["train_runtime"] if before else seconds


def _evaluations(history: Sequence[Mapping[str, float]]) -> dict[str, dict[str, list[float]]]:
    """Return the losses of evaluations by the name of what was evaluated."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in history:
        for key, value in row.items():
            if key.startswith("eval_") and key.endswith("_loss"):
                name = key.removeprefix("eval").removesuffix("_loss").removeprefix("_") or "held-out rows"
                curve = found.setdefault(name, {"steps": [], "losses": []})
                curve["steps"].append(row["step"])
                curve["losses"].append(value)
    return found


def _memory(output: Path) -> float | None:
    """Return the peak of one GPU's memory in GiB, which LLaMA-Factory logs when RECORD_VRAM=1 is set."""
    file = output / "trainer_log.jsonl"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return max(map(float, re.findall(r'"vram_reserved": ([0-9.]+)', text)), default=None)


def _add_tasks(training: dict[str, Any], config: SftConfig, rows: Lengths) -> None:
    """Add rows and lengths of every task."""
    # What `gream data mix` told is of its whole file.
    mixed = {} if config.keys.get("max_samples") else _mix_report(config)
    if config.keys.get("max_samples"):
        training["remarks"].append("Rows shortened or left out are not known of the first `max_samples` rows.")
    elif not all("shortened" in mixed.get(name, ()) for name in rows.tasks):
        training["remarks"].append("Rows shortened are not known: give `gream data mix` the --tokenizer of the model.")
    for place, name in enumerate(rows.tasks):
        own = rows.kinds == place
        training["tasks"][name] = {
            "rows": int(own.sum()),
            "tokens": int(rows.tokens[own].sum()),
            "supervised_tokens": int(rows.supervised[own].sum()),
            "cut": int(rows.cut[own].sum()),
            "shortened": mixed.get(name, {}).get("shortened"),
            "left_out": mixed.get(name, {}).get("left out"),
            "curve": {"steps": [], "losses": [], "standard_errors": []},
        }


def _add_curves(training: dict[str, Any], config: SftConfig, rows: Lengths, log: Sequence[Mapping[str, float]]) -> None:
    """Add the loss of every task and the share of padding, or a remark on why they are not known."""
    batch = config.keys.get("per_device_train_batch_size") or BATCH
    steps = np.array([row["step"] for row in log])
    try:
        schedule = Schedule.find(
            rows.tokens, steps, np.array([row["num_input_tokens_seen"] for row in log]),
            batch=batch, accumulation=config.keys.get("gradient_accumulation_steps") or 1,
        )  # fmt: skip
    except OrderError as error:
        training["remarks"].append(
            f"No loss by task: {error}. Set `{NEEDED}` and `disable_shuffling: true`, no packing and no val_size; "
            "give the keys that were overridden in the training here, too; `gream sft check` tests the template."
        )
        return
    training["padding"] = schedule.padding(rows.tokens, batch)
    # Where prompts are trained, a row's first token is supervised, too, but nothing predicts it.
    predicted = np.minimum(rows.supervised, rows.tokens - 1)
    shares, tokens = task_shares(schedule, steps, rows.kinds, predicted, rows.supervised, len(rows.tasks))
    losses = np.array([row["loss"] for row in log])
    for name, curve in zip(rows.tasks, loss_by_task(steps, losses, shares, tokens), strict=True):
        training["tasks"][name]["curve"] = {
            "steps": curve.steps.tolist(),
            "losses": _known(curve.loss),
            "standard_errors": _known(curve.errors),
        }
    if untold := [name for name in rows.tasks if not _has_curve(training["tasks"][name])]:
        training["remarks"].append(f"No loss of {', '.join(untold)}: too few steps tell it from the other tasks.")


def _known(values: Floats) -> list[float | None]:
    """Return values for JSON, None for those that are not known."""
    return [float(value) if np.isfinite(value) else None for value in values]


def _mix_report(config: SftConfig) -> dict[str, dict[str, int]]:
    """Return, for each task, what `gream data mix` told of its rows, all data sets of the config together."""
    told: dict[str, dict[str, int]] = {}
    for file in config.data_files:
        report = file.with_suffix(".json")
        for task, values in (read_json(report).get("tasks", {}) if report.is_file() else {}).items():
            for key in {"shortened", "left out"} & values.keys():
                told.setdefault(task, {}).setdefault(key, 0)
                told[task][key] += int(values[key])
    return told


LEGEND = (
    "rows, tokens, labels (supervised tokens): of one epoch; first, last: loss in nats a token, first and last point "
    "of the curve, ± standard error of the fit (bends between points are not in it); short: rows whose history "
    "`gream data mix` shortened; out: left out there as too long; cut: cut off by the trainer"
)


def task_rows(training: Mapping[str, Any]) -> list[list[str]]:
    """Return the cells of a table of the tasks: a header, and a row for each task; ``LEGEND`` explains them.

    Args:
        training: What ``report_training`` returns.
    """
    cells = [["task", "rows", "tokens", "labels", "first", "last", "short", "out", "cut"]]
    for name, task in training["tasks"].items():
        points = zip(task["curve"]["losses"], task["curve"]["standard_errors"], strict=True)
        curve = [point for point in points if point[0] is not None]
        rows, shortened, left_out = task["rows"], task["shortened"], task["left_out"]
        cells.append(
            [
                name,
                f"{rows:,}",
                _short(task["tokens"]),
                _short(task["supervised_tokens"]),
                _loss_cell(*curve[0]) if len(curve) > 1 else "–",
                _loss_cell(*curve[-1]) if curve else "–",
                "–" if shortened is None else f"{shortened / rows:.1%}",
                "–" if left_out is None else f"{left_out / (rows + left_out):.1%}",
                f"{task['cut'] / rows:.1%}",
            ]
        )
    return cells


def _short(tokens: int) -> str:
    return f"{tokens / 1e6:,.2f}M" if tokens >= 1e6 else f"{tokens / 1e3:,.1f}k"


def _loss_cell(loss: float, error: float | None) -> str:
    return f"{loss:.2f}" if error is None else f"{loss:.2f}±{error:.2f}".replace("±0.", "±.")


def summary(training: Mapping[str, Any]) -> str:
    """Return one sentence on the length and the speed of a training.

    Args:
        training: What ``report_training`` returns.
    """
    parts = [f"{training['steps']:,} steps, {training['epochs']:.2f} epochs"]
    if training["minutes"] is not None:
        parts.append(
            f"{training['tokens']:,} tokens in {training['minutes']:.1f} minutes, "
            f"{training['tokens_per_second']:,.0f} tokens a second"
        )
    if training["padding"] is not None:
        parts.append(f"padding {training['padding']:.1%} of what was computed")
    if training["memory_gb"] is not None:
        parts.append(f"{training['memory_gb']:.1f} GiB of GPU memory at most")
    return "; ".join(parts) + "."


def draw_training(path: Path, training: Mapping[str, Any]) -> None:
    """Draw the loss of all rows and, beside it, of each task.

    Args:
        path: A ``.png`` file; the same training gives the same bytes.
        training: What ``report_training`` returns.
    """
    from matplotlib.figure import Figure

    by_task = has_curves(training)
    figure = Figure(figsize=(13 if by_task else 6.4, 4.2), layout="constrained")
    axes = figure.subplots(1, 2 if by_task else 1, squeeze=False)[0]
    draw_loss(dress(axes[0], "Training loss, all rows", "step", "loss (nats a token)"), training)
    if by_task:
        draw_tasks(dress(axes[1], "Training loss by task", "step", "loss (nats a token)"), training)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})


def has_curves(training: Mapping[str, Any]) -> bool:
    """Return whether there is a loss of any task to draw."""
    return any(map(_has_curve, training["tasks"].values()))


def _has_curve(task: Mapping[str, Any]) -> bool:
    return any(loss is not None for loss in task["curve"]["losses"])


def draw_loss(axes: Any, training: Mapping[str, Any]) -> None:
    """Draw the loss of all rows, raw and smoothed, and the losses of evaluations."""
    steps, losses = training["loss"]["steps"], np.array(training["loss"]["losses"])
    axes.plot(steps, losses, color=GREY, linewidth=0.7, alpha=0.55, label="as logged")
    axes.plot(steps, smooth(losses, len(losses) // SMOOTHING), color=BLUE, linewidth=1.8, label="smoothed")
    for place, (name, curve) in enumerate(training["evaluation"].items()):
        axes.plot(curve["steps"], curve["losses"], "o-", markersize=3.5, color=color(place + 1), label=f"eval: {name}")
    _finish(axes, training)


def draw_tasks(axes: Any, training: Mapping[str, Any]) -> None:
    """Draw the loss of each task, with bars of one standard error to either side."""
    for place, (name, task) in enumerate(training["tasks"].items()):
        curve = {key: np.array(values, float) for key, values in task["curve"].items()}
        if not _has_curve(task):
            continue
        errors = np.nan_to_num(curve["standard_errors"])
        axes.errorbar(
            curve["steps"], curve["losses"], errors, fmt="o-", markersize=3, elinewidth=3, color=color(place),
            linewidth=1.5, label=name, ecolor=(*color(place), 0.3),
        )  # fmt: skip
    _finish(axes, training)


def _finish(axes: Any, training: Mapping[str, Any]) -> None:
    axes.set_xlim(0, training["steps"])
    axes.grid(axis="y", alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
