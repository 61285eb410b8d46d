"""The choice among several chains of thought for a row, by the log-probability that they give the target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
from rich.progress import track

from data_processing.sft.lengths import LengthLimit
from data_processing.sft.tasks import REASONING, TARGET, Corpus, SftRow, Specs, Window

ROWS_AT_ONCE = 256
NEAR = 10
"""Most ranks of popularity between a target and the wrong item next to it."""


@dataclass(frozen=True)
class BestOf:
    """A judge, which returns the log-probability of the answer of each row after its chain, float64 ``[rows]`` in nats,
    and the number of chains among which it chooses.
    """

    judge: Callable[[Sequence[SftRow]], npt.NDArray[np.float64]]
    candidates: int

    def choose(self, corpus: Corpus, specs: Specs, limit: LengthLimit | None, seed: int) -> dict[str, float]:
        """Put the number of the best chain of each row, ``[rows, 4]``, into ``corpus.choices``.

        The first chain of a row is a candidate. Others are where they do not name the target, say nothing untrue and
        keep to the limit. A chain that tells the answer favours it over a wrong item, so the gain of a random one of
        nearly the target's popularity is measured, too.

        Returns:
            Rows with another chain than the first, and the mean gains over the first chain with 95% intervals.
        """
        counts = Counter(item for sequence in corpus.sequences for item in sequence)
        popular = sorted(corpus.keys, key=lambda item: -counts[item])
        ranks, generator = {item: rank for rank, item in enumerate(popular)}, np.random.default_rng(seed)
        gains = []
        for begin in track(range(0, len(specs), ROWS_AT_ONCE), "Chains judged"):
            part = specs[begin : begin + ROWS_AT_ONCE]
            rows, numbers, wrong = list[SftRow](), list[int](), list[str]()
            for spec in part.tolist():
                window, row = Window(corpus, *spec), corpus.row(REASONING, *spec)
                for number, chain in enumerate(islice(window.chains(), self.candidates)):
                    candidate = row._replace(assistant=chain)
                    fits = limit is None or limit.count_tokens([candidate])[0] <= limit.longest
                    if not number or (fits and window.is_true(chain) and not window.leaks(chain)):
                        rows.append(candidate)
                        numbers.append(number)
                rank = ranks[window.target]
                near = {*popular[max(rank - NEAR, 0) : rank + NEAR + 1]} - {window.target, *window.history}
                wrong.append(corpus.sids[generator.choice(sorted(near or popular))])
            # The rows of a spec are neighbours, and its first chain comes first.
            scores, first = self.judge(rows), np.flatnonzero(np.array(numbers) == 0)
            best = first + [int(own.argmax()) for own in np.split(scores, first[1:])]
            corpus.choices.update(zip(part[:, TARGET].tolist(), np.array(numbers)[best].tolist(), strict=True))
            missed = [_answer(rows[n], sid) for chosen in (first, best) for n, sid in zip(chosen, wrong, strict=True)]
            before, after = np.split(self.judge(missed), 2)
            gains.append([scores[best] - scores[first], after - before])
        gained = np.concatenate(gains, axis=1)
        report: dict[str, float] = {"another chain": sum(number > 0 for number in corpus.choices.values())}
        for name, nats in zip(("target", "wrong item"), gained, strict=True):
            report[f"nats of the {name}"] = float(nats.mean())
            report[f"nats of the {name} +-"] = float(1.96 * nats.std() / len(nats) ** 0.5)
        return report


def _answer(row: SftRow, sid: str) -> SftRow:
    """Return a row with another answer after its chain."""
    return row._replace(assistant=f"{row.assistant.rpartition('<answer>')[0]}<answer>{sid}</answer>")
