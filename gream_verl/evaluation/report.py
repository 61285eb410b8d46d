"""The result of a run as one page that loads nothing from elsewhere, and as ``metrics.json``."""

from __future__ import annotations

import io
import json
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.resources import files
from itertools import chain
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console, Group, RenderableType

from gream_verl.core.files import read_json, write_json, write_text
from gream_verl.core.run_folder import RunFolder
from gream_verl.core.semantic_ids import ItemIndex, find_sids
from gream_verl.core.split import read_interactions
from gream_verl.evaluation.compare import paired_differences, protocol_table, read_results, results_table, warning_texts
from gream_verl.evaluation.results import MODEL_MODES, Evaluation

_SID = re.compile(r"<\|a_[1-9][0-9]*\|>(?:<\|[b-z]_[1-9][0-9]*\|>)*")
SRPO_CURVES = (  # title, unit, and pattern of verl's name
    ("SRPO: mean reward of rollouts", "RSVR", r"critic/(rewards|score)/mean"),
    ("SRPO: mean reward on validation", "RSVR", r"val-(core|aux)/.*/reward/mean@\d+"),
    ("SRPO: response length", "tokens", r"response_length/mean"),
    ("SRPO: KL to SFT", "KL", r"actor/kl_loss"),
)


def write_report(run: RunFolder, *, seed: int = 0) -> Group:
    """Write ``report.html`` and ``metrics.json`` of a run from its results and logs; return the table of results."""
    saved = read_results([str(run.evaluation)])
    results = {name: one for name, one in saved.items() if one.settings.get("protocol", {}).get("split") != "val"}
    results = results or saved
    differences: dict[str, Any] = {}
    for mode in MODEL_MODES:
        pair = {name: results[name] for name in (f"sft-{mode}", f"srpo-{mode}") if name in results}
        differences |= paired_differences(pair, next(iter(pair.values())), seed=seed) if pair else {}
    table = Group(results_table(results, differences, "SFT"), *warning_texts(results, list(results)[-1]))
    index = ItemIndex.load(run.data.index)
    srpo_log = read_srpo_log(sorted(run.srpo.glob("logs/*/gream/srpo.jsonl")))
    curves = [_plot("SFT: loss", "step", "nats per token", _series(read_sft_log(run.sft), ".*loss"))]
    curves += [_plot(title, "step", unit, _series(srpo_log, pattern)) for title, unit, pattern in SRPO_CURVES]
    template = files("gream_verl.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(template).render(
        title=f"GREAM on {run.data.name}",
        results=_as_html(table),
        protocol=_as_html(protocol_table(results)),
        curves=list(filter(None, curves)),
        index=_index_figures(index),
        examples=_examples(run, results, index, seed),
    )
    parts = ("metrics", "intervals", "settings")
    numbers = {name: {part: getattr(one, part) for part in parts} for name, one in results.items()}
    write_json(run.root / "metrics.json", {"results": numbers, "differences": differences}, indent=2)
    write_text(run.report, page)
    return table


def read_sft_log(folder: Path) -> list[dict[str, Any]]:
    """Return the logged steps of LLaMA-Factory's ``trainer_state.json``, with ``step`` and losses; none without it."""
    state = folder / "trainer_state.json"
    log = read_json(state)["log_history"] if state.is_file() else []
    return [{key: value for key, value in row.items() if key != "train_loss"} for row in log]


def read_srpo_log(logs: Sequence[Path]) -> list[dict[str, Any]]:
    """Return the metrics of every step from verl's logger ``file``; a later file wins where steps repeat."""
    steps = {}
    for line in (line for log in logs for line in log.read_text(encoding="utf-8").splitlines()):
        with suppress(json.JSONDecodeError):  # a line that a kill cut short
            row = json.loads(line)
            steps[row["step"]] = {"step": row["step"], **row["data"]}
    return [steps[step] for step in sorted(steps)]


def _series(log: Sequence[Mapping[str, Any]], pattern: str) -> dict[str, list[tuple[float, float]]]:
    """Return the points of every metric whose name matches."""
    names = sorted({name for row in log for name in row if re.fullmatch(pattern, name)})
    return {name: [(row["step"], float(row[name])) for row in log if name in row] for name in names}


def _plot(title: str, x: str, y: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> Markup | None:
    """Return a picture of lines as inline SVG, the same bytes for the same data; None without data."""
    if not series:
        return None
    figure = Figure(figsize=(5.6, 3.0), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.4, marker="." if len(points) < 40 else "")
    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, fontsize=10, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize=8)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "gream", "svg.fonttype": "none", "text.parse_math": False}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    return Markup('<div role="img" aria-label="{}">').format(title) + Markup(svg[svg.index("<svg") :] + "</div>")


def _as_html(table: RenderableType) -> Markup:
    """Return the output of the terminal, as HTML."""
    console = Console(width=160, record=True, file=io.StringIO(), force_terminal=True)
    console.print(table)
    return Markup(console.export_html(inline_styles=True, code_format="<pre>{code}</pre>"))


def _index_figures(index: ItemIndex) -> dict[str, Any]:
    """Return a sentence and a picture of the items per code."""
    counts = Counter(chain.from_iterable(index.sids.values()))
    series = {}
    for level in sorted({token[2] for token in counts}):  # the letter of <|a_1|>
        sizes = sorted((count for token, count in counts.items() if token[2] == level), reverse=True)
        name = f"level {level}: {len(sizes):,} codes, {sizes[-1]:,} to {sizes[0]:,} items each"
        series[name] = [(float(rank), float(size)) for rank, size in enumerate(sizes, start=1)]
    collisions = sum(len(sid) > index.base_levels for sid in index.sids.values())
    text = f"{len(index):,} items, {index.base_levels} levels, {collisions:,} items with a collision token."
    return {"text": text, "picture": _plot("Items per code", "code, most frequent first", "items", series)}


def _examples(run: RunFolder, results: Mapping[str, Evaluation], index: ItemIndex, seed: int) -> list[dict[str, Any]]:
    """Return five users of the last result with chains, drawn at random."""
    shown = [one for one in results.values() if all({"chains", "recommended"} <= row.keys() for row in one.rows)]
    if not shown:
        return []
    titles = {item: item for item in index.sids} | run.data.titles()
    sequences = read_interactions(run.data.inter)

    def history(row: Mapping[str, Any]) -> list[str]:
        past = sequences.get(row["user"], [])
        is_known = past[row["history_length"] :][:1] == [row["target"]]  # else users have other names in the prompts
        return [titles[item] for item in past[: row["history_length"]][-10:]] if is_known else []

    def readable(match: re.Match[str]) -> str:
        item = index.items.get(find_sids(match[0])[0])
        return match[0] if item is None else f"[{titles[item]}] "

    rows = shown[-1].rows
    chosen = sorted(random.Random(seed).sample(range(len(rows)), min(5, len(rows))))
    return [
        {
            "user": row["user"],
            "history": history(row),
            "chain": _SID.sub(readable, row["chains"][0]["text"]),
            "target": titles[row["target"]],
            "recommended": [(titles[item], item == row["target"]) for item in row["recommended"][:10]],
        }
        for row in (rows[number] for number in chosen)
    ]
