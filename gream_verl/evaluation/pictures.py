"""Pictures of results, as SVG that is the same for the same numbers."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

BLUE, GREY = "#2b6cb0", "#718096"


def new_axes(title: str, x: str, y: str) -> tuple[Figure, Any]:
    """Return a figure with one plain pair of axes."""
    figure = Figure(figsize=(5.6, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, dress(axes, title, x, y)


def dress(axes: Any, title: str, x: str = "", y: str = "") -> Any:
    """Give axes a title, labels, and no frame."""
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def draw_intervals(axes: Any, values: Mapping[str, tuple[float, Sequence[float]] | None]) -> None:
    """Draw one line for each name, from the top: its value, and the ends of its interval; None leaves it empty."""
    for place, drawn in enumerate(values.values()):
        if drawn is not None:
            value, ends = drawn
            axes.plot(ends, [place, place], color=color(place), linewidth=2)
            axes.plot(value, place, "o", color=color(place))
    axes.set_yticks(range(len(values)), list(values), fontsize=8)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlim(left=0)


def draw_buckets(
    axes: Any, buckets: Mapping[str, Sequence[Mapping[str, Any]]], order: Sequence[str], metric: str
) -> None:
    """Draw a metric of several recommenders by bucket.

    Args:
        axes: Where.
        buckets: Name to buckets of ``break_down``. A colour is that of the name's place; no bucket, no point.
        order: All labels, in the order of the axis.
        metric: What to draw, with its interval.
    """
    held = [label for label in order if any(bucket["bucket"] == label for some in buckets.values() for bucket in some)]
    for place, (name, some) in enumerate(buckets.items()):
        some = [bucket for bucket in some if metric in bucket]
        shift = (place - (len(buckets) - 1) / 2) * 0.7 / len(buckets)
        where = [held.index(bucket["bucket"]) + shift for bucket in some]
        ends = [bucket["intervals"][metric] for bucket in some]
        axes.vlines(where, [low for low, _ in ends], [high for _, high in ends], color=color(place), alpha=0.6)
        axes.plot(where, [bucket[metric] for bucket in some], "o", markersize=4, color=color(place), label=_label(name))
    axes.set_xticks(range(len(held)), held, fontsize=8)
    axes.set_ylim(bottom=0)


def color(place: int) -> Any:
    """Return the colour of the recommender at ``place``."""
    first, lighter, more = (matplotlib.colormaps[name].colors for name in ("tab10", "tab20", "tab20b"))  # type: ignore[attr-defined]
    palette = [*first, *lighter[1::2], *more]
    return palette[place % len(palette)]


def _label(name: str) -> str:
    """Return a name as matplotlib's legends show it: they leave out what begins with an underscore."""
    return f" {name}" if name.startswith("_") else name


def to_svg(figure: Figure) -> str:
    """Return a figure as SVG, the same bytes for the same data, ready for a page; $ is text, not mathematics."""
    buffer = io.StringIO()
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    with matplotlib.rc_context({"svg.hashsalt": "gream", "svg.fonttype": "none", "text.parse_math": False}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]
