"""Results as a table: which columns, which numbers, and how they look in a terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table
from rich.text import Text

from gream_verl.evaluation.breakdown import intervals
from gream_verl.evaluation.results import Evaluation

Entry = Mapping[str, Any]
"""An evaluation as JSON: ``metrics``, ``intervals_95``, ``settings``; when compared ``best``, ``differences``."""

LENGTHS = {"ndcg": 5, "mrr": 10, "pass": 2}
"""The shortest lists, or fewest samples, that a column is for; any where it is not said."""
NOT_IN_TERMINALS = {"ndcg@5", "mrr", "pass"}
MOST_IN_TERMINALS = 3
"""Lengths of lists that a terminal has room for, the longest."""
HEADINGS = {"recall": "R", "ndcg": "N", "mrr": "M", "pass": "Pass", "coverage": "Cov", "novelty": "Nov"}
MARK = " (!)"
"""Behind the name of what must not be compared with the baseline."""
LEGEND = (
    "R: recall. N: NDCG. Valid: free answers that are real items. RSVR: mean reward. Cov: share of all items that "
    "anybody is shown. Nov: novelty in bits. ±: half of the 95% bootstrap interval over users."
)


def to_entry(evaluation: Evaluation, *, k: int = 10, seed: int = 0) -> dict[str, Any]:
    """Return an evaluation, without its rows, ready for JSON; intervals that it lacks are computed."""
    known = evaluation.intervals or intervals(evaluation, k=k, seed=seed)
    return {
        "metrics": dict(evaluation.metrics),
        "intervals_95": {metric: list(ends) for metric, ends in known.items()},
        "settings": dict(evaluation.settings),
    }


def columns(entries: Collection[Entry], *, terminal: bool = False) -> dict[str, str]:
    """Return the metrics that any entry has, with their headings, in the order of the table.

    Args:
        entries: The rows.
        terminal: Leave out what a terminal of 80 columns has no room for.
    """
    known = {metric for entry in entries for metric in entry["metrics"]}
    found: dict[str, str] = {}
    for name in ("recall", "ndcg", "mrr", "valid_item", "rsvr", "pass", "coverage", "novelty"):
        cutoffs = sorted(int(metric.split("@")[1]) for metric in known if metric.startswith(f"{name}@"))
        cutoffs = cutoffs[-MOST_IN_TERMINALS:] if terminal else cutoffs
        here = {f"{name}@{k}": f"{HEADINGS[name]}@{k}" for k in cutoffs if k >= LENGTHS.get(name, 0)}
        here |= {metric: heading for metric, heading in (("valid_item", "Valid"), ("rsvr", "RSVR")) if metric == name}
        found |= {
            metric: heading
            for metric, heading in here.items()
            if metric in known and not (terminal and NOT_IN_TERMINALS & {metric, name})
        }
    return found


def table_rows(entries: Mapping[str, Entry]) -> list[list[str]]:
    """Return the cells of the whole table: name, a cell for each of ``columns``, users; intervals on a second line."""
    headings = columns(entries.values())
    return [
        [name, *(_cell(entry, metric) for metric in headings), f"{entry['settings']['users']:,}"]
        for name, entry in entries.items()
    ]


def results_table(results: Mapping[str, Evaluation]) -> Group:
    """Return a table for the terminal: all results with intervals, baselines first, and a warning where it is due.

    Args:
        results: Name to evaluation; ``describe`` them first, for coverage and novelty.
    """
    ordered = dict(sorted(results.items(), key=lambda pair: not pair[1].is_baseline))
    entries = {name: to_entry(evaluation) for name, evaluation in ordered.items()}
    return Group(render(entries), *(warning_text(sentence) for sentence in warnings(ordered, list(ordered)[-1])))


def warnings(results: Mapping[str, Evaluation], baseline: str) -> list[str]:
    """Return what must not be compared with ``baseline`` and why, a sentence for all that have the same reasons."""
    found: dict[str, list[str]] = {}
    for name, evaluation in results.items():
        if why := results[baseline].disagreements(evaluation):
            found.setdefault("; ".join(why), []).append(name)
    return [f"{' and '.join(names)} cannot be compared with {baseline}: {why}" for why, names in found.items()]


def merged_protocol(entries: Mapping[str, Entry]) -> dict[str, Any]:
    """Return the protocol of results: what all, or most, agree on once, and what they do not by name."""
    protocols = {name: entry["settings"].get("protocol", {}) for name, entry in entries.items()}
    merged: dict[str, Any] = {}
    for key in dict.fromkeys(key for protocol in protocols.values() for key in protocol):
        told: dict[str, list[str]] = {}
        for name, protocol in protocols.items():
            if key in protocol:
                told.setdefault(plain(protocol[key]), []).append(name)
                merged[key] = protocol[key]
        if len(told) > 1:
            half = sum(map(len, told.values())) / 2
            by_name = [f"{' and '.join(names)}: {value}" for value, names in told.items() if len(names) <= half]
            most = [value for value, names in told.items() if len(names) > half]
            merged[key] = "; ".join([*most, *by_name])
    return merged


def plain(value: Any) -> str:
    """Return a setting as text."""
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list) else str(value)


def warning_text(sentence: str) -> Text:
    """Return a warning that cannot be overlooked."""
    return Text(f"WARNING: {sentence}.", style="bold red")


def render(entries: Mapping[str, Entry], title: str = "") -> Group:
    """Return entries as a table for a terminal of 80 columns, with the meaning of its columns below.

    A cell has the value, ± half of its interval, then in a comparison the difference and its p-value.
    """
    headings = columns(entries.values(), terminal=True)
    compared = any("differences" in entry for entry in entries.values())
    table = Table(title=Text(title) if title else None, title_justify="left", box=SIMPLE_HEAD, padding=0)
    table.show_edge, table.leading = False, int(compared)
    table.add_column("", overflow="fold")
    for heading in [*headings.values(), "Users"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for name, entry in entries.items():
        users = f"{entry['settings']['users']:,}"
        folded = name.replace("/", "/\n", 1) if compared else name
        folded += MARK * bool(entry.get("not_paired"))
        table.add_row(Text(folded), *(_terminal_cell(entry, metric) for metric in headings), users)
    return Group(table, Text(LEGEND, style="dim"))


def signed(value: float) -> str:
    """Return a difference as ``+.0021``."""
    return _short(f"{value:+.4f}")


def p_text(p: float) -> str:
    """Return a p-value as ``p=.031`` or ``p<.001``."""
    return "p<.001" if p < 0.001 else _short(f"p={p:.3f}")


def _short(number: str) -> str:
    """Leave out the 0 before the point."""
    return re.sub(r"(?<!\d)0\.", ".", number)


def _metrics(entry: Entry) -> dict[str, float]:
    """Return the metrics as the table shows them."""
    if entry["settings"].get("mode") == "reasoning":
        return dict(entry["metrics"])
    return {**entry["metrics"], "valid_item": 1.0}  # all others recommend from the list of items and nothing else


def _cell(entry: Entry, metric: str) -> str:
    metrics = _metrics(entry)
    if metric not in metrics:
        return "–"
    low, high = entry["intervals_95"].get(metric, (None, None))
    return f"{metrics[metric]:.4f}" + ("" if low is None else f"\n{low:.4f} to {high:.4f}")


def _terminal_cell(entry: Entry, metric: str) -> Text:
    metrics = _metrics(entry)
    if metric not in metrics:
        return Text("–")
    best = metric in entry.get("best", ())
    value = metrics[metric]
    short = f"{value:.4f}"[1:] if 0 <= value < 0.99995 else f"{value:.4g}"
    cell = Text(short + "*" * best, style="bold green" if best else "")
    if metric in entry["intervals_95"]:
        low, high = entry["intervals_95"][metric]
        cell.append(_short(f"\n±{(high - low) / 2:.4f}"), style="not bold default")
    if metric in entry.get("differences", ()):
        difference = entry["differences"][metric]
        cell.append(f"\n{signed(difference['difference'])}\n{p_text(difference['p'])}", style="not bold default")
    return cell
