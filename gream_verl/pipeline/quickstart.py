"""The whole pipeline as a list of commands: raw data to an evaluated recommender, on a machine without a GPU.

Every step is a command of `gream`, of stock LLaMA-Factory or of stock verl that a user can copy from the terminal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from shlex import quote
from typing import Literal

from gream_verl.core.errors import InputError
from gream_verl.core.run_folder import RunFolder
from gream_verl.pipeline.runner import Step, stamp_file

QuickstartSource = Literal["movielens", "amazon2014", "amazon2018", "amazon2023", "recbole", "layout", "table"]
DEFAULT_DATASET = "ml-100k"


@dataclass(frozen=True)
class Profile:
    """The settings of one kind of model.

    ``run`` is the run that the SFT config and the SRPO recipe name; ``mix`` and ``evaluation`` are options of commands.
    """

    run: Path
    train: str
    config: str
    recipe: str
    mix: str
    evaluation: str


MUON_FOR_CPUS = "python -m gream_verl.cpu.llamafactory train"
TINY = Profile(
    Path("runs/quickstart"), MUON_FOR_CPUS, "tiny_cpu.yaml", "gream_srpo_cpu", "", "--chains 2 --max-tokens 128"
)
PRETRAINED = Profile(
    Path("runs/pretrained"),
    "llamafactory-cli train",
    "smollm2_cpu.yaml",
    "gream_srpo_smollm2_cpu",
    "--rows seqrec=1800 --rows item2index=400 --rows index2item=300 --rows fusionseqrec=200 --rows reasoning=500 "
    "--chains sentences --block 8 --longest 256",
    "--limit 200 --chains 1 --max-tokens 160",
)


@dataclass(frozen=True)
class Quickstart:
    """The choices of a user.

    Attributes:
        run: Folder of the run.
        source: Format of the raw data.
        interactions: Interactions in this format.
        items: Items in this format.
        base: A pretrained model, a name or a folder; None for a tiny model without pretraining.
        template: LLaMA-Factory's template of ``base``; None for that of SmolLM2.
        seed: Seed of everything random.
    """

    run: Path = TINY.run
    source: QuickstartSource = "movielens"
    interactions: Path | None = None
    items: Path | None = None
    base: str | None = None
    template: str | None = None
    seed: int = 0


def config_file(name: str) -> Path:
    """Return an SFT config: the one of the clone in the current folder, or of the installed package."""
    local = Path("sft_configs") / name
    return local if local.is_file() else Path(str(resources.files("gream_verl.sft_configs").joinpath(name)))


def recipe_folder() -> Path:
    """Return the folder of the verl recipes, in a clone or in the installed package."""
    return Path(str(resources.files("gream_verl.recipes").joinpath("recipe")))


def quickstart_steps(options: Quickstart) -> list[Step]:
    """Return the steps of the pipeline; refuse a run whose name a config would misread."""
    if options.template and not options.base:
        raise InputError("--template goes with --base; the tiny model has a template of its own")
    if not re.fullmatch(r"[A-Za-z0-9._/-]+", str(options.run)):
        raise InputError(f"{options.run}: use letters, digits, '.', '_' and '-' only in the name of a run")
    run = RunFolder.create(options.run, DEFAULT_DATASET if options.source == "movielens" else None)
    root, data, profile = run.root, run.data, PRETRAINED if options.base else TINY
    config, (sft, srpo) = config_file(profile.config), _overrides(options, profile, run)
    configured = f"{quote(str(config))} {sft}"
    seed = f"--seed {options.seed}" if options.seed else ""
    evaluate, chains = f"gream evaluate {root}", f"{profile.evaluation} --overwrite {seed}"
    raw = {"--interactions": options.interactions, "--items": options.items}
    files = {option: path for option, path in raw.items() if path}
    given = " ".join(f"{option} {quote(str(path))}" for option, path in files.items())

    # files that several steps make or read
    tables, rows, tests = [data.inter, data.item], [data.mix, data.dataset_info], [data.test, data.index]
    results, weights, trained = run.evaluation, run.model / "model.safetensors", run.sft / "model.safetensors"

    mix = Step("sft-data", f"gream data mix {root} {profile.mix} {seed}", [*tables, data.index], rows)
    tiny = Step("model", f"gream model tiny {root} {seed}", [data.mix, data.index], [weights])
    model_and_rows = [mix, tiny]
    if options.base:  # its tokenizer measures the rows
        base = [path] if (path := Path(options.base)).is_dir() else []
        extend = f"gream model extend {root} --base {quote(options.base)} --overwrite {seed}"
        model_and_rows = [
            Step("model", extend, [*base, data.index], [weights]),
            Step("sft-data", f"{mix.command} --tokenizer {run.model}", [*mix.reads, weights], rows),
            Step("sft-check", f"gream sft check {configured}", [config, *rows, run.model], checkpoints=run.sft),
        ]
    train_sft = f"{profile.train} {configured}"
    train_srpo = f"python -m verl.trainer.main_ppo +recipe={profile.recipe} {srpo}"
    prompts, latest = [data.rl, data.val, data.index], run.srpo / "latest_checkpointed_iteration.txt"
    stamp = stamp_file(root, "srpo")
    return [
        Step("data", f"gream data prepare {root} --source {options.source} {given}", list(files.values()), tables),
        Step("index", f"gream index build {root} {seed}", tables, [data.index]),
        Step("rl-data", f"gream data rl {root} --rl-rows 4000 {seed}", [*tables, data.index], [data.rl, data.test]),
        *model_and_rows,
        Step("sft", train_sft, [config, *rows, run.model], [trained], checkpoints=run.sft),
        Step("evaluate-sft", f"{evaluate} {run.sft} {chains}", [trained, *tests], [results / "sft-direct.json"]),
        Step("srpo", train_srpo, [*prompts, run.sft, recipe_folder()], [latest], checkpoints=run.srpo),
        Step("evaluate-srpo", f"{evaluate} {run.srpo} {chains}", [stamp, *tests], [results / "srpo-direct.json"]),
        Step("report", f"gream report {root}", [results], [run.report, root / "metrics.json"]),
    ]


def _overrides(options: Quickstart, profile: Profile, run: RunFolder) -> tuple[str, str]:
    """Return what a run changes in the SFT config and in the SRPO recipe: nothing, for the run that they name."""
    sft, srpo = [], []
    if (run.root, run.data.name) != (profile.run, DEFAULT_DATASET):
        sft += [f"model_name_or_path={run.model}", f"dataset_dir={run.data.root}"]
        sft += [f"dataset={run.data.name}-mix", f"output_dir={run.sft}"]
        srpo += [f"gream.run={run.root}", f"gream.dataset={run.data.name}"]
    if options.template:
        sft += [f"template={options.template}", "default_system=null"]
    if options.seed:
        sft.append(f"seed={options.seed}")
        srpo.append(f"gream.seed={options.seed}")
    return " ".join(sft), " ".join(srpo)
