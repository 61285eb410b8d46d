"""Does SRPO improve on SFT? The quickstart of several seeds with three times the steps of SRPO, on test users.

    python benchmarks/learning.py                # seeds 0 to 2: an hour and a half on two cores
    python benchmarks/learning.py --seeds 0 1    # finished steps are kept: see below

Every seed has its own index, rows, SFT model and SRPO. Both models write the one most likely chain of every user, as
``gream serve`` does, and rank all items behind it. Printed are the differences of SRPO from SFT, for each seed and for
the mean over seeds, with 95% intervals bootstrapped over users.

The quickstart keeps little more than one core busy. With ``OMP_NUM_THREADS=1``, two calls of different seeds at once
take as long as one; a last call with all seeds prints the table.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from gream_verl.core.files import write_json, write_text
from gream_verl.core.run_folder import RunFolder
from gream_verl.evaluation.metrics import paired_difference
from gream_verl.evaluation.results import MAIN_METRICS, Evaluation
from gream_verl.pipeline.quickstart import DEFAULT_DATASET, Quickstart, quickstart_steps
from gream_verl.pipeline.runner import Step, run_steps

MODELS = ("sft", "srpo")


def learning_steps(run: RunFolder, seed: int, steps: int) -> list[Step]:
    """Return the steps of the quickstart with a longer SRPO and an evaluation of the most likely chains."""
    config, found = run.root / "likely.yaml", []
    write_text(config, "modes: [reasoning]\nmax_tokens: 128\ntemperature: 0\n")
    for step in quickstart_steps(Quickstart(run=run.root, seed=seed)):
        if step.name == "srpo":
            longer = f"trainer.total_training_steps={steps} trainer.val_before_train=false trainer.test_freq=-1"
            found.append(replace(step, command=f"{step.command} {longer}"))
        elif step.name.startswith("evaluate-"):
            name = step.name.removeprefix("evaluate-")
            command = f"gream evaluate {run.root} {run.root / name} -c {config} --name {name} --overwrite"
            made = [result_file(run, name)]
            found.append(replace(step, command=command, reads=[*step.reads, config], makes=made))
        elif step.name != "report":
            found.append(step)
    return found


def result_file(run: RunFolder, name: str) -> Path:
    """Return the result of a model."""
    return run.evaluation / f"{name}-reasoning.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", nargs="?", type=Path, default=Path("runs/learning"), help="folder of the runs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=96, help="steps of SRPO; the quickstart has 32")
    given = parser.parse_args()
    console = Console()
    results: dict[str, list[Evaluation]] = {name: [] for name in MODELS}
    for seed in given.seeds:
        run = RunFolder.create(given.root / str(seed), DEFAULT_DATASET)
        run_steps(run.root, learning_steps(run, seed, given.steps), console)
        for name in MODELS:
            results[name].append(Evaluation.load(result_file(run, name)))

    users = [row["user"] for row in results["sft"][0].rows]
    assert all([row["user"] for row in one.rows] == users for some in results.values() for one in some)
    table = Table("SRPO - SFT", *map(str, given.seeds), "all", title=f"{len(users)} test users, {given.steps} steps")
    found = {}
    for metric in MAIN_METRICS:
        old, new = (np.array([one.values(metric) for one in results[name]], dtype=float) for name in MODELS)
        if np.isnan(old).all():  # not measured
            continue
        pairs = [*zip(new, old, strict=True), (new.mean(axis=0), old.mean(axis=0))]
        found[metric] = [paired_difference(ours, theirs) for ours, theirs in pairs]
        cells = [f"{d['difference']:+.4f}\n{d['low']:+.4f} to\n{d['high']:+.4f}" for d in found[metric]]
        p = found[metric][-1]["p"]
        table.add_row(f"{metric}\nSFT {old.mean():.4f}\n{f'p {p:.3f}' if p >= 0.001 else 'p < .001'}", *cells)
    report = {"seeds": given.seeds, "steps": given.steps, "differences": found}
    write_json(given.root / "learning.json", report, indent=1)
    console.print(table)


if __name__ == "__main__":
    main()
