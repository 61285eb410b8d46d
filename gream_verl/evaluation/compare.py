"""Results of several runs: read by label, tested in pairs, and shown as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from gream_verl.core.errors import InputError
from gream_verl.evaluation.metrics import paired_difference
from gream_verl.evaluation.results import MAIN_METRICS, REMEDY, Evaluation, read_folder

LISTS = {"recall": "R", "ndcg": "N", "coverage": "Cov", "novelty": "Nov"}
ANSWERS = {"valid_item": "Valid", "pass": "Pass", "rsvr": "RSVR", "greedy_rsvr": "Greedy", "expected_rsvr": "Expect",
           "target_logprob": "LogP", "target_logprob_without_chain": "Alone", "chain_gain": "Gain"}  # fmt: skip
LEGEND = (
    "R: recall. N: NDCG. Cov: share of all items that any user is shown. Nov: novelty in bits. Valid: free answers "
    "that are real items. Pass: chance that one of k free answers is right. RSVR: mean reward. Greedy, Expect: that of "
    "the most likely response, and the expected one. LogP: log-probability of the target in nats. Alone: without "
    "thinking. Gain: LogP - Alone. ±: half of the 95% bootstrap interval over users."
)
TESTS = " Third line: difference from {}. Fourth: p of a two-sided sign-flip test over users, not corrected for others."

Differences = Mapping[str, Mapping[str, Mapping[str, float]]]  # result to metric to paired_difference


def read_results(arguments: Sequence[str]) -> dict[str, Evaluation]:
    """Read the results to compare, by label, baselines first.

    The arguments are runs (their ``evaluation``), folders of results, or single files, each as PATH or ``NAME=PATH``. A
    label is NAME of a file, else ``<run or NAME>/<file>``, and ``<file>`` alone for a single argument and for a
    baseline. A baseline that several runs have, with the same lists, appears once.
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


def paired_differences(results: Mapping[str, Evaluation], baseline: Evaluation, *, seed: int = 0) -> Differences:
    """Return the ``paired_difference`` of every comparable result from a baseline, for every main metric."""
    row_of = {row["user"]: number for number, row in enumerate(baseline.rows)}
    found = {}
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


def results_table(results: Mapping[str, Evaluation], differences: Differences | None = None, other: str = "") -> Group:
    """Return tables of ranked lists and of answers, of at most 80 columns, with the meaning of their columns below.

    The cells hold the ``differences`` of results from the one named ``other``.
    """
    answers = {name: one for name, one in results.items() if "rsvr" in one.metrics}
    tables = [_table(results, LISTS, differences)] + [_table(answers, ANSWERS, differences)] * bool(answers)
    spaced = [part for table in tables for part in (table, Text())]
    return Group(*spaced, Text(LEGEND + (TESTS.format(other) if differences else ""), style="dim"))


def _table(results: Mapping[str, Evaluation], headings: Mapping[str, str], differences: Differences | None) -> Table:
    """Return results by name, with the columns of ``headings`` that any of them has."""
    table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False, leading=int(bool(differences)))
    table.add_column("", min_width=15, overflow="fold")
    known = {metric for evaluation in results.values() for metric in evaluation.metrics}
    columns: dict[str, str] = {}
    for name, heading in headings.items():
        # A terminal has room for three lengths of the recall, two with wide differences, and the longest of the others.
        cutoffs = sorted(int(metric.partition("@")[2]) for metric in known if metric.startswith(f"{name}@"))
        shown = cutoffs[-2 if differences else -3 :] if name == "recall" else cutoffs[-1:]
        columns |= {f"{name}@{k}": f"{heading}@{k}" for k in shown}
        columns |= {name: heading} if name in known else {}
    for heading in columns.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for name, evaluation in results.items():
        found = (differences or {}).get(name, {})
        cells = (_cell(evaluation, metric, found.get(metric)) for metric in columns)
        table.add_row(Text(name.replace("/", "/\n", 1)), *cells)
    return table


def warning_texts(results: Mapping[str, Evaluation], baseline: str) -> list[Text]:
    """Return one sentence per reason why results cannot be compared with ``baseline``."""
    found: dict[str, list[str]] = {}
    for name, evaluation in results.items():
        if reasons := results[baseline].disagreements(evaluation):
            found.setdefault("; ".join(reasons), []).append(name)
    return [
        Text(f"WARNING: {' and '.join(names)} cannot be compared with {baseline}: {why}.", style="bold red")
        for why, names in found.items()
    ]


def protocol_table(results: Mapping[str, Evaluation]) -> Table:
    """Return a table of the protocols of results: one value per setting, or one per name where they differ."""
    table = Table(title="Protocol", title_justify="left", show_header=False)
    protocols = {name: evaluation.settings.get("protocol", {}) for name, evaluation in results.items()}
    for key in dict.fromkeys(key for protocol in protocols.values() for key in protocol):
        names: dict[str, list[str]] = {}
        for name, protocol in protocols.items():
            names.setdefault(str(protocol.get(key)), []).append(name)
        values = [value if len(names) == 1 else f"{', '.join(some)}: {value}" for value, some in names.items()]
        table.add_row(key.replace("_", " "), Text("\n".join(values), overflow="fold"))
    return table


def _cell(evaluation: Evaluation, metric: str, difference: Mapping[str, float] | None) -> Text:
    """Return the value, ± half of its interval, and the difference with its p-value where they are known."""
    is_free = evaluation.settings.get("mode") == "reasoning"  # all others recommend from the list of items
    value: Any = evaluation.metrics.get(metric, 1.0 if metric == "valid_item" and not is_free else None)
    if value is None:
        return Text("–")
    lines = [f"{value:.4f}" if value < 0.99995 else f"{value:.4g}"]
    if metric in evaluation.intervals:
        low, high = evaluation.intervals[metric]
        lines.append(f"±{(high - low) / 2:.4f}")
    if difference is not None:
        p = difference["p"]
        lines += [f"{difference['difference']:+.4f}", f"p={p:.3f}" if p >= 0.001 else "p<.001"]
    # A 0 before the point takes room and says nothing.
    return Text("\n".join(line.replace("0.", ".", 1) if line.lstrip("+-±p=")[:2] == "0." else line for line in lines))


def _lists(evaluation: Evaluation) -> dict[str, Any]:
    return {row["user"]: (row["target"], row.get("recommended")) for row in evaluation.rows}
