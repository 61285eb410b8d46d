"""The result of a run as one page that needs nothing but itself, as numbers, and as a table in the terminal."""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from rich.console import Group
from rich.text import Text

from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, write_json, write_text
from gream_verl.core.semantic_ids import ItemIndex, parse_token
from gream_verl.evaluation.breakdown import BOUNDS, labels
from gream_verl.evaluation.compare import differences
from gream_verl.evaluation.pictures import BLUE, draw_buckets, new_axes, to_svg
from gream_verl.evaluation.prompts import Prompt
from gream_verl.evaluation.results import Evaluation
from gream_verl.evaluation.tables import (
    columns,
    merged_protocol,
    p_text,
    plain,
    render,
    table_rows,
    to_entry,
    warning_text,
    warnings,
)

_SID = re.compile(r"<\|a_[1-9][0-9]*\|>(?:<\|[b-z]_[1-9][0-9]*\|>)*")


@dataclass(frozen=True)
class RunRecord:
    """Everything a report tells of a run.

    Attributes:
        title: Headline.
        results: Name to evaluation, in the order of the table.
        comparisons: Pairs of names in ``results``; the difference of the first from the second is tested.
        index: The item index.
        titles: Item to title.
        prompts: Reasoning prompts of the users, for the examples.
        examples: Name in ``results`` of the reasoning evaluation whose users are shown.
        sft_log: Rows of ``read_sft_log``.
        srpo_log: Rows of ``read_srpo_log``.
        tasks: Task of every SFT row, in the order of training; empty when not known.
        details: Heading to names and values: settings, versions, seeds, timings, memory.
    """

    title: str
    results: Mapping[str, Evaluation]
    comparisons: Sequence[tuple[str, str]]
    index: ItemIndex
    titles: Mapping[str, str]
    prompts: Sequence[Prompt]
    examples: str | None = None
    sft_log: Sequence[Mapping[str, float]] = ()
    srpo_log: Sequence[Mapping[str, float]] = ()
    tasks: Sequence[str] = ()
    details: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def write_report(folder: str | os.PathLike[str], record: RunRecord, *, users: int = 5, seed: int = 0) -> None:
    """Write ``report.html`` and ``metrics.json`` into ``folder``.

    Args:
        folder: Where to write.
        record: What to tell.
        users: How many users to show.
        seed: Seed of the choice of users and of the bootstrap.

    Raises:
        InputError: When a file cannot be written.
    """
    summary = summarise(record, seed=seed)
    template = files("gream_verl.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(
        title=record.title,
        header=["", *columns(summary["results"].values()).values(), "Users"],
        table=table_rows(summary["results"]),
        comparisons=[_sentence(comparison) for comparison in summary["comparisons"]],
        warnings=summary["warnings"],
        protocol={key.replace("_", " "): plain(value) for key, value in merged_protocol(summary["results"]).items()},
        breakdown=_breakdown(summary["results"]),
        curves=_curves(record),
        balance=_balance(record.index),
        curriculum=_curriculum(record.tasks) if record.tasks else None,
        examples=_examples(record, users, seed),
        examples_of=record.examples,
        details={
            heading: {name: plain(value) for name, value in values.items()}
            for heading, values in record.details.items()
        },
    )
    write_json(Path(folder) / "metrics.json", summary, indent=2)
    write_text(Path(folder) / "report.html", page)


def summarise(record: RunRecord, *, seed: int = 0) -> dict[str, Any]:
    """Return all numbers of a run as JSON: ``title``, ``results``, ``comparisons``, ``warnings``, ``details``."""
    entries = {name: to_entry(evaluation, seed=seed) for name, evaluation in record.results.items()}
    for name, evaluation in record.results.items():
        entries[name]["breakdown"] = {heading: list(buckets) for heading, buckets in evaluation.breakdown.items()}
    return {
        "title": record.title,
        "results": entries,
        "comparisons": [_compare(record.results, left, right, seed) for left, right in record.comparisons],
        "warnings": warnings(record.results, list(record.results)[-1]),
        "details": {heading: dict(values) for heading, values in record.details.items()},
    }


def render_table(summary: Mapping[str, Any]) -> Group:
    """Return the result table for the terminal, with the comparisons below it.

    Args:
        summary: What ``summarise`` returned, the content of ``metrics.json``.
    """
    return Group(
        render(summary["results"], title=summary["title"]),
        *(Text(_sentence(comparison)) for comparison in summary["comparisons"]),
        *map(warning_text, summary["warnings"]),
    )


def read_sft_log(folder: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Return ``step`` and ``loss`` of every logged step from the ``trainer_state.json`` of LLaMA-Factory's output."""
    state = read_json(Path(folder) / "trainer_state.json", "finish SFT first")
    return [{"step": row["step"], "loss": row["loss"]} for row in state["log_history"] if "loss" in row]


def read_srpo_log(logs: Iterable[str | os.PathLike[str]]) -> list[dict[str, float]]:
    """Return the metrics of every step from the JSON lines of verl's logger ``file``.

    Args:
        logs: The files, oldest first: each start of verl writes one, and a later one wins where steps repeat.

    Raises:
        InputError: When a line is not what verl writes; a last line cut short by a kill is left out.
    """
    steps: dict[int, dict[str, float]] = {}
    for log in logs:
        for number, line in enumerate(Path(log).read_text(encoding="utf-8").splitlines(keepends=True), start=1):
            try:
                row = json.loads(line)
                steps[row["step"]] = {"step": row["step"], **row["data"]}
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                if not line.endswith("\n"):
                    continue
                raise InputError(f"{log}: line {number}: not a line of verl's file logger; delete the file") from error
    return [steps[step] for step in sorted(steps)]


def _compare(results: Mapping[str, Evaluation], left: str, right: str, seed: int) -> dict[str, Any]:
    """Return the difference of two evaluations of the same users."""
    if why := results[right].disagreements(results[left]):
        raise InputError(f"{left} cannot be compared with {right}: {'; '.join(why)}; evaluate both in one way")
    return {"left": left, "right": right, "differences": differences(results[left], results[right], seed=seed)}


def _sentence(comparison: Mapping[str, Any]) -> str:
    parts = [
        f"{metric} {d['difference']:+.4f} (95% {d['low']:+.4f} to {d['high']:+.4f}, {p_text(d['p'])})"
        for metric, d in comparison["differences"].items()
    ]
    return f"{comparison['left']} − {comparison['right']}: {', '.join(parts)}"


def _breakdown(entries: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each heading, a picture of recall@10 by bucket and the cells of its table."""
    found = []
    for heading in BOUNDS:
        buckets = {
            name: {bucket["bucket"]: bucket for bucket in entry["breakdown"][heading]}
            for name, entry in entries.items()
            if heading in entry["breakdown"]
        }
        held = [label for label in labels(heading) if any(label in some for some in buckets.values())]
        if not held:
            continue
        figure, axes = new_axes(f"Recall@10 by {heading}", heading, "recall@10")
        draw_buckets(axes, {name: list(some.values()) for name, some in buckets.items()}, held, "recall@10")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
        rows = [
            [
                name,
                *(f"{some[label]['recall@10']:.4f}" if "recall@10" in some.get(label, ()) else "–" for label in held),
            ]
            for name, some in buckets.items()
        ]
        users = [f"{max(some[label]['users'] for some in buckets.values() if label in some):,}" for label in held]
        found.append(
            {
                "heading": heading,
                "picture": _svg(figure, f"Recall@10 by {heading}"),
                "header": ["", *held],
                "rows": [*rows, ["Users", *users]],
            }
        )
    return found


def _examples(record: RunRecord, users: int, seed: int) -> list[dict[str, Any]]:
    """Return what to show of a few users, drawn at random so that no one picked the good ones."""
    if record.examples is None:
        return []
    rows = record.results[record.examples].rows
    history = {prompt.user: prompt.history for prompt in record.prompts}
    chosen = random.Random(seed).sample(range(len(rows)), min(users, len(rows)))
    return [
        {
            "user": row["user"],
            "history": [_title(record, item) for item in history.get(row["user"], ())[-10:]],
            "chain": _readable(row["chains"][0]["text"], record),
            "target": _title(record, row["target"]),
            "recommended": [
                {"title": _title(record, item), "hit": item == row["target"]} for item in row["recommended"][:10]
            ],
        }
        for row in (rows[place] for place in sorted(chosen))
    ]


def _title(record: RunRecord, item: str) -> str:
    return record.titles.get(item) or f"item {item}"


def _readable(text: str, record: RunRecord) -> str:
    """Return ``text`` with the SIDs of real items replaced by their titles in brackets."""

    def name(match: re.Match[str]) -> str:
        item = record.index.items.get(tuple(re.findall(r"<\|[^|]*\|>", match[0])))
        return match[0] if item is None else f"[{_title(record, item)}] "

    return _SID.sub(name, text)


def _curves(record: RunRecord) -> list[Markup]:
    """Return the pictures of SFT and SRPO that there are data for."""
    pictures = []
    wanted = [
        ("SFT: loss", record.sft_log, r"loss", "loss"),
        ("SRPO: mean reward of rollouts", record.srpo_log, r"critic/(rewards|score)/mean", "RSVR"),
        ("SRPO: mean reward on validation", record.srpo_log, r"val-(core|aux)/.*/reward/mean@\d+", "RSVR"),
        ("SRPO: response length", record.srpo_log, r"response_length/mean", "tokens"),
        ("SRPO: KL to SFT", record.srpo_log, r"actor/kl_loss", "KL"),
    ]
    for title, log, pattern, label in wanted:
        key = next((key for row in log for key in row if re.fullmatch(pattern, key)), None)
        if key is None:
            continue
        points = [(row["step"], row[key]) for row in log if key in row]
        figure, axes = new_axes(title, "step", label)
        axes.plot(*zip(*points, strict=True), color=BLUE, linewidth=1.4, marker="." if len(points) < 40 else "")
        pictures.append(_svg(figure, title))
    return pictures


def _balance(index: ItemIndex) -> Markup:
    """Return a picture of how many items have each code, level by level, most frequent code first."""
    counts: dict[int, Counter[int]] = {}
    for sid in index.sids.values():
        for level, code in filter(None, map(parse_token, sid)):
            counts.setdefault(level, Counter())[code] += 1
    figure, axes = new_axes("Items a code", "code, most frequent first", "items")
    for level, codes in sorted(counts.items()):
        name = chr(ord("a") + level) + (" (collisions)" if level == index.base_levels else "")
        axes.step(range(1, len(codes) + 1), sorted(codes.values(), reverse=True), where="mid", label=f"level {name}")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    return _svg(figure, "How many items have each code, by level")


def _curriculum(tasks: Sequence[str], parts: int = 60) -> Markup:
    """Return a picture of the share of each task along the SFT data."""
    names = sorted(set(tasks))
    parts = min(parts, len(tasks))
    bounds = [len(tasks) * part // parts for part in range(parts + 1)]
    windows = [Counter(tasks[start:end]) for start, end in pairwise(bounds)]
    shares = [[window[name] / window.total() for window in windows] for name in names]
    figure, axes = new_axes("Curriculum: share of tasks along SFT", "row", "share")
    axes.stackplot(bounds[:-1], shares, labels=names, colors=matplotlib.colormaps["tab10"].colors)  # type: ignore[attr-defined]
    axes.set_xlim(0, bounds[-2])
    axes.set_ylim(0, 1)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    return _svg(figure, "Share of tasks along the SFT data")


def _svg(figure: Figure, description: str) -> Markup:
    """Return a figure as inline SVG."""
    return Markup('<div role="img" aria-label="{}">').format(description) + Markup(to_svg(figure) + "</div>")
