"""Prompts of held-out users and their protocol.

Prompts are read from a parquet file, ours or the authors', or made from the interactions. The protocol says who the
users are, what they are shown and what is ranked for them. Two results are comparable when their protocols agree.
"""

from __future__ import annotations

import os
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.files import fingerprint, read_json, require_file
from gream_verl.core.origin import check_origin
from gream_verl.core.prompts import messages
from gream_verl.core.rsvr import Mode
from gream_verl.core.semantic_ids import SID_TOKEN, ItemIndex, SemanticId, find_sids, parse_sid
from gream_verl.core.split import read_interactions, read_splits
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.results import Evaluation

AS_IN_FILE = "as in the file"
MODES: tuple[Mode, ...] = ("direct", "reasoning")
HISTORY = 20  # items that a made prompt shows by default, as in `gream data rl`
REMEDY = "make it with `gream data rl`"
DEFAULTS = EvaluationOptions()
_SIDS = re.compile(rf"{SID_TOKEN.pattern}(?:.{{0,6}}?{SID_TOKEN.pattern})*", re.DOTALL)  # short texts between them


@dataclass(frozen=True)
class Prompt:
    """One user to recommend for.

    ``target`` is the item that comes next, ``truth`` its SID as text. ``history`` has all items before it, in time
    order, or only those in the messages where the file holds no more (``whole`` is False).
    """

    user: str
    target: str
    history: tuple[str, ...]
    messages: list[dict[str, str]]
    truth: str
    whole: bool = True


def read_prompts(
    path: str | os.PathLike[str], mode: Mode, options: EvaluationOptions = DEFAULTS, index: ItemIndex | None = None
) -> tuple[list[Prompt], int]:
    """Read the prompts of one mode from a parquet file with verl's columns, and count its rows of this mode.

    The mode of a row is ``extra_info.type``; where no row has a mode, all are taken. The authors' rows name neither
    user nor items: the user is then the number of the row, from 0, the target the ground truth, a SID alone or in
    ``<answer>``, and the history the SIDs in the last user turn.

    ``options`` give ``limit``, ``seed`` and ``skip_missing``. The ``index`` is needed where rows do not name their
    items; targets are checked against it.
    """
    table, modes = _read_table(path)
    is_untyped = not set(MODES) & set(modes)
    chosen = [number for number, found in enumerate(modes) if found == mode or is_untyped]
    if not chosen:
        raise InputError(f"{path}: no row of type {mode!r}; {REMEDY}")
    sample = _sample(chosen, options)
    prompts = []
    for number, row in zip(sample, table[sample].iter_rows(named=True), strict=True):
        row_label = f"{path}: row {number}"
        try:
            prompt = _read_row(row, number, {} if index is None else index.items, row_label)
        except NoItemError:
            if options.skip_missing:
                continue
            raise
        if index is None or _has_sid(prompt.target, index, row_label, options):
            prompts.append(prompt)
    return _checked(prompts, path), len(chosen)


def modes_of(path: str | os.PathLike[str]) -> tuple[Mode, ...]:
    """Return the modes of the rows of a parquet file, both where they name none."""
    _, found = _read_table(path)
    return tuple(mode for mode in MODES if mode in found) or MODES


def make_prompts(
    inter_file: str | os.PathLike[str], mode: Mode, options: EvaluationOptions, index: ItemIndex
) -> tuple[list[Prompt], int]:
    """Make the prompts for the held-out interaction of every user from ``<D>.inter.json``; see :func:`read_prompts`.

    The words are those of `gream data rl`, except where ``history``, ``template`` or ``system`` are given.
    """
    sequences = read_interactions(inter_file)
    held_out = [
        (user, position)
        for user, parts in read_splits(inter_file, sequences).items()
        if (position := parts.test if options.split == "test" else parts.validation) is not None
    ]
    if not held_out:
        raise InputError(f"{inter_file}: no user has an interaction for {options.split}; bring longer histories")
    prompts = []
    for user, position in _sample(held_out, options):
        past, target = sequences[user][:position], sequences[user][position]
        shown = past[-(options.history or HISTORY) :]
        has_all = not options.skip_missing or all(item in index.sids for item in shown)
        if _has_sid(target, index, f"{inter_file}: user {user!r}", options) and has_all:
            turns = messages("".join(index.texts(shown)), mode, options.template, options.system)
            prompts.append(Prompt(user, target, tuple(past), turns, index.text(target)))
    return _checked(prompts, inter_file), len(held_out)


def without_thinking(prompt: Prompt) -> Prompt:
    """Return the prompt of direct mode, in the words of `gream data rl`, with the history that ``prompt`` shows."""
    shown = "".join(map("".join, find_sids(_last_question(prompt.messages))))
    return replace(prompt, messages=messages(shown, "direct"))


def read_protocol(
    data: DataFolder, options: EvaluationOptions, mode: Mode, index: ItemIndex
) -> tuple[list[Prompt], dict[str, Any]]:
    """Return the prompts of a mode and their protocol, ready for JSON, in the order in which to show it."""
    # The prompts of the named file, else of the data folder's where no wording is asked for, else made ones.
    file = options.prompts or (data.test if options.split == "test" else data.val_of(mode))
    is_worded = (options.history, options.template, options.system) != (None, None, None)
    is_read = options.prompts is not None or (file.is_file() and not is_worded)
    source = file if is_read else data.inter
    prompts, total = (read_prompts if is_read else make_prompts)(source, mode, options, index)
    held_out = read_json(data.split).get("kind", "temporal") if data.split.is_file() else "leave-one-out"
    questions = [_last_question(prompt.messages) for prompt in prompts]
    is_whole = all(prompt.whole for prompt in prompts)
    return prompts, {
        "split": options.split if options.prompts is None else AS_IN_FILE,
        "held_out": held_out if options.prompts is None else AS_IN_FILE,
        "mode": mode,
        "history": max(question.count("<|a_") for question in questions),
        "template": _SIDS.sub("{history}", questions[0]),
        "system": "\n".join(turn["content"] for turn in prompts[0].messages if turn["role"] == "system"),
        "drop_history": options.drop_history,
        "seen": "all items before the target" if is_whole else "the items that the prompt shows",
        "candidates": "all items",
        "items": len(index),
        "users": len(prompts),
        "users_in_file": total,
        "users_left_out": min(total, options.limit or total) - len(prompts),
        "seed": options.seed,
        "prompts": os.fspath(source),
        "prompts_are": "read from the file" if is_read else "made of the interactions",
        "prompts_sha256": fingerprint(source),
        "index": os.fspath(data.index),
        "index_sha256": fingerprint(data.index) if data.index.is_file() else None,
    }


def refuse_to_lose(path: Path, prompts: list[Prompt], protocol: dict[str, Any]) -> None:
    """Refuse to replace a result of other users or another protocol; a damaged one may be replaced."""
    try:
        old = Evaluation.load(path)
    except InputError:
        return
    rows = [{"user": prompt.user, "target": prompt.target} for prompt in prompts]
    reasons = old.disagreements(Evaluation({}, {"mode": old.settings.get("mode"), "protocol": protocol}, rows))
    kept = {} if old.is_baseline else old.settings.get("protocol", {})
    reasons += [f"the {key} differs" for key in ("template", "system") if kept.get(key, protocol[key]) != protocol[key]]
    if reasons:
        raise InputError(f"{path}: holds another result ({'; '.join(reasons)}); choose a --name or add --overwrite")


def _read_table(path: str | os.PathLike[str]) -> tuple[pl.DataFrame, list[Any]]:
    """Read a parquet file, and ``extra_info.type`` of every row, None without one."""
    try:
        table = pl.read_parquet(require_file(path, REMEDY))
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{path}: not a file of test prompts ({error}); {REMEDY}") from error
    check_origin(Path(path), REMEDY)
    info = table.schema.get("extra_info")
    has_type = isinstance(info, pl.Struct) and "type" in info.to_schema()
    return table, table["extra_info"].struct.field("type").to_list() if has_type else [None] * table.height


class NoItemError(InputError):
    """A row names a SID that no item has."""


def _read_row(row: Mapping[str, Any], number: int, items: Mapping[SemanticId, str], row_label: str) -> Prompt:
    """Return the prompt of a row; ``row_label`` begins the messages of errors."""

    def item_of(sid: SemanticId) -> str:
        if sid in items:
            return items[sid]
        shared = [item for other, item in items.items() if other[: len(sid)] == sid]
        reason = f", but the beginning of those of {len(shared)}, such as {shared[0]!r}" if shared else ""
        remedy = "give the index of this file, or set skip_missing: true"
        raise NoItemError(f"{row_label}: {''.join(sid)} is no item of the index{reason}; {remedy}")

    info = row.get("extra_info") or {}
    try:
        turns = [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in row["prompt"]]
        truth = str(row["reward_model"]["ground_truth"])
    except (KeyError, TypeError) as error:
        raise InputError(f"{row_label}: expected prompt [{{role, content}}] and reward_model.ground_truth") from error
    # The authors wrap the target: it is the last <answer>, or the whole text without one.
    sid = parse_sid(truth.rpartition("<answer>")[2].partition("</answer>")[0].strip())
    if sid is None:
        raise InputError(
            f"{row_label}: reward_model.ground_truth is {truth!r}; expected a SID such as '<|a_1|><|b_7|>'"
        )
    item, history, user = info.get("item"), info.get("history"), info.get("user")
    past = map(item_of, find_sids(_last_question(turns))) if history is None else map(str, history)
    return Prompt(
        user=str(number if user is None else user),
        target=item_of(sid) if item is None else str(item),
        history=tuple(past),
        messages=turns,
        truth="".join(sid),
        whole=history is not None,
    )


def _last_question(turns: Sequence[Mapping[str, str]]) -> str:
    return next((turn["content"] for turn in reversed(turns) if turn["role"] == "user"), "")


def _has_sid(target: str, index: ItemIndex, row_label: str, options: EvaluationOptions) -> bool:
    """Return True when a target has a semantic ID; refuse one without unless such users are to be left out."""
    if target not in index.sids and not options.skip_missing:
        raise InputError(
            f"{row_label}: the target {target!r} is not in {index.source}; add it, or set skip_missing: true"
        )
    return target in index.sids


def _checked(prompts: list[Prompt], source: str | os.PathLike[str]) -> list[Prompt]:
    """Refuse a user with two prompts, and a selection without users."""
    if not prompts:
        raise InputError(f"{source}: no user is left, the index has none of the targets; build it for this data set")
    user, count = Counter(prompt.user for prompt in prompts).most_common(1)[0]
    if count > 1:
        raise InputError(f"{source}: user {user!r} has {count} rows; give a file with one held-out item per user")
    return prompts


def _sample(rows: Sequence[Any], options: EvaluationOptions) -> list[Any]:
    """Draw ``limit`` rows, in their order; all when None."""
    if options.limit is None or options.limit >= len(rows):
        return list(rows)
    return [rows[number] for number in sorted(random.Random(options.seed).sample(range(len(rows)), options.limit))]
