"""The SFT mix: alignment and reasoning rows in the order of the curriculum, for LLaMA-Factory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from rich.progress import track

from data_processing.layout import read_chains, read_user_texts
from data_processing.sft.best_of import BestOf
from data_processing.sft.curriculum import curriculum_order, draw_curriculum
from data_processing.sft.lengths import LengthLimit
from data_processing.sft.rules import Wording
from data_processing.sft.tasks import ITEM_TASKS, LENGTH, REASONING, TASKS, Corpus, Specs, TeacherTexts, Window
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.files import atomic_path, changing, read_json, write_json
from gream_verl.core.origin import origin_of

TINY_MIX = {
    "seqrec": 9000, "continuation": 4300, "item2index": 1500, "index2item": 1500, "fusionseqrec": 1000,
    "reasoning": 7000,
}  # fmt: skip
"""Rows of the tiny model's mix, the default."""
HELD_OUT_ROWS = 256
"""Most rows of a held-out file."""
CHUNK, CANDIDATES = 1 << 15, 1 << 10
"""Rows rendered at once: those of a row group of the file; those among which rows are chosen."""
TURNS = pa.list_(pa.struct({"from": pa.string(), "value": pa.string()}))
SCHEMA = pa.schema({"conversations": TURNS, "system": pa.string(), "task": pa.string()})
READ_AS = {"formatting": "sharegpt", "columns": {"messages": "conversations", "system": "system"}}
"""The entry of a file in ``dataset_info.json``, but for its ``file_name``."""


@dataclass(frozen=True)
class MixOptions:
    """The choices of a mix.

    Attributes:
        rows: Rows of each task, by its name in ``TASKS``: an int is a count, a float from 0 to 1 a share of all that
            exist. With ``total``, any weights.
        total: Rows of the whole mix, which the tasks share by weight; None when ``rows`` says it.
        history: Longest history of a row, in items.
        block: Rows of one task that stay together, the size of a batch.
        limit: Shortens histories to a number of tokens, or replaces a row by another.
        wording: Wording of the chains by rule.
        best_of: Chooses among several chains of a row; None for the first.
    """

    rows: Mapping[str, int | float]
    seed: int = 0
    total: int | None = None
    history: int = 20
    block: int = 1
    limit: LengthLimit | None = None
    wording: Wording = "notes"
    best_of: BestOf | None = None


def write_mix(
    folder: DataFolder, options: MixOptions, output: Path | None = None, *, dry_run: bool = False
) -> dict[str, dict[str, Any]]:
    """Write ``<D>-mix.parquet``, its report ``.json`` and picture ``.png``, and a held-out file for each task.

    ``<D>-mix-eval-<task>.parquet`` holds rows whose targets are the validation interactions; of tasks about items, and
    of the chains of a language model, rows that the mix does not use. Every file gets an entry in
    ``dataset_info.json``. Texts of a language-model teacher are used when the folder holds them. ``output`` is another
    file than ``<D>-mix.parquet``, in the same folder; ``dry_run`` counts, and writes nothing.

    Returns:
        Rows of each task: ``asked`` for, those that ``exist``, ``made``, ``held out``, ``leaks`` (dropped because they
        name their target), ``untrue`` (what the first chain says about the history); with a limit those ``shortened``
        or ``left out``, and the tokens of the ``longest``; ``best of``, the report of :meth:`BestOf.choose`.
    """
    if unknown := [task for task in options.rows if task not in TASKS]:
        raise InputError(f"SFT task {unknown[0]!r}: unknown; choose from {', '.join(TASKS)}")
    path = output or folder.mix
    corpus, validation = _read(folder, options)
    exist = {task: corpus.exist(task) for task in options.rows}
    asked = asked_rows(options.rows, exist, options.total)
    report, chosen, held_out = {}, {}, {}
    for task in track([task for task in TASKS if asked.get(task)], description="SFT tasks"):  # reasoning is the last
        chosen[task], counts = _choose(corpus, task, asked[task], options)
        held_out[task] = _hold_out(corpus, validation, task, chosen[task], options)
        made = {"made": len(chosen[task]), "held out": len(held_out[task][1])}
        report[task] = {"asked": asked[task], "exist": exist[task], **made, **counts}
    if not any(map(len, chosen.values())):
        raise InputError(f"{path}: no rows to write; {'allow longer ones' if options.limit else 'ask for more'}")
    if dry_run:
        return report
    if options.best_of and len(chosen.get(REASONING, ())):
        report[REASONING]["best of"] = options.best_of.choose(corpus, chosen[REASONING], options.limit, options.seed)
    sizes = {task: len(specs) for task, specs in chosen.items()}
    thoughts = sizes.pop(REASONING, 0)
    order = curriculum_order(list(sizes.values()), thoughts, seed=options.seed, block=options.block)
    tasks = np.repeat(np.array(list(chosen), object), [len(specs) for specs in chosen.values()])[order]
    schema = SCHEMA.with_metadata(origin_of(folder.inter, folder.split, folder.item, folder.index))
    write_rows(path, schema, corpus, tasks, np.concatenate(list(chosen.values()))[order])
    with changing(folder.dataset_info):
        entries = read_json(folder.dataset_info, "delete it") if folder.dataset_info.is_file() else {}
        entries[path.stem] = {"file_name": path.name, **READ_AS}
        for task in TASKS:
            file = path.with_stem(f"{path.stem}-eval-{task}")
            if task in held_out and len(held_out[task][1]):
                source, specs = held_out[task]
                write_rows(file, schema, source, np.full(len(specs), task, object), specs)
                entries[file.stem] = {"file_name": file.name, **READ_AS}
            else:  # an earlier mix may have had this task
                file.unlink(missing_ok=True)
                entries.pop(file.stem, None)
        write_json(folder.dataset_info, dict(sorted(entries.items())), indent=2)
    write_json(path.with_suffix(".json"), report, indent=2)
    draw_curriculum(path.with_suffix(".png"), tasks == REASONING)
    return report


def _read(folder: DataFolder, options: MixOptions) -> tuple[Corpus, Corpus]:
    """Return the source of the mix, and that of held-out rows, whose targets are the validation interactions."""
    items = folder.read_items()
    index = folder.read_index(items)
    sequences = folder.read_inter(items)
    splits = folder.read_splits(sequences)
    training = {user: sequence[: splits[user].training] for user, sequence in sequences.items()}
    validated = {user: sequences[user][: split.validation + 1] for user, split in splits.items() if split.validation}
    preferences, queries = read_user_texts(folder, training)
    texts = TeacherTexts(preferences, queries, read_chains(folder, training, index, options.history))
    return (
        Corpus(training, items, index, options.history, texts, options.wording),
        Corpus(validated, items, index, options.history, TeacherTexts(preferences), options.wording, last_only=True),
    )


def asked_rows(rows: Mapping[str, int | float], exist: Mapping[str, int], total: int | None = None) -> dict[str, int]:
    """Return the number of rows asked for, by task; the arguments are those of :class:`MixOptions`.

    >>> asked_rows({"seqrec": 10, "reasoning": 0.25}, {"seqrec": 8, "reasoning": 40})
    {'seqrec': 10, 'reasoning': 10}
    >>> asked_rows({"seqrec": 2, "reasoning": 1}, {}, total=100)
    {'seqrec': 67, 'reasoning': 33}
    """
    for task, value in rows.items():
        if not 0 <= value < math.inf or (total is None and isinstance(value, float) and value > 1):
            raise InputError(f"rows of {task}: {value} cannot be; give a count, or a share of what exists up to 100%")
    if total is None:
        return {task: round(n * exist[task]) if isinstance(n, float) else n for task, n in rows.items()}
    ends = total * np.cumsum(list(rows.values())) / (sum(rows.values()) or 1)
    return dict(zip(rows, np.diff(np.rint(ends).astype(int), prepend=0).tolist(), strict=True))


def _choose(
    corpus: Corpus, task: str, count: int, options: MixOptions, drawn: Specs | None = None
) -> tuple[Specs, dict[str, Any]]:
    """Return the first ``count`` rows drawn that fit the limit and do not name their target, with counts of others."""
    limit, counts = options.limit, dict.fromkeys(("leaks", "untrue", "shortened", "left out", "longest"), 0)
    if drawn is None:  # candidates for replacements, too, where rows may be left out
        candidates = count + corpus.exist(task) if limit or task == REASONING else count
        drawn = corpus.draw(task, candidates, options.seed)
    if limit is None and task != REASONING:
        return drawn[:count], counts
    chosen: list[Specs] = [drawn[:0]]
    made, start = 0, 0
    while made < count and start < len(drawn):
        part = drawn[start : start + CANDIDATES]
        asked = part[:, LENGTH].tolist()
        tokens = limit.fit(corpus, task, part).tolist() if limit else [0] * len(part)  # shortens histories
        good: list[int] = []
        for row, spec in enumerate(part.tolist()):
            if made + len(good) == count:
                break
            if limit and tokens[row] > limit.longest:
                counts["left out"] += 1
            elif task == REASONING and (window := Window(corpus, *spec)).leaks(chain := window["chain"]):
                counts["leaks"] += 1
            else:
                counts["untrue"] += task == REASONING and not window.is_true(chain)
                counts["shortened"] += spec[LENGTH] < asked[row]
                counts["longest"] = max(counts["longest"], tokens[row])
                good.append(row)
        chosen.append(part[good])
        made, start = made + len(good), start + len(part)
    return np.concatenate(chosen), counts


def _hold_out(corpus: Corpus, validation: Corpus, task: str, mixed: Specs, options: MixOptions) -> tuple[Corpus, Specs]:
    """Choose rows of a task that the mix does not hold; return them with the corpus that renders them."""
    if task not in ITEM_TASKS and not corpus.has_chains(task):
        drawn = validation.draw(task, None, options.seed)
        return validation, _choose(validation, task, HELD_OUT_ROWS, options, drawn)[0]
    rows = corpus.draw(task, HELD_OUT_ROWS << 7, options.seed + 1)  # the mix may have drawn all rows of its seed
    # A chain of a language model in another wording is the same chain: only its target counts.
    drawn, used = (specs[:, 0] if task == REASONING else specs.view("i4,i4,i4,i4").ravel() for specs in (rows, mixed))
    _, first = np.unique(drawn, return_index=True)
    fresh = np.sort(first[~np.isin(drawn[first], used)])
    return corpus, _choose(corpus, task, HELD_OUT_ROWS, options, rows[fresh])[0]


def write_rows(path: Path, schema: pa.Schema, corpus: Corpus, tasks: npt.NDArray[np.object_], specs: Specs) -> None:
    """Write rows, their tasks ``[rows]`` and specs ``[rows, 4]``; a row's text lives only while it is written."""
    # Only columns of few different texts gain from a dictionary.
    dictionary = ["conversations.list.element.from", "system", "task"]
    settings: dict[str, Any] = {"compression": "zstd", "use_dictionary": dictionary, "write_statistics": ["task"]}
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, **settings) as writer:
        for start in track(range(0, len(specs), CHUNK), description=path.name, disable=len(specs) <= CHUNK):
            part = slice(start, start + CHUNK)
            named = zip(tasks[part].tolist(), specs[part].tolist(), strict=True)
            rows = [corpus.row(task, *spec) for task, spec in named]
            turns = [[("human", row.user), ("gpt", row.assistant)] for row in rows]
            columns = [turns, [row.system for row in rows], [row.task for row in rows]]
            arrays = [pa.array(values, column.type) for values, column in zip(columns, schema, strict=True)]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
