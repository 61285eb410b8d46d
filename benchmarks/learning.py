"""SRPO against SFT: several seeds of SRPO from one SFT checkpoint, compared on held-out validation prompts.

``python benchmarks/learning.py`` takes a finished quickstart. Every user's second last interaction is a validation
prompt; it is in no training row. Printed are the differences of each SRPO model from the SFT model, and of the mean of
all seeds, with 95% intervals bootstrapped over users.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from gream_verl.core.files import write_json, write_text
from gream_verl.core.run_folder import RunFolder
from gream_verl.evaluation.compare import paired_differences
from gream_verl.evaluation.metrics import paired_difference
from gream_verl.evaluation.results import Evaluation
from gream_verl.pipeline.quickstart import recipe_folder
from gream_verl.pipeline.runner import Step, run_steps, stamp_file

CHAINS = 3
"""Chains of thought per prompt."""


def learning_steps(run: RunFolder, folder: Path, seeds: int, steps: int) -> list[Step]:
    """Return the steps: validation of SFT; then, for each seed, SRPO and its validation.

    Args:
        run: A finished quickstart.
        folder: Where the results go: a run folder of its own, with the same data.
        seeds: Number of seeds.
        steps: Steps of SRPO.
    """
    data = run.data
    commands = [validation(run, folder, "sft", run.sft, run.sft / "model.safetensors")]
    for seed in range(seeds):
        name = f"srpo-{seed}"
        train = f"python -m verl.trainer.main_ppo +recipe=gream_srpo_cpu gream.run={folder} gream.dataset={data.name} "
        train += f"gream.model={run.sft} gream.checkpoints={folder / name} gream.seed={seed} "
        train += f"trainer.total_training_steps={steps} trainer.val_before_train=false trainer.test_freq=-1"
        made = folder / name / "latest_checkpointed_iteration.txt"
        reads = [data.rl, data.val, data.index, run.sft, recipe_folder()]
        commands.append(Step(name, train, reads, [made], checkpoints=folder / name))
        commands.append(validation(run, folder, name, folder / name, stamp_file(folder, name)))
    return commands


def validation(run: RunFolder, folder: Path, name: str, model: Path, finished: Path) -> Step:
    """Return the step that evaluates a model on the validation prompts, with the same draws for every model."""
    command = f"gream evaluate {folder} {model} -c {folder}/evaluation.yaml --name {name}"
    made = folder / "evaluation" / f"{name}-val-reasoning.json"
    return Step(f"evaluate-{name}", command, [finished, run.data.val, run.data.index], [made])


def validation_folder(run: RunFolder, name: str) -> Path:
    """Make a run folder of its own for results, with the data of ``run`` and the options of their validation."""
    folder = run.root / name
    folder.mkdir(exist_ok=True)
    if not (folder / "data").exists():
        (folder / "data").symlink_to(run.data.root.resolve())
    write_text(folder / "evaluation.yaml", f"modes: [reasoning]\nsplit: val\nmax_tokens: 128\nchains: {CHAINS}\n")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/quickstart"), help="a finished quickstart")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="steps of SRPO; the quickstart has 32")
    given = parser.parse_args()
    run, console = RunFolder.open(given.run), Console()
    folder = validation_folder(run, "learning")
    run_steps(folder, learning_steps(run, folder, given.seeds, given.steps), console)

    names = [f"srpo-{seed}" for seed in range(given.seeds)]
    sft, *after = (Evaluation.load(folder / f"evaluation/{name}-val-reasoning.json") for name in ("sft", *names))
    found = dict(paired_differences(dict(zip(names, after, strict=True)), sft))
    all_seeds = {}
    for metric in found[names[0]]:
        before, *values = (one.values(metric) for one in (sft, *after))
        assert before is not None
        all_seeds[metric] = paired_difference(np.mean(np.array(values), axis=0), before)
    found["all seeds"] = all_seeds
    means = {name: dict(one.metrics) for name, one in zip(("sft", *names), (sft, *after), strict=True)}
    write_json(folder / "learning.json", {"steps": given.steps, "metrics": means, "differences": found}, indent=2)
    table = Table("difference from SFT", *found, title=f"{len(sft.rows)} validation users, {given.steps} steps of SRPO")
    for metric in found[names[0]]:
        cells = [
            f"{d['difference']:+.4f}\n{d['low']:+.4f} to {d['high']:+.4f}"
            for d in (one[metric] for one in found.values())
        ]
        table.add_row(f"{metric}\nSFT: {sft.metrics[metric]:.4f}", *cells)
    console.print(table)


if __name__ == "__main__":
    main()
