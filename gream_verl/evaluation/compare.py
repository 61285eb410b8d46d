"""Results of several runs side by side: one table, one picture, one file of numbers."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from gream_verl.core.errors import InputError
from gream_verl.core.files import write_json, write_text
from gream_verl.evaluation.breakdown import BOUNDS, break_down, labels, main_metrics
from gream_verl.evaluation.metrics import paired_difference
from gream_verl.evaluation.results import Evaluation, read_folder
from gream_verl.evaluation.tables import MARK, merged_protocol, render, to_entry, warning_text, warnings


def read_results(arguments: Sequence[str]) -> dict[str, Evaluation]:
    """Read what is to be compared.

    Args:
        arguments: Folders of runs (their ``evaluation``), folders of evaluations, or single files, each with a name of
            its own where that is wished: ``NAME=PATH``.

    Returns:
        Label to evaluation, baselines first. Labels are ``<folder>/<file>``, without the folder when there is one
        argument only; a name given to a file is its label. A baseline that several folders have, with the same lists
        for the same users, is there once, by the name of its file where no other has it.

    Raises:
        InputError: When nothing is found, or two results would have one label.
    """
    found: list[_Found] = []
    for argument in arguments:
        name, path = _split_name(argument)
        folder = path / "evaluation" if (path / "evaluation").is_dir() else path
        if not folder.is_dir():
            label = name or (path.stem if len(arguments) == 1 else f"{_folder_name(path)}/{path.stem}")
            found.append(_Found(argument, label, path.stem, Evaluation.load(path), named=name is not None))
            continue
        for stem, evaluation in read_folder(folder).items():
            label = stem if len(arguments) == 1 and not name else f"{name or _folder_name(folder)}/{stem}"
            found.append(_Found(argument, label, stem, evaluation))
    baselines: list[_Found] = []
    for one in sorted((one for one in found if one.evaluation.is_baseline), key=lambda one: not one.named):
        if one.named or not any(_same_lists(one.evaluation, other.evaluation) for other in baselines):
            baselines.append(one)
    stems = Counter(one.stem for one in baselines if not one.named)
    results: dict[str, Evaluation] = {}
    for one in sorted(found, key=lambda one: not one.evaluation.is_baseline):
        if one.evaluation.is_baseline and one not in baselines:
            continue
        alone = one.evaluation.is_baseline and not one.named and stems[one.stem] == 1
        label = one.stem if alone else one.label
        if label in results:
            raise InputError(f"{one.argument}: {label!r} is there twice; name the arguments, NAME=PATH")
        results[label] = one.evaluation
    return results


@dataclass(frozen=True, eq=False)
class _Found:
    """A result as an argument names it; ``named`` where the argument names this file alone."""

    argument: str
    label: str
    stem: str
    evaluation: Evaluation
    named: bool = False


def compare(
    results: Mapping[str, Evaluation],
    *,
    baseline: str | None = None,
    k: int = 10,
    common_users: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Compare every result with one of them.

    Args:
        results: From ``read_results``.
        baseline: Its label; None takes the first language model, or the first result.
        k: Length of the lists.
        common_users: Use only the users that all results have, with the same targets.
        seed: Seed of bootstrap and test.

    Returns:
        Ready for JSON: ``k``, ``baseline``, ``common_users`` (how many, or None), ``tests`` (how many p-values there
        are), ``warnings``, and ``results``: label to ``metrics``, ``intervals_95``, ``settings``, ``best`` (metrics),
        ``breakdown``, ``not_paired`` (why users or protocol are not those of the baseline) and, where they are,
        ``differences``: metric to ``difference`` from the baseline, its interval ``low`` and ``high``, and ``p``.

    Raises:
        InputError: When there is no such baseline, lists are shorter than k, or no user is common.
    """
    baseline = _baseline(results, baseline)
    users = _common_users(results) if common_users else None
    chosen = {name: _at(name, evaluation, k, users) for name, evaluation in results.items()}
    reasons = {name: chosen[baseline].disagreements(evaluation) for name, evaluation in chosen.items()}
    entries = {}
    for name, evaluation in chosen.items():
        entries[name] = to_entry(evaluation, k=k, seed=seed)
        entries[name]["breakdown"] = break_down(evaluation, k=k, seed=seed)
        entries[name] |= {"not_paired": reasons[name], "best": []}
        if name != baseline and not reasons[name]:
            entries[name]["differences"] = differences(evaluation, chosen[baseline], k=k, seed=seed)
    for metric in main_metrics(k):
        values = {name: entries[name]["metrics"].get(metric) for name in entries if not reasons[name]}
        top = max((value for value in values.values() if value is not None), default=None)
        for name, value in values.items():
            if value is not None and value == top and len(values) > 1:
                entries[name]["best"].append(metric)
    return {
        "k": k,
        "baseline": baseline,
        "common_users": None if users is None else len(users),
        "tests": sum(len(entry.get("differences", ())) for entry in entries.values()),
        "warnings": warnings(chosen, baseline) + _untold(chosen),
        "results": entries,
    }


def write_comparison(folder: str | os.PathLike[str], summary: Mapping[str, Any]) -> None:
    """Write ``compare.json`` and ``compare.svg``.

    Args:
        folder: Where to write.
        summary: From ``compare``.

    Raises:
        InputError: When a file cannot be written.
    """
    write_json(Path(folder) / "compare.json", summary, indent=2)
    write_text(Path(folder) / "compare.svg", draw(summary))


def comparison_table(summary: Mapping[str, Any]) -> Group:
    """Return the table for the terminal; warnings, the meaning of the numbers and the protocol below."""
    from gream_verl.evaluation.protocol import protocol_table

    protocol = merged_protocol(summary["results"])
    baseline, tests = summary["baseline"], summary["tests"]
    sentences = [f"*: best. Third line: difference from {baseline}; fourth: two-sided p of a sign-flip test over users"]
    sentences += [f"{tests} tests, not corrected for their number"] if tests > 1 else []
    if summary["common_users"] is not None:
        sentences.append(f"only the {summary['common_users']:,} users that all results have, with the same targets")
    return Group(
        render(summary["results"], title=f"Compared with {baseline}"),
        Text("; ".join(sentences) + ".", style="dim"),
        *map(warning_text, summary["warnings"]),
        *([protocol_table({"": protocol})] if protocol else []),
    )


def draw(summary: Mapping[str, Any]) -> str:
    """Return the picture, as SVG: the main metrics with their intervals, and recall@k by bucket."""
    from matplotlib.figure import Figure

    from gream_verl.evaluation.pictures import draw_buckets, draw_intervals, dress, to_svg

    entries = {name + MARK * bool(entry["not_paired"]): entry for name, entry in summary["results"].items()}
    recall = f"recall@{summary['k']}"
    shown = [
        metric for metric in main_metrics(summary["k"]) if any(metric in e["intervals_95"] for e in entries.values())
    ]
    panels = [heading for heading in BOUNDS if any(entry["breakdown"].get(heading) for entry in entries.values())]
    top = 1.2 + 0.28 * len(entries)
    figure = Figure(figsize=(11, top + 3.4 * bool(panels)), layout="constrained")
    parts = figure.subfigures(1 + bool(panels), 1, height_ratios=[top, 3.4][: 1 + bool(panels)], squeeze=False)[:, 0]
    for axes, metric in zip(parts[0].subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        draw_intervals(
            dress(axes, metric),
            {
                name: (entry["metrics"][metric], entry["intervals_95"][metric])
                if metric in entry["intervals_95"]
                else None
                for name, entry in entries.items()
            },
        )
        if metric != shown[0]:
            axes.tick_params(labelleft=False)
    if panels:
        for axes, heading in zip(parts[1].subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            buckets = {name: entry["breakdown"].get(heading, ()) for name, entry in entries.items()}
            draw_buckets(dress(axes, f"{recall} by {heading}", heading), buckets, labels(heading), recall)
    if any(entry["not_paired"] for entry in entries.values()):
        figure.suptitle(f"{MARK.strip()} not comparable with {summary['baseline']}", fontsize=9, color="#9b2c2c")
    return to_svg(figure)


def _split_name(argument: str) -> tuple[str | None, Path]:
    """Return the name, where one is given, and the path."""
    name, sign, path = argument.partition("=")
    return (name, Path(path)) if sign and name and not Path(argument).exists() else (None, Path(argument))


def _folder_name(folder: Path) -> str:
    folder = folder.resolve()
    folder = folder if folder.is_dir() else folder.parent
    return folder.parent.name if folder.name == "evaluation" else folder.name


def _same_lists(one: Evaluation, other: Evaluation) -> bool:
    parts = [{row["user"]: (row["target"], row.get("recommended")) for row in each.rows} for each in (one, other)]
    return parts[0] == parts[1]


def _untold(results: Mapping[str, Evaluation]) -> list[str]:
    """Return a sentence about the files that are older than protocols."""
    older = [name for name, evaluation in results.items() if not evaluation.settings.get("protocol")]
    told = f"{', '.join(older)}: the file tells no protocol; only users, targets and what it tells were compared"
    return [told] if older else []


def _baseline(results: Mapping[str, Evaluation], name: str | None) -> str:
    if name is None:
        return next((label for label, one in results.items() if not one.is_baseline), next(iter(results)))
    if name not in results:
        raise InputError(f"--baseline {name}: no such result; there are {', '.join(results)}")
    return name


def _common_users(results: Mapping[str, Evaluation]) -> set[tuple[str, str]]:
    """Return the users, each with the target, that all results have."""
    common = set.intersection(*({(row["user"], row["target"]) for row in one.rows} for one in results.values()))
    if not common:
        raise InputError(f"{', '.join(results)}: no user with the same target is in all of them; compare fewer results")
    return common


def _at(name: str, evaluation: Evaluation, k: int, users: set[tuple[str, str]] | None) -> Evaluation:
    """Return an evaluation with the main metrics at ``k``, of some users only where they are told."""
    metrics = dict(evaluation.metrics)
    for metric in main_metrics(k):
        values = evaluation.values(metric)
        if values is not None:
            metrics[metric] = float(values.mean())
        elif "@" in metric and evaluation.depth:
            raise InputError(
                f"{name}: its lists hold {evaluation.depth} items, but {metric} is asked for; take a smaller --k, or "
                "evaluate anew with more --beams"
            )
    evaluation = replace(evaluation, metrics=metrics)
    if users is None:
        return evaluation if k == 10 else replace(evaluation, intervals={})
    return evaluation.of_users(users)


def differences(evaluation: Evaluation, baseline: Evaluation, *, k: int = 10, seed: int = 0) -> dict[str, Any]:
    """Return the differences of all main metrics that both have, over the same users in any order.

    Returns:
        Metric to what ``paired_difference`` gives.
    """
    place = {row["user"]: number for number, row in enumerate(baseline.rows)}
    order = [place[row["user"]] for row in evaluation.rows]
    found = {}
    for metric in main_metrics(k):
        ours, theirs = evaluation.values(metric), baseline.values(metric)
        if ours is not None and theirs is not None:
            found[metric] = paired_difference(ours, theirs[order], seed=seed)
    return found
