"""Results and protocols as tables, for the terminal and for the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from gream_verl.evaluation.results import Evaluation

HEADINGS = {
    "recall": "R",
    "ndcg": "N",
    "valid_item": "Valid",
    "rsvr": "RSVR",
    "pass": "Pass",
    "coverage": "Cov",
    "novelty": "Nov",
}
"""Metrics of the table, in its order."""
MOST_CUTOFFS = 3
"""Columns per ranking metric that a terminal has room for, those of the longest lists."""
LEGEND = (
    "R: recall. N: NDCG. Valid: free answers that are real items. RSVR: mean reward. Pass: chance that one of k free "
    "answers is right. Cov: share of all items that any user is shown. Nov: novelty in bits. "
    "±: half of the 95% bootstrap interval over users."
)
TESTS = " Third line: difference from {}. Fourth: p of a two-sided sign-flip test over users, not corrected for others."

Differences = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Name of a result to metric to ``metrics.paired_difference``."""


def results_table(results: Mapping[str, Evaluation], differences: Differences | None = None, other: str = "") -> Group:
    """Return results as a table of at most 80 columns, with the meaning of its columns below.

    Args:
        results: Name to evaluation.
        differences: Of some of the results, from ``other``; they go into the cells with their p-values.
        other: Text for the recommender to which the differences are.
    """
    table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False, leading=int(differences is not None))
    table.add_column("", overflow="fold")
    known = {metric for evaluation in results.values() for metric in evaluation.metrics} | {"valid_item"}
    columns: dict[str, str] = {}
    for name, heading in HEADINGS.items():
        cutoffs = sorted(int(metric.partition("@")[2]) for metric in known if metric.startswith(f"{name}@"))
        columns |= {f"{name}@{k}": f"{heading}@{k}" for k in cutoffs[-MOST_CUTOFFS:] if name != "ndcg" or k >= 5}
        columns |= {name: heading} if name in known else {}
    for heading in [*columns.values(), "Users"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, evaluation in results.items():
        found = (differences or {}).get(name, {})
        cells = (_cell(evaluation, metric, found.get(metric)) for metric in columns)
        table.add_row(Text(name.replace("/", "/\n", 1)), *cells, f"{len(evaluation.rows):,}")
    return Group(table, Text(LEGEND + (TESTS.format(other) if differences is not None else ""), style="dim"))


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
