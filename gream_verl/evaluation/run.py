"""Evaluation of one checkpoint of a run, from its files to its files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Group

from gream_verl.core.errors import InputError
from gream_verl.core.faithfulness import ClaimReader, faithfulness
from gream_verl.core.origin import check_model
from gream_verl.core.rsvr import Mode
from gream_verl.core.run_folder import RunFolder
from gream_verl.core.semantic_ids import ItemIndex, find_sids
from gream_verl.evaluation.compare import protocol_table, results_table, warning_texts
from gream_verl.evaluation.direct import evaluate_direct
from gream_verl.evaluation.floors import evaluate_floors
from gream_verl.evaluation.metrics import CUTOFFS
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.prompts import MODES, Prompt, modes_of, read_protocol, refuse_to_lose
from gream_verl.evaluation.reasoning import evaluate_reasoning
from gream_verl.evaluation.results import FLOORS, Evaluation, measure, merged, read_folder, training_counts
from gream_verl.model.loading import resolve_model


def evaluate_run(run: RunFolder, checkpoint: Path | None, options: EvaluationOptions) -> Group:
    """Evaluate a checkpoint in the modes asked for, and the floors; save the results and return tables of them.

    After both modes, their lists taken in turn are those of ``NAME-merged.json``. The files are
    ``NAME-<mode>.json`` and ``<floor>.json`` in ``RUN/evaluation``; on the validation split
    ``NAME-val-<mode>.json`` and ``<floor>-val.json``. The checkpoint is a Hugging Face folder or verl's folder of
    checkpoints; None takes ``RUN/srpo`` if it holds a checkpoint, else ``RUN/sft``.
    """
    checkpoint = checkpoint or run.trained
    folder, index = resolve_model(checkpoint), ItemIndex.load(run.data.index)
    check_model(folder, run.data.index)
    asked = {mode: read_protocol(run.data, options, mode, index) for mode in modes_asked(options)}
    prompts, protocol = next(iter(asked.values()))
    if any([prompt.user for prompt in some] != [prompt.user for prompt in prompts] for some, _ in asked.values()):
        raise InputError(f"{protocol['prompts']}: its users differ between the modes; evaluate one mode at a time")
    suffix = _suffix(options)
    files: dict[str, str] = {mode: f"{options.name or checkpoint.absolute().name}{suffix}-{mode}" for mode in asked}
    if not options.overwrite:
        for mode, read in asked.items():
            refuse_to_lose(run.evaluation / f"{files[mode]}.json", *read)

    save = _save_floors(run, prompts, protocol, index, options)
    done: dict[str, Evaluation] = {}
    for mode, (prompts, protocol) in asked.items():
        progress = run.evaluation / f".{files[mode]}.progress.jsonl"
        if mode == "direct":
            evaluation = evaluate_direct(folder, prompts, index, options)
        else:
            evaluation = evaluate_reasoning(folder, prompts, index, options, progress)
            if run.data.item.is_file():
                shares = faithful_shares(evaluation, prompts, ClaimReader(run.data.read_items(), index), index)
                evaluation = replace(evaluation, metrics={**evaluation.metrics, **shares})
        about = {key: protocol[key] for key in ("prompts", "users_in_file", "seed")}
        done[mode] = replace(evaluation, settings={**evaluation.settings, **about, "protocol": protocol})
        save(files[mode], done[mode])
        progress.unlink(missing_ok=True)  # the results hold all of it
    if len(done) == 2 and options.beams and options.ranking == "beam":
        files |= {"merged": files["direct"].removesuffix("direct") + "merged"}
        save(files["merged"], merged(done["direct"], done["reasoning"]))

    saved = read_folder(run.evaluation)
    new = {file: saved[file] for file in files.values()}
    first = next(iter(new))
    baselines = {file: one for file, one in saved.items() if one.is_baseline and file.endswith("-val") == bool(suffix)}
    shown = {file: one for file, one in baselines.items() if not new[first].disagreements(one)} | new
    return Group(results_table(shown), *warning_texts(baselines | new, first), protocol_table(new))


def floors_of_run(run: RunFolder, options: EvaluationOptions) -> Group:
    """Evaluate and save the floors alone, for which a prepared data set is enough; return tables of them."""
    if run.data.index.is_file():
        index = ItemIndex.load(run.data.index)
    else:
        items = list(run.data.read_items())
        index = ItemIndex.from_codes(items, ([row] for row in range(len(items))))
    prompts, protocol = read_protocol(run.data, options, "direct", index)
    _save_floors(run, prompts, protocol, index, options)
    saved = read_folder(run.evaluation)
    floors = {floor: saved[floor] for floor in (f"{floor}{_suffix(options)}" for floor in FLOORS)}
    return Group(results_table(floors), protocol_table(floors))


def _suffix(options: EvaluationOptions) -> str:
    return "-val" if options.split == "val" else ""


def _save_floors(
    run: RunFolder, prompts: list[Prompt], protocol: dict[str, Any], index: ItemIndex, options: EvaluationOptions
) -> Callable[[str, Evaluation], None]:
    """Evaluate and save the floors; return the function that measures and saves a result by its name."""
    counts, names = training_counts(run.data.inter, index.sids), [f"{floor}{_suffix(options)}" for floor in FLOORS]

    def save(file: str, evaluation: Evaluation) -> None:
        measured = measure(evaluation, index.sids, counts, cutoffs=options.cutoffs, seed=options.seed)
        measured.save(run.evaluation / f"{file}.json")

    if not options.overwrite:
        for name in names:
            refuse_to_lose(run.evaluation / f"{name}.json", prompts, protocol)
    longest = max(options.beams, *CUTOFFS, *options.cutoffs)
    floors = evaluate_floors(run.data.inter, prompts, index.sids, protocol, k=longest, seed=options.seed)
    for name, floor in zip(names, FLOORS, strict=True):
        save(name, floors[floor])
    return save


def faithful_shares(
    evaluation: Evaluation, prompts: Sequence[Prompt], reader: ClaimReader, index: ItemIndex
) -> dict[str, float]:
    """Return the share of chains that claim something about the history and nothing untrue, and of true claims."""
    shown = {
        prompt.user: [index.items[sid] for sid in find_sids(prompt.messages[-1]["content"]) if sid in index.items]
        for prompt in prompts
    }
    claims = (reader.read(chain["text"], shown[row["user"]]) for row in evaluation.rows for chain in row["chains"])
    shares = faithfulness(claims)
    return {"faithful": shares.pop("faithful", 0.0), **{f"true {kind}": share for kind, share in shares.items()}}


def modes_asked(options: EvaluationOptions) -> tuple[Mode, ...]:
    """Return the modes to evaluate, direct first: as asked, else those of the prompts, else those of the split."""
    if options.modes is not None:
        return tuple(mode for mode in MODES if mode in options.modes)
    if options.prompts is not None:
        return modes_of(options.prompts)
    return ("reasoning",) if options.split == "val" else MODES
