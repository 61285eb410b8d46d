"""Does SRPO improve on SFT? Several seeds of SRPO from one SFT checkpoint, compared on held-out validation prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from gream_verl.core.files import write_json, write_text
from gream_verl.evaluation.metrics import bootstrap_difference, bootstrap_mean
from gream_verl.evaluation.results import Evaluation
from gream_verl.pipeline.quickstart import recipe_folder
from gream_verl.pipeline.steps import Pipeline, Step

if TYPE_CHECKING:
    from rich.console import Console

STEPS = 60
"""Steps of SRPO: three times those of the quickstart."""
CHAINS = 5
"""Answers a prompt and seed, at the temperature and top-p of the authors' validation."""


def compare(run: Path, dataset: str, *, seeds: int, console: Console) -> dict[str, Any]:
    """Train SRPO with seeds 0, 1, ... from the run's SFT checkpoint and compare the mean RSVR with that of SFT.

    Every user's second last interaction is a validation prompt; it is in no training row. Each SRPO model answers each
    prompt five times, and the one SFT model as often as all of them together. Intervals are bootstrapped over users,
    after averaging over answers (and over seeds, for the interval of all).

    Args:
        run: Folder of a finished quickstart.
        dataset: Name of its data set.
        seeds: Number of seeds.
        console: Where to show progress and the result.

    Returns:
        What is written to ``<run>/learning/learning.json``: mean, difference and 95% interval by seed and for all.

    Raises:
        InputError: When the run has no SFT checkpoint or a step fails.
    """
    folder = run / "learning"
    sft = run / "sft"
    baseline = _evaluation(run, folder, dataset, "sft", sft, sft / "model.safetensors", seed=0, chains=CHAINS * seeds)
    trainings = [step for seed in range(seeds) for step in _steps(run, folder, dataset, seed)]
    Pipeline(folder, console).run([baseline, *trainings])
    before = _user_means(folder / "sft-val-reasoning.json")
    after = [_user_means(folder / f"srpo-{seed}-val-reasoning.json") for seed in range(seeds)]
    rows = {f"seed {seed}": _row(after[seed], before) for seed in range(seeds)}
    rows["all seeds"] = _row(np.mean(after, axis=0), before)
    result = {
        "metric": "mean RSVR, reasoning mode",
        "prompts": len(before),
        "answers": {"sft": CHAINS * seeds, "srpo": CHAINS},
        "steps": STEPS,
        "results": rows,
    }
    write_json(folder / "learning.json", result, indent=2)
    write_text(folder / "learning.svg", _picture(rows))
    console.print(_table(rows, len(before)))
    console.print(f"Kept in {folder / 'learning.json'} and learning.svg", soft_wrap=True)
    return result


def _steps(run: Path, folder: Path, dataset: str, seed: int) -> list[Step]:
    data, checkpoints = run / "data", folder / f"srpo-{seed}"
    prompts = [data / f"{dataset}-{part}.parquet" for part in ("rl", "val")]
    train = ["python", "-m", "verl.trainer.main_ppo", "+recipe=gream_srpo_cpu", f"gream.run={run}"]
    train += [f"gream.dataset={dataset}", f"gream.checkpoints={checkpoints}", f"gream.seed={seed}"]
    train += [f"trainer.total_training_steps={STEPS}", "trainer.val_before_train=false", "trainer.test_freq=-1"]
    finished = checkpoints / "latest_checkpointed_iteration.txt"
    return [
        Step(
            f"srpo-{seed}",
            f"SRPO, seed {seed}",
            train,
            [*prompts, run / "sft", recipe_folder()],
            [finished],
            resumes=[checkpoints],
            logged=True,
            timeout=5400,
        ),
        _evaluation(run, folder, dataset, f"srpo-{seed}", checkpoints, finished, seed=seed, chains=CHAINS),
    ]


def _evaluation(
    run: Path, folder: Path, dataset: str, name: str, model: Path, finished: Path, *, seed: int, chains: int
) -> Step:
    command = ["gream", "evaluate", "--model", str(model), "--data", str(run / "data"), "--dataset", dataset]
    command += ["--output", str(folder), "--name", name, "--mode", "reasoning", "--split", "val"]
    command += ["--chains", str(chains), "--beams", "0", "--max-tokens", "128", "--seed", str(seed)]
    reads = [finished, run / "data" / f"{dataset}-val.parquet"]
    return Step(
        f"evaluate-{name}", f"Validation of {name.upper()}", command, reads,
        [folder / f"{name}-val-reasoning.json"], timeout=3600,
    )  # fmt: skip


def _user_means(path: Path) -> np.ndarray:
    """Return the mean RSVR of every user's answers, float64 [users]."""
    return np.array([row["rsvr"] for row in Evaluation.load(path).rows])


def _row(after: np.ndarray, before: np.ndarray) -> dict[str, Any]:
    low, high = bootstrap_difference(after, before)
    return {
        "sft": float(before.mean()),
        "srpo": float(after.mean()),
        "srpo_interval_95": bootstrap_mean(after),
        "difference": float((after - before).mean()),
        "interval_95": [low, high],
    }


def _table(rows: dict[str, Any], prompts: int) -> Table:
    table = Table(title=f"Mean RSVR of {prompts} validation prompts, reasoning mode", title_justify="left")
    for heading in ("", "SFT", "SRPO", "difference", "95% interval"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, row in rows.items():
        low, high = row["interval_95"]
        table.add_row(
            name, f"{row['sft']:.4f}", f"{row['srpo']:.4f}", f"{row['difference']:+.4f}", f"{low:+.4f} to {high:+.4f}"
        )
    return table


def _picture(rows: dict[str, Any]) -> str:
    """Return an SVG of the differences and their intervals."""
    import io

    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 0.6 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, (name, row) in enumerate(reversed(rows.items())):
        axes.plot(row["interval_95"], [place, place], color="#2b6cb0", linewidth=2)
        axes.plot(row["difference"], place, "o", color="#2b6cb0")
        axes.text(row["difference"], place + 0.15, f"{name}: {row['difference']:+.4f}", ha="center", fontsize=8)
    axes.axvline(0, color="#718096", linewidth=1)
    axes.set_yticks([])
    axes.set_xlabel("mean RSVR, SRPO minus SFT (95% bootstrap interval)")
    axes.spines[["top", "right", "left"]].set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
