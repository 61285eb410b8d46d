"""Expected rewards against sampled ones, as the authors have them: the same SFT model, steps, batches and draws.

    python benchmarks/rewards.py             # takes a finished quickstart; about 40 minutes
    python benchmarks/rewards.py RUN --steps 48 --points 3

Each reward trains once; checkpoints on the way are evaluated on validation prompts, in reasoning mode. The picture
RUN/rewards/rewards.png has the minutes of training on its axis, and rewards.json the numbers: a reward that needs no
scoring pass makes more steps in the same minutes, so compare at the same place of the axis.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from gream_verl.core.files import atomic_path, write_json, write_text
from gream_verl.core.run_folder import RunFolder
from gream_verl.evaluation.compare import paired_differences
from gream_verl.evaluation.results import Evaluation
from gream_verl.pipeline.quickstart import recipe_folder
from gream_verl.pipeline.runner import Step, run_steps

REWARDS = {
    "expected": "gream_srpo_cpu",
    "sampled": "[gream_srpo_cpu,sampled_reward]",
}
SHOWN = ("target_logprob", "expected_rsvr", "recall@10", "ndcg@10")
CHAINS = 3
"""Chains of thought per prompt."""


def reward_steps(run: RunFolder, folder: Path, steps: int, points: int) -> list[Step]:
    """Return the steps: validation of SFT; then, for each reward, SRPO and the validation of its checkpoints."""
    data, every = run.data, steps // points
    commands = [validation(run, folder, "sft", run.sft, run.sft / "model.safetensors")]
    for number, recipe in enumerate(REWARDS.values()):
        name = f"reward-{number}"
        train = f"python -m verl.trainer.main_ppo '+recipe={recipe}' "
        train += (
            f"gream.run={folder} gream.dataset={data.name} gream.model={run.sft} gream.checkpoints={folder / name} "
        )
        train += f"trainer.total_training_steps={steps} trainer.val_before_train=false trainer.test_freq=-1 "
        train += f"trainer.save_freq={every} trainer.max_actor_ckpt_to_keep={points}"
        made = folder / name / f"global_step_{steps}" / "actor" / "huggingface" / "model.safetensors"
        reads = [data.rl, data.val, data.index, run.sft, recipe_folder()]
        commands.append(Step(name, train, reads, [made], checkpoints=folder / name))
        for step in range(every, steps + 1, every):
            model = folder / name / f"global_step_{step}" / "actor" / "huggingface"
            commands.append(validation(run, folder, f"{name}-{step}", model, made))
    return commands


def validation(run: RunFolder, folder: Path, name: str, model: Path, finished: Path) -> Step:
    """Return the step that evaluates a model on the validation prompts, with the same draws for every model."""
    command = f"gream evaluate {folder} {model} -c {folder}/evaluation.yaml --name {name}"
    made = folder / "evaluation" / f"{name}-val-reasoning.json"
    return Step(f"evaluate-{name}", command, [finished, run.data.val, run.data.index], [made])


def results_folder(run: RunFolder) -> Path:
    """Make a run folder of its own for results, with the data of ``run`` and the options of their validation."""
    folder = run.root / "rewards"
    folder.mkdir(exist_ok=True)
    if not (folder / "data").exists():
        (folder / "data").symlink_to(run.data.root.resolve())
    write_text(folder / "evaluation.yaml", f"modes: [reasoning]\nsplit: val\nmax_tokens: 128\nchains: {CHAINS}\n")
    return folder


def minutes(checkpoints: Path) -> list[float]:
    """Return the minutes that training had taken after each step, from verl's own log."""
    log = max((checkpoints / "logs").rglob("*.jsonl"), key=lambda file: file.stat().st_mtime)
    rows = [json.loads(line)["data"] for line in log.read_text().splitlines()]
    seconds = [row["timing_s/step"] for row in rows if "timing_s/step" in row]
    return [total / 60 for total in itertools.accumulate(seconds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, default=Path("runs/quickstart"), help="a finished quickstart")
    parser.add_argument("--steps", type=int, default=48, help="steps of SRPO")
    parser.add_argument("--points", type=int, default=3, help="checkpoints to evaluate, evenly spaced")
    given = parser.parse_args()
    run, console = RunFolder.open(given.run), Console()
    folder = results_folder(run)
    run_steps(folder, reward_steps(run, folder, given.steps, given.points), console)

    def result(name: str) -> Evaluation:
        return Evaluation.load(folder / f"evaluation/{name}-val-reasoning.json")

    sft, every, found = result("sft"), given.steps // given.points, []
    figure = Figure(figsize=(10, 6), layout="tight")
    axes = dict(zip(SHOWN, figure.subplots(2, 2).flat, strict=True))
    table = Table("reward", "step", "minutes", *SHOWN, title=f"difference from SFT, {len(sft.rows)} validation users")
    for number, reward in enumerate(REWARDS):
        taken, curves = minutes(folder / f"reward-{number}"), {metric: [(0.0, 0.0, 0.0, 0.0)] for metric in SHOWN}
        for step in range(every, given.steps + 1, every):
            differences = dict(paired_differences({"it": result(f"reward-{number}-{step}")}, sft))["it"]
            shown = [differences[metric] for metric in SHOWN]
            cells = [f"{d['difference']:+.4f}\n{d['low']:+.4f} to {d['high']:+.4f}" for d in shown]
            table.add_row(reward, str(step), f"{taken[step - 1]:.1f}", *cells)
            found.append({"reward": reward, "step": step, "minutes": taken[step - 1], "differences": differences})
            for metric in SHOWN:
                d = differences[metric]
                curves[metric].append((taken[step - 1], d["difference"], d["low"], d["high"]))
        for metric, curve in curves.items():
            places, values, lows, highs = zip(*curve, strict=True)
            axes[metric].plot(places, values, marker="o", label=reward)
            axes[metric].fill_between(places, lows, highs, alpha=0.15)
            axes[metric].set(title=f"{metric}, minus SFT's", xlabel="minutes of training")
    axes[SHOWN[0]].legend()
    write_json(folder / "rewards.json", found, indent=1)
    with atomic_path(folder / "rewards.png") as path:
        figure.savefig(path, format="png", dpi=120)
    console.print(table)


if __name__ == "__main__":
    main()
