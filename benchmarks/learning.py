"""SRPO against SFT: several seeds of SRPO from one SFT checkpoint, compared on held-out validation prompts.

``python benchmarks/learning.py`` takes a finished quickstart. Every user's second last interaction is a validation
prompt; it is in no training row. Each SRPO model answers each prompt five times, and the one SFT model as often as all
of them together. Intervals are bootstrapped over users, after averaging over answers (and over seeds, for all seeds).
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from gream_verl.core.files import write_json, write_text
from gream_verl.core.run_folder import RunFolder
from gream_verl.evaluation.metrics import bootstrap_mean
from gream_verl.evaluation.results import Evaluation
from gream_verl.pipeline.quickstart import recipe_folder
from gream_verl.pipeline.runner import Step, run_steps, stamp_file

STEPS = 60
"""Steps of SRPO: three times those of the quickstart."""
CHAINS = 5
"""Answers per prompt and seed, at the temperature and top-p of the authors' validation."""


def learning_steps(run: RunFolder, folder: Path, seeds: int) -> list[Step]:
    """Return the steps: validation of SFT; then, for each seed, SRPO and its validation.

    Args:
        run: A finished quickstart.
        folder: Where the results go: a run folder of its own, with the same data.
        seeds: Number of seeds.
    """
    data = run.data
    steps = [validation(run, folder, "sft", run.sft, run.sft / "model.safetensors", chains=CHAINS * seeds)]
    for seed in range(seeds):
        name = f"srpo-{seed}"
        train = f"python -m verl.trainer.main_ppo +recipe=gream_srpo_cpu gream.run={folder} gream.dataset={data.name} "
        train += f"gream.model={run.sft} gream.checkpoints={folder / name} gream.seed={seed} "
        train += f"trainer.total_training_steps={STEPS} trainer.val_before_train=false trainer.test_freq=-1"
        made = folder / name / "latest_checkpointed_iteration.txt"
        reads = [data.rl, data.val, data.index, run.sft, recipe_folder()]
        steps.append(Step(name, train, reads, [made], checkpoints=folder / name))
        steps.append(validation(run, folder, name, folder / name, stamp_file(folder, name), chains=CHAINS, seed=seed))
    return steps


def validation(
    run: RunFolder, folder: Path, name: str, model: Path, finished: Path, *, chains: int, seed: int = 0
) -> Step:
    """Return the step that samples answers to the validation prompts."""
    command = f"gream evaluate {folder} {model} -c {folder}/evaluation.yaml --name {name} --chains {chains}"
    made = folder / "evaluation" / f"{name}-val-reasoning.json"
    return Step(f"evaluate-{name}", f"{command} --seed {seed}", [finished, run.data.val, run.data.index], [made])


def compared(after: np.ndarray, before: np.ndarray) -> dict[str, Any]:
    """Return means, difference and 95% interval of RSVR [users] after and before SRPO."""
    low, high = bootstrap_mean(after - before)
    difference = float((after - before).mean())
    return {"sft": float(before.mean()), "srpo": float(after.mean()), "difference": difference, "interval": [low, high]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/quickstart"), help="a finished quickstart")
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    run, console = RunFolder.open(given.run), Console()
    folder = run.root / "learning"
    folder.mkdir(exist_ok=True)
    if not (folder / "data").exists():
        (folder / "data").symlink_to(run.data.root.resolve())
    write_text(folder / "evaluation.yaml", "modes: [reasoning]\nsplit: val\nbeams: 0\nmax_tokens: 128\n")
    run_steps(folder, learning_steps(run, folder, given.seeds), console)

    names = ["sft", *(f"srpo-{seed}" for seed in range(given.seeds))]
    results = [Evaluation.load(folder / "evaluation" / f"{name}-val-reasoning.json") for name in names]
    before, *after = [np.array([row["rsvr"] for row in result.rows]) for result in results]
    rows = {name: compared(values, before) for name, values in zip(names[1:], after, strict=True)}
    rows["all seeds"] = compared(np.mean(after, axis=0), before)
    write_json(folder / "learning.json", {"prompts": len(before), "steps": STEPS, "results": rows}, indent=2)
    table = Table("", "SFT", "SRPO", "difference", "95% interval", title=f"Mean RSVR of {len(before)} prompts")
    for name, row in rows.items():
        low, high = row["interval"]
        means = f"{row['sft']:.4f}", f"{row['srpo']:.4f}", f"{row['difference']:+.4f}"
        table.add_row(name, *means, f"{low:+.4f} to {high:+.4f}")
    console.print(table)


if __name__ == "__main__":
    main()
