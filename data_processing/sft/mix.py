"""Writes the SFT mix: alignment and reasoning rows in the order of the curriculum, for LLaMA-Factory."""

from __future__ import annotations

import difflib
import sys
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import track

from data_processing.layout import DataFolder
from data_processing.sft.chain_leaks import ChainLeaks
from data_processing.sft.corpus import Corpus
from data_processing.sft.curriculum import curriculum_order
from data_processing.sft.fields import LENGTH, Specs
from data_processing.sft.lengths import LengthLimit, length_table
from data_processing.sft.picture import draw_mix
from data_processing.sft.tasks import REASONING, TASKS, Renderer
from data_processing.sft.texts import Ints, string_array
from gream_verl.files import InputError, atomic_path, read_json, write_json

CHUNK = 1 << 15
"""Rows that are put together at once; a row group of the file."""
SCHEMA = pa.schema(
    [
        ("conversations", pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))),
        ("system", pa.string()),
        ("task", pa.string()),
    ]
)
WRITING = {
    "compression": "zstd",
    "use_dictionary": ["conversations.list.element.from", "system", "task"],
    "write_statistics": ["task"],
}
"""Only columns of few different texts gain from a dictionary."""


def write_mix(
    folder: DataFolder,
    *,
    rows: Mapping[str, int | float],
    seed: int,
    total: int | None = None,
    history: int = 20,
    block: int = 1,
    limit: LengthLimit | None = None,
    dry_run: bool = False,
    output: Path | None = None,
) -> dict[str, Any]:
    """Write ``<D>-mix.parquet``, its report and picture ``<D>-mix.json`` and ``.png``, its entry in dataset_info.json.

    What a language-model teacher wrote of users and targets is used when the folder holds it.

    Args:
        folder: A prepared data set with an index.
        rows: How many rows of each task, by its name in :data:`data_processing.sft.tasks.TASKS`: an int is a count, a
            float from 0 to 1 a share of all that exist. With ``total``, any weights.
        seed: Same seed, same bytes.
        total: Rows of the whole mix, which the tasks share by weight; None when ``rows`` says it.
        history: Longest history of a row, in items.
        block: Rows of one task that stay together, the size of a batch.
        limit: Shortens histories to a number of tokens; none when None.
        dry_run: Plan only, and write nothing.
        output: Another file than ``<D>-mix.parquet``, in the same folder.

    Returns:
        ``tasks``: for each task the rows ``asked`` for, those that ``exist`` and those ``made``, at most that many;
        with a limit also the spread of lengths in tokens, and the rows ``shortened`` and ``left out``. ``leaks``:
        chains dropped because they named the target, by kind, and their rate.

    Raises:
        InputError: When a task is unknown, nothing is to be written, or a file of the data set cannot be used.
    """
    _check_names(rows)
    path = output or folder.mix
    corpus = _read_corpus(folder, history)
    exist = {task: TASKS[task].exist(corpus) for task in rows}
    asked = asked_rows(rows, exist, total)
    tasks = [task for task in TASKS if asked.get(task)]  # reasoning is the last
    plan = plan_mix(corpus, {task: asked[task] for task in tasks}, seed=seed, block=block)
    if not len(plan.order):
        raise InputError(f"{path}: no rows to write; ask for more rows or bring longer histories")
    made, leaks = dict(zip(tasks, plan.sizes, strict=True)), plan.leaks.total()
    report: dict[str, Any] = {
        "tasks": {task: {"asked": asked[task], "exist": exist[task], "made": made[task]} for task in tasks},
        "leaks": {**plan.leaks, "rate": leaks / max(made.get(REASONING, 0) + leaks, 1)},
    }
    if dry_run:
        return report
    written = write_rows(path, corpus, plan, limit)
    _register(folder, path)
    fit = written.tokens <= (limit.longest if limit else 0)
    if limit:
        for kind, task in enumerate(tasks):
            of_task = written.kinds == kind
            table = length_table(written.tokens[of_task], written.shortened[of_task], limit.longest)
            report["tasks"][task] |= {"made": int(fit[of_task].sum()), **table}
    write_json(path.with_suffix(".json"), report, indent=2)
    reasoning = np.array([task == REASONING for task in tasks])[written.kinds[fit]]
    lengths = (written.tokens[fit], limit.longest) if limit else None
    draw_mix(path.with_suffix(".png"), reasoning, lengths)
    return report


def asked_rows(rows: Mapping[str, int | float], exist: Mapping[str, int], total: int | None = None) -> dict[str, int]:
    """Return how many rows of each task are asked for.

    >>> asked_rows({"seqrec": 10, "reasoning": 0.25}, {"seqrec": 8, "reasoning": 40})
    {'seqrec': 10, 'reasoning': 10}
    >>> asked_rows({"seqrec": 2, "reasoning": 1}, {}, total=100)
    {'seqrec': 67, 'reasoning': 33}

    Args:
        rows: Counts (int), shares (float) of what exists or, with ``total``, weights.
        exist: How many rows there are of each task.
        total: Rows of all tasks together.

    Raises:
        InputError: When a number is negative, or a share more than 1.
    """
    for task, value in rows.items():
        if value < 0 or (total is None and isinstance(value, float) and value > 1):
            raise InputError(f"rows of {task}: {value} cannot be; give a count, or a share of what exists up to 100%")
    if total is None:
        return {task: round(n * exist[task]) if isinstance(n, float) else n for task, n in rows.items()}
    ends = total * np.cumsum(list(rows.values())) / (sum(rows.values()) or 1)
    return dict(zip(rows, np.diff(np.rint(ends).astype(int), prepend=0).tolist(), strict=True))


def draw(corpus: Corpus, task: str, count: int, seed: int) -> Specs:
    """Draw the specs of one task; what other tasks draw does not change them.

    For reasoning all that exist are drawn, so that chains that leak can be replaced.
    """
    generator = np.random.default_rng([seed, crc32(task.encode())])
    return TASKS[task].draw(corpus, sys.maxsize if task == REASONING else count, generator)


class Plan(NamedTuple):
    """All rows of a mix, before they are texts.

    Attributes:
        tasks: Names of the tasks.
        sizes: Rows of each.
        specs: Those of one task after the other, ``[rows, 3]``.
        order: Numbers of specs in the order of the file, ``[rows]``.
        leaks: How many chains were dropped because they name their target, by kind.
    """

    tasks: list[str]
    sizes: list[int]
    specs: Specs
    order: Ints
    leaks: Counter[str]


def plan_mix(corpus: Corpus, counts: Mapping[str, int], *, seed: int, block: int = 1) -> Plan:
    """Draw the specs of all tasks, and their order.

    Args:
        corpus: Where to draw from.
        counts: Rows of each task, reasoning last; those that exist when there are fewer.
        seed: Same seed, same plan.
        block: Rows of one task that stay together.
    """
    drawn = {task: draw(corpus, task, count, seed) for task, count in counts.items()}
    leaks: Counter[str] = Counter()
    if REASONING in drawn:
        drawn[REASONING], leaks = _without_leaks(corpus, drawn[REASONING], counts[REASONING])
    sizes = {task: len(specs) for task, specs in drawn.items()}
    alignment = [size for task, size in sizes.items() if task != REASONING]
    order = curriculum_order(alignment, sizes.get(REASONING, 0), seed=seed, block=block)
    specs = np.concatenate([np.zeros((0, 3), np.int32), *drawn.values()])
    return Plan(list(drawn), list(sizes.values()), specs, order, leaks)


def _check_names(rows: Mapping[str, int | float]) -> None:
    for task in rows:
        if task not in TASKS:
            near = difflib.get_close_matches(task, TASKS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(TASKS)}"
            raise InputError(f"SFT task {task!r}: unknown; {hint}")


def _read_corpus(folder: DataFolder, history: int) -> Corpus:
    items = folder.read_items()
    index = folder.read_index(items)
    training = folder.read_training(items)
    preferences, queries = folder.read_user_texts()
    chains = folder.read_chains(training, index)
    return Corpus(training, items, index, history, preferences=preferences, queries=queries, chains=chains)


def _without_leaks(corpus: Corpus, specs: Specs, count: int) -> tuple[Specs, Counter[str]]:
    """Keep the first ``count`` specs whose chains do not name their target; count the leaks among those looked at."""
    finder, kept, leaks = ChainLeaks(corpus), 0, Counter[str]()
    clean = np.zeros(len(specs), np.bool_)
    start = 0
    while kept < count and start < len(specs):
        end = start + min(count - kept, CHUNK)
        found = finder.find(specs[start:end])
        clean[start:end] = [leak is None for leak in found]
        leaks.update(filter(None, found))
        kept += found.count(None)
        start = end
    return specs[clean], leaks


class Written(NamedTuple):
    """What was rendered, in the order of the file.

    Attributes:
        kinds: Number of the task of every row.
        tokens: Tokens of every row, 0 without a limit. Those with more than the limit are not in the file.
        shortened: Which rows lost the oldest part of their history.
    """

    kinds: npt.NDArray[np.uint8]
    tokens: npt.NDArray[np.int32]
    shortened: npt.NDArray[np.bool_]


def write_rows(path: Path, corpus: Corpus, plan: Plan, limit: LengthLimit | None = None) -> Written:
    """Write rows chunk by chunk; a row's text lives only while it is written.

    Args:
        path: The parquet file.
        corpus: Where the texts are.
        plan: The rows.
        limit: Shortens histories; none when None.

    Raises:
        InputError: When no row is within the limit; an earlier file stays.
    """
    renderer, rows = Renderer(corpus, plan.tasks), len(plan.order)
    kinds = np.repeat(np.arange(len(plan.tasks), dtype=np.uint8), plan.sizes)[plan.order]
    written = Written(kinds, np.zeros(rows, np.int32), np.zeros(rows, np.bool_))
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, SCHEMA, **WRITING) as writer,
        ThreadPoolExecutor(1) as background,  # one chunk is compressed while the next is rendered
    ):
        writing: Future[None] | None = None
        for start in track(range(0, rows, CHUNK), description="SFT rows"):
            part = slice(start, start + CHUNK)
            kinds, chunk = written.kinds[part], plan.specs[plan.order[part]]
            if limit:
                asked = chunk[:, LENGTH].copy()
                written.tokens[part] = tokens = limit.fit(renderer, kinds, chunk)
                written.shortened[part] = chunk[:, LENGTH] < asked
                kinds, chunk = kinds[tokens <= limit.longest], chunk[tokens <= limit.longest]
            table = _table(renderer, kinds, chunk)
            if writing:
                writing.result()
            writing = background.submit(writer.write_table, table)
        if writing:
            writing.result()
        if limit and written.tokens.min() > limit.longest:
            raise InputError(f"{path}: no row has at most {limit.longest} tokens; allow longer ones")
    return written


def _table(renderer: Renderer, kinds: Ints, specs: Specs) -> pa.Table:
    """Return rows as the file holds them."""
    speakers = pa.array(["human", "gpt"]).take(pa.array(np.tile([0, 1], len(specs))))
    values = string_array(*renderer.turns(kinds, specs))
    turns = pa.StructArray.from_arrays([speakers, values], fields=list(SCHEMA.field("conversations").type.value_type))
    starts = pa.array(np.arange(0, 2 * len(specs) + 1, 2, dtype=np.int32))
    systems, tasks = (pa.array(texts).take(pa.array(kinds)) for texts in (renderer.systems, renderer.tasks))
    return pa.Table.from_arrays([pa.ListArray.from_arrays(starts, turns), systems, tasks], schema=SCHEMA)


def _register(folder: DataFolder, path: Path) -> None:
    """Add a file to ``dataset_info.json``, where LLaMA-Factory looks names up; other entries stay."""
    entries = read_json(folder.dataset_info) if folder.dataset_info.is_file() else {}
    entries[path.stem] = {
        "file_name": path.name,
        "formatting": "sharegpt",
        "columns": {"messages": "conversations", "system": "system"},
    }
    write_json(folder.dataset_info, dict(sorted(entries.items())), indent=2)
