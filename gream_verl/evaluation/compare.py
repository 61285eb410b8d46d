"""Results of several runs: read by label, and tested in pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gream_verl.core.errors import InputError
from gream_verl.evaluation.catalogue import MAIN_METRICS
from gream_verl.evaluation.metrics import paired_difference
from gream_verl.evaluation.results import REMEDY, Evaluation, read_folder


def read_results(arguments: Sequence[str]) -> dict[str, Evaluation]:
    """Read the results to compare, by label, baselines first.

    Args:
        arguments: Runs (their ``evaluation``), folders of results, or single files, each as PATH or ``NAME=PATH``.

    Returns:
        Label to evaluation. A label is NAME of a file, else ``<run or NAME>/<file>``, and ``<file>`` alone for a
        single argument and for a baseline. A baseline that several runs have, with the same lists, appears once.

    Raises:
        InputError: When an argument holds no result, or two results have one label.
    """
    results: dict[str, Evaluation] = {}
    for argument in arguments:
        name, sign, after = argument.partition("=")
        name, path = (name, Path(after)) if sign and not Path(argument).exists() else ("", Path(argument))
        folder = path / "evaluation" if (path / "evaluation").is_dir() else path
        found = read_folder(folder) if folder.is_dir() else {path.stem: Evaluation.load(path)}
        if not found:
            raise InputError(f"{folder}: no result of an evaluation (NAME.json and NAME.rows.jsonl); {REMEDY}")
        where = folder.resolve() if folder.is_dir() else folder.resolve().parent
        run = name or (where.parent if where.name == "evaluation" else where).name
        for stem, evaluation in found.items():
            label = f"{run}/{stem}"
            if name and not folder.is_dir():
                label = name
            elif len(arguments) == 1 or (evaluation.is_baseline and stem not in results):
                label = stem
            elif evaluation.is_baseline and _lists(results[stem]) == _lists(evaluation):
                continue
            if label in results:
                raise InputError(f"{argument}: {label!r} is there twice; name the arguments, NAME=PATH")
            results[label] = evaluation
    return dict(sorted(results.items(), key=lambda pair: not pair[1].is_baseline))


def choose_baseline(results: Mapping[str, Evaluation], label: str | None) -> str:
    """Return the label of the result to compare the others with; by default the first language model."""
    label = label or next((name for name, one in results.items() if not one.is_baseline), next(iter(results)))
    if label not in results:
        raise InputError(f"--baseline {label}: no such result; there are {', '.join(results)}")
    return label


def paired_differences(
    results: Mapping[str, Evaluation], baseline: Evaluation, *, seed: int = 0
) -> dict[str, dict[str, dict[str, float]]]:
    """Return the ``paired_difference`` from a baseline of every main metric, of the results that are comparable.

    Args:
        results: Name to evaluation.
        baseline: One of them, which is left out.
        seed: Seed of bootstrap and test.
    """
    row_of = {row["user"]: number for number, row in enumerate(baseline.rows)}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for name, evaluation in results.items():
        if evaluation is baseline or baseline.disagreements(evaluation):
            continue
        order = [row_of[row["user"]] for row in evaluation.rows]
        pairs = {metric: (evaluation.values(metric), baseline.values(metric)) for metric in MAIN_METRICS}
        found[name] = {
            metric: paired_difference(ours, theirs[order], seed=seed)
            for metric, (ours, theirs) in pairs.items()
            if ours is not None and theirs is not None
        }
    return found


def _lists(evaluation: Evaluation) -> dict[str, Any]:
    return {row["user"]: (row["target"], row.get("recommended")) for row in evaluation.rows}
