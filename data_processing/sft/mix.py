"""Writes the SFT mix: alignment and reasoning rows in the order of the curriculum, for LLaMA-Factory."""

from __future__ import annotations

import difflib
import math
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

from data_processing.layout import read_chains, read_user_texts
from data_processing.sft.chain_leaks import ChainLeaks
from data_processing.sft.corpus import Corpus
from data_processing.sft.curriculum import curriculum_order
from data_processing.sft.fields import LENGTH, Specs
from data_processing.sft.lengths import LengthLimit, length_table
from data_processing.sft.picture import draw_mix
from data_processing.sft.rules import NOTES
from data_processing.sft.tasks import REASONING, TASKS, Renderer
from data_processing.sft.texts import Ints, string_array
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.files import atomic_path, read_json, write_json

CHUNK = 1 << 15
"""Rows that are put together at once; a row group of the file."""
FEWEST = 1 << 10
"""So many rows at least are looked at for one that fits."""
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
    wording: str = NOTES,
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
        limit: Shortens histories to a number of tokens, or leaves a row out for another one; none when None.
        dry_run: Plan only, and write nothing.
        output: Another file than ``<D>-mix.parquet``, in the same folder.
        wording: Of the chains that rules write, one of :data:`data_processing.sft.rules.WORDINGS`.

    Returns:
        ``tasks``: for each task the rows ``asked`` for, those that ``exist`` and those ``made``, fewer only when no
        others can be had; with a limit also the spread of lengths in tokens, the rows ``shortened`` and those
        ``left out`` for others. ``leaks``: chains dropped because they named the target, by kind, and their rate.

    Raises:
        InputError: When a task is unknown, nothing is to be written, or a file of the data set cannot be used.
    """
    _check_names(rows)
    path = output or folder.mix
    corpus = _read_corpus(folder, history, wording)
    exist = {task: TASKS[task].exist(corpus) for task in rows}
    asked = asked_rows(rows, exist, total)
    tasks = [task for task in TASKS if asked.get(task)]  # reasoning is the last
    plan = plan_mix(corpus, {task: asked[task] for task in tasks}, seed=seed, block=block, limit=limit)
    if limit and not len(plan.order) and any(chosen.left_out for chosen in plan.chosen):
        raise InputError(f"{path}: no row has at most {limit.longest} tokens; allow longer ones")
    if not len(plan.order):
        raise InputError(f"{path}: no rows to write; ask for more rows or bring longer histories")
    report: dict[str, Any] = {"tasks": {}}
    for task, chosen in zip(tasks, plan.chosen, strict=True):
        counts = {"asked": asked[task], "exist": exist[task], "made": len(chosen.specs)}
        report["tasks"][task] = counts | (
            length_table(chosen.tokens, chosen.shortened, chosen.left_out) if limit else {}
        )
    leaks = sum((chosen.leaks for chosen in plan.chosen), Counter[str]())
    thoughts = report["tasks"].get(REASONING, {"made": 0})["made"]
    report["leaks"] = {**leaks, "rate": leaks.total() / max(thoughts + leaks.total(), 1)}
    if dry_run:
        return report
    write_rows(path, corpus, plan)
    _register(folder, path)
    write_json(path.with_suffix(".json"), report, indent=2)
    reasoning = np.array([task == REASONING for task in tasks])[plan.kinds]
    lengths = (np.concatenate([chosen.tokens for chosen in plan.chosen]), limit.longest) if limit else None
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
        InputError: When a number is negative or not finite, or a share more than 1.
    """
    for task, value in rows.items():
        if not 0 <= value < math.inf or (total is None and isinstance(value, float) and value > 1):
            raise InputError(f"rows of {task}: {value} cannot be; give a count, or a share of what exists up to 100%")
    if total is None:
        return {task: round(n * exist[task]) if isinstance(n, float) else n for task, n in rows.items()}
    ends = total * np.cumsum(list(rows.values())) / (sum(rows.values()) or 1)
    return dict(zip(rows, np.diff(np.rint(ends).astype(int), prepend=0).tolist(), strict=True))


def draw(corpus: Corpus, task: str, count: int, seed: int) -> Specs:
    """Draw the specs of one task; what other tasks draw does not change them."""
    generator = np.random.default_rng([seed, crc32(task.encode())])
    return TASKS[task].draw(corpus, count, generator)


class Chosen(NamedTuple):
    """The rows of one task, before they are texts.

    Attributes:
        specs: The rows, ``[rows, 3]``.
        tokens: int32, the tokens of every row, ``[rows]``; empty without a limit.
        shortened: How many lost the oldest part of their history.
        left_out: How many others were left out because they are too long.
        leaks: How many others were left out because they name their target, by kind.
    """

    specs: Specs
    tokens: Ints
    shortened: int
    left_out: int
    leaks: Counter[str]


class Plan(NamedTuple):
    """All rows of a mix, before they are texts.

    Attributes:
        tasks: Names of the tasks.
        chosen: Rows of each.
        order: Numbers of rows in the order of the file, ``[rows]``; they count one task after the other.
    """

    tasks: list[str]
    chosen: list[Chosen]
    order: Ints

    @property
    def kinds(self) -> npt.NDArray[np.uint8]:
        """Number of the task of every row, in the order of the file."""
        sizes = [len(chosen.specs) for chosen in self.chosen]
        return np.repeat(np.arange(len(sizes), dtype=np.uint8), sizes)[self.order]


def plan_mix(
    corpus: Corpus, counts: Mapping[str, int], *, seed: int, block: int = 1, limit: LengthLimit | None = None
) -> Plan:
    """Choose the rows of all tasks, and their order.

    Args:
        corpus: Where to draw from.
        counts: Rows of each task, reasoning last; those that can be had when there are fewer.
        seed: Same seed, same plan.
        block: Rows of one task that stay together.
        limit: Shortens histories; none when None.
    """
    tasks = track(list(counts), description="SFT rows that fit", disable=limit is None)
    chosen = [_choose(corpus, task, counts[task], seed, limit) for task in tasks]
    sizes = {task: len(rows.specs) for task, rows in zip(counts, chosen, strict=True)}
    alignment = [size for task, size in sizes.items() if task != REASONING]
    order = curriculum_order(alignment, sizes.get(REASONING, 0), seed=seed, block=block)
    return Plan(list(counts), chosen, order)


def _choose(corpus: Corpus, task: str, count: int, seed: int, limit: LengthLimit | None) -> Chosen:
    """Choose the first ``count`` rows drawn that fit the limit and, shortened as they are, do not name their target."""
    finder = ChainLeaks(corpus) if task == REASONING else None
    chosen = Chosen(np.zeros((0, 3), np.int32), np.zeros(0, np.int32), 0, 0, Counter())
    if not limit and not finder:
        return chosen._replace(specs=draw(corpus, task, count, seed))
    drawn = draw(corpus, task, sys.maxsize, seed)  # all, so that rows can be replaced
    renderer, specs, tokens, made, start = Renderer(corpus, [task]), [chosen.specs], [chosen.tokens], 0, 0
    while made < count and start < len(drawn):
        part = drawn[start : start + min(max(count - made, FEWEST), CHUNK)]
        asked, kinds = part[:, LENGTH].copy(), np.zeros(len(part), np.int32)
        lengths = limit.fit(renderer, kinds, part) if limit else kinds
        fits = lengths <= (limit.longest if limit else 0)
        leaks = np.full(len(part), None, object)
        if finder:
            leaks[fits] = finder.find(part[fits])
        good = fits & (leaks == None)  # noqa: E711 - for each
        seen = slice(int(np.searchsorted(np.cumsum(good), count - made)) + 1)  # no further than is needed
        good = good[seen]
        specs.append(part[seen][good])
        tokens.append(lengths[seen][good])
        chosen = chosen._replace(
            shortened=chosen.shortened + int((part[seen][:, LENGTH] < asked[seen])[good].sum()),
            left_out=chosen.left_out + int((~fits[seen]).sum()),
            leaks=chosen.leaks + Counter(filter(None, leaks[seen])),
        )
        made, start = made + len(specs[-1]), start + len(part)
    return chosen._replace(specs=np.concatenate(specs), tokens=np.concatenate(tokens) if limit else chosen.tokens)


def _check_names(rows: Mapping[str, int | float]) -> None:
    for task in rows:
        if task not in TASKS:
            near = difflib.get_close_matches(task, TASKS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(TASKS)}"
            raise InputError(f"SFT task {task!r}: unknown; {hint}")


def _read_corpus(folder: DataFolder, history: int, wording: str) -> Corpus:
    items = folder.read_items()
    index = folder.read_index(items)
    training = folder.read_training(items)
    preferences, queries = read_user_texts(folder, training)
    chains = read_chains(folder, training, index, history)
    return Corpus(
        training, items, index, history, preferences=preferences, queries=queries, chains=chains, wording=wording
    )


def write_rows(path: Path, corpus: Corpus, plan: Plan) -> None:
    """Write rows chunk by chunk; a row's text lives only while it is written.

    Args:
        path: The parquet file.
        corpus: Where the texts are.
        plan: The rows.
    """
    renderer, kinds = Renderer(corpus, plan.tasks), plan.kinds
    specs = np.concatenate([chosen.specs for chosen in plan.chosen])
    with (
        atomic_path(path) as temporary,
        pq.ParquetWriter(temporary, SCHEMA, **WRITING) as writer,
        ThreadPoolExecutor(1) as background,  # one chunk is compressed while the next is rendered
    ):
        writing: Future[None] | None = None
        for start in track(range(0, len(kinds), CHUNK), description="SFT rows"):
            part = slice(start, start + CHUNK)
            table = _table(renderer, kinds[part], specs[plan.order[part]])
            if writing:
                writing.result()
            writing = background.submit(writer.write_table, table)
        if writing:
            writing.result()


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
