"""Writes the SFT mix: alignment and reasoning rows in the order of the curriculum, for LLaMA-Factory."""

from __future__ import annotations

import difflib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data_processing.layout import DataFolder
from data_processing.sft.curriculum import curriculum_order
from data_processing.sft.tasks import REASONING, TASKS, Corpus, Row, Specs
from data_processing.teacher.leaks import find_leak
from data_processing.teacher.rules import short_title
from gream_verl.files import InputError, atomic_path, read_json, write_json

CHUNK = 8192
HISTORY = 2
"""Column of a spec that holds the length of its history."""
SCHEMA = pa.schema(
    [
        ("conversations", pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))),
        ("system", pa.string()),
        ("task", pa.string()),
    ]
)


@dataclass
class LengthLimit:
    """Shortens histories so that a trainer cuts no row: what it cuts is the end, which holds the answer.

    Attributes:
        count_tokens: Returns the tokens of a whole row, chat template included.
        longest: The trainer's limit, ``cutoff_len``.
        lengths: Tokens of every row written.
        shortened: Rows that lost the oldest part of their history.
        left_out: Rows that are too long even so.
    """

    count_tokens: Callable[[Row], int]
    longest: int
    lengths: list[int] = field(default_factory=list)
    shortened: int = 0
    left_out: int = 0

    def fit(self, render: Callable[[list[int]], Row], spec: list[int]) -> Row | None:
        """Return the row of ``spec`` with the longest history that fits, None when none does."""
        row = render(spec)
        tokens, asked = self.count_tokens(row), spec[HISTORY]
        while tokens > self.longest and spec[HISTORY] > 1:
            spec[HISTORY] -= 1
            row = render(spec)
            tokens = self.count_tokens(row)
        if tokens > self.longest:
            self.left_out += 1
            return None
        self.shortened += spec[HISTORY] < asked
        self.lengths.append(tokens)
        return row

    def report(self) -> dict[str, float]:
        """Return the spread of lengths, and how many rows were shortened or left out."""
        quantiles = np.quantile(self.lengths, [0.5, 0.95, 1]) if self.lengths else np.zeros(3)
        names = ("median", "95%", "longest")
        return {
            **dict(zip(names, quantiles.tolist(), strict=True)),
            "shortened": self.shortened,
            "left out": self.left_out,
        }


def write_mix(
    folder: DataFolder,
    *,
    rows: Mapping[str, int],
    seed: int,
    history: int = 20,
    block: int = 1,
    limit: LengthLimit | None = None,
) -> dict[str, Any]:
    """Write ``<D>-mix.parquet`` and its entry in ``dataset_info.json``.

    Args:
        folder: A prepared data set with an index.
        rows: How many rows of each task, by its name in :data:`data_processing.sft.tasks.TASKS`; more than exist are
            clamped.
        seed: Same seed, same bytes.
        history: Longest history of a row, in items.
        block: Rows of one task that stay together, the size of a batch.
        limit: Shortens histories to a number of tokens; none when None.

    Returns:
        ``rows`` planned by task; ``leaks``: chains dropped because they named the target, by kind, and their rate; with
        a limit also ``tokens``, its report.

    Raises:
        InputError: When a task is unknown, nothing is to be written, or a file of the data set cannot be used.
    """
    for task in rows:
        if task not in TASKS:
            near = difflib.get_close_matches(task, TASKS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(TASKS)}"
            raise InputError(f"SFT task {task!r}: unknown; {hint}")
    items = folder.read_items()
    corpus = Corpus(folder.read_inter(items), items, folder.read_index(items), history)
    plans = {task: draw(corpus, task, rows[task], seed) for task in TASKS if rows.get(task, 0) > 0}
    leaks: Counter[str] = Counter()
    if REASONING in plans:
        plans[REASONING], leaks = _without_leaks(corpus, plans[REASONING], rows[REASONING])
    planned = {task: len(specs) for task, specs in plans.items()}
    if not sum(planned.values()):
        raise InputError(f"{folder.mix}: no rows to write; ask for more rows or bring longer histories")
    _write(folder, _ordered(corpus, plans, seed, block, limit))
    _register(folder)
    checked = planned.get(REASONING, 0) + sum(leaks.values())
    report = {"rows": planned, "leaks": {**leaks, "rate": sum(leaks.values()) / max(checked, 1)}}
    return report | ({"tokens": limit.report()} if limit else {})


def draw(corpus: Corpus, task: str, count: int, seed: int) -> Specs:
    """Draw the specs of one task; what other tasks draw does not change them.

    For reasoning all that exist are drawn, so that chains that leak can be replaced.
    """
    generator = np.random.default_rng([seed, crc32(task.encode())])
    return TASKS[task].draw(corpus, sys.maxsize if task == REASONING else count, generator)


def _without_leaks(corpus: Corpus, specs: Specs, count: int) -> tuple[Specs, Counter[str]]:
    """Keep the first ``count`` specs whose chains do not name their target; count the leaks among those looked at."""
    kept: list[int] = []
    leaks: Counter[str] = Counter()
    for number, spec in enumerate(specs.tolist()):
        if len(kept) == count:
            break
        history, target = corpus.window(spec)
        leak = find_leak(
            corpus.teacher.chain(history, target),
            title=corpus.items[target].title,
            sid=corpus.index.sids[target],
            history_titles=[short_title(corpus.items[item].title) for item in history],
            history_sids={corpus.index.sids[item] for item in history},
        )
        if leak:
            leaks[leak] += 1
        else:
            kept.append(number)
    return specs[kept], leaks


def _ordered(
    corpus: Corpus, plans: Mapping[str, Specs], seed: int, block: int, limit: LengthLimit | None
) -> Iterator[Row]:
    """Yield all rows in the order of the curriculum; a row's text lives only while it is written."""
    tasks = sorted(plans, key=lambda task: task == REASONING)
    sizes = {task: len(plans[task]) for task in tasks}
    specs = np.concatenate([plans[task] for task in tasks])
    kinds = np.repeat(np.arange(len(tasks)), list(sizes.values()))
    reasoning = sizes.pop(REASONING, 0)
    for row in curriculum_order(list(sizes.values()), reasoning, seed=seed, block=block):
        render = partial(TASKS[tasks[kinds[row]]].render, corpus)
        fitted = limit.fit(render, specs[row].tolist()) if limit else render(specs[row].tolist())
        if fitted:
            yield fitted


def _write(folder: DataFolder, rows: Iterator[Row]) -> None:
    with atomic_path(folder.mix) as temporary, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        while chunk := [_record(row) for row in islice(rows, CHUNK)]:
            writer.write_table(pa.Table.from_pylist(chunk, SCHEMA))


def _record(row: Row) -> dict[str, Any]:
    turns = [{"from": "human", "value": row.user}, {"from": "gpt", "value": row.assistant}]
    return {"conversations": turns, "system": row.system, "task": row.task}


def _register(folder: DataFolder) -> None:
    """Add the mix to ``dataset_info.json``, where LLaMA-Factory looks names up; other entries stay."""
    entries = read_json(folder.dataset_info) if folder.dataset_info.is_file() else {}
    entries[folder.mix.stem] = {
        "file_name": folder.mix.name,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "system": "system"},
    }
    write_json(folder.dataset_info, dict(sorted(entries.items())), indent=2)
