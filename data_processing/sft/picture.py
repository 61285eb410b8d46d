"""The picture of a mix: how reasoning rows are ramped in, and how long rows are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from data_processing.sft.curriculum import expected_shares
from data_processing.sft.texts import Ints
from gream_verl.core.files import atomic_path

BINS = 60


def draw_mix(path: Path, reasoning: npt.NDArray[np.bool_], lengths: tuple[Ints, int] | None = None) -> None:
    """Draw the share of reasoning rows along the file and, when they are counted, the lengths of rows.

    Args:
        path: A ``.png`` file; the same rows give the same bytes.
        reasoning: Which rows are reasoning rows, in the order of the file.
        lengths: Tokens of every row, and the limit on them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.8 if lengths else 6.4, 4), layout="constrained")
    axes = figure.subplots(1, 2 if lengths else 1, squeeze=False)[0]
    bins = np.array_split(reasoning, min(BINS, len(reasoning)))
    middles = np.cumsum([len(part) for part in bins]) - [len(part) / 2 for part in bins]
    axes[0].bar(middles, [part.mean() for part in bins], width=len(bins[0]), color="tab:blue", label="as written")
    places, shares = expected_shares(int((~reasoning).sum()), int(reasoning.sum()))
    axes[0].plot(places, shares, color="tab:orange", label="the ramp")
    axes[0].set(xlabel="row of the file", ylabel="share of reasoning rows", ylim=(0, 1), title="Curriculum")
    axes[0].legend(loc="upper left")
    if lengths:
        tokens, longest = lengths
        axes[1].hist(tokens, bins=BINS, color="tab:blue")
        axes[1].axvline(longest, color="tab:orange", label=f"limit {longest}")
        axes[1].set(xlabel="tokens of a row", ylabel="rows", yscale="log", title="Lengths")
        axes[1].legend(loc="upper right")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=100, format="png", metadata={"Software": None})
