"""Writes the prompts of RL, validation and test as verl reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gream_verl.core.data_folder import DataFolder, Item
from gream_verl.core.errors import InputError
from gream_verl.core.files import atomic_path
from gream_verl.core.prompts import NO_TARGET, Mode, TrainingTargets, messages, row
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.core.split import read_splits

CHUNK = 1024
MODES: tuple[Mode, ...] = ("direct", "reasoning")
SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("style", pa.string()), ("ground_truth", pa.string())])),
        (
            "extra_info",
            pa.struct(
                [
                    ("index", pa.int64()),
                    ("user", pa.string()),
                    ("item", pa.string()),
                    ("title", pa.string()),
                    ("type", pa.string()),
                    ("history", pa.list_(pa.string())),
                ]
            ),
        ),
    ]
)


class Target(NamedTuple):
    """One prompt to write: which interaction of which user is asked for, and how."""

    user: str
    position: int
    mode: Mode


def write_prompts(
    folder: DataFolder,
    *,
    seed: int,
    mode: Mode = "reasoning",
    history: int = 20,
    rl_rows: int | None = None,
    val_rows: int | None = None,
    test_users: int | None = None,
) -> dict[str, Any]:
    """Write ``<D>-rl.parquet``, ``<D>-val.parquet`` and ``<D>-test.parquet``.

    RL: every target from the 5th interaction of a user to the last that training may see, in random order. Validation
    and test: the one that the split holds out for it (:mod:`split`; the second last and the last), test rows
    once in direct and once in reasoning mode, all direct rows first.

    Args:
        folder: A prepared data set with an index.
        seed: Draws and orders rows; same seed, same bytes.
        mode: What RL and validation prompts ask for; ``direct`` ones go to ``<D>-rl-direct.parquet`` and
            ``<D>-val-direct.parquet``.
        history: Items shown in a prompt, the most recent ones.
        rl_rows: RL rows to draw; all when None.
        val_rows: Users to draw for validation; all when None.
        test_users: Users to draw for the test, each gives two rows; all when None.

    Returns:
        Rows written by file, and how many users were skipped as too short.

    Raises:
        InputError: When no RL row or no held-out row exists, or a file of the data set cannot be used.
    """
    items = folder.read_items()
    sequences = folder.read_inter(items)
    index = folder.read_index(items)
    splits = read_splits(folder.inter, sequences)
    held_out = {
        "val": {user: split.validation for user, split in splits.items() if split.validation is not None},
        "test": {user: split.test for user, split in splits.items() if split.test is not None},
    }
    for part, users in held_out.items():
        if not users:
            raise InputError(
                f"{folder.inter}: no user has an interaction for {part}; bring longer histories, or split otherwise"
            )
    generator = np.random.default_rng(seed)
    targets = TrainingTargets(split.training for split in splits.values())
    everyone = list(sequences)
    owners, positions = targets.locate(generator.permutation(len(targets))[:rl_rows])
    training = [
        Target(everyone[owner], position, mode)
        for owner, position in zip(owners.tolist(), positions.tolist(), strict=True)
    ]
    if not training:
        raise InputError(f"{folder.inter}: {NO_TARGET}")
    validation = [
        Target(user, held_out["val"][user], mode) for user in _some(list(held_out["val"]), val_rows, generator)
    ]
    tested = _some(list(held_out["test"]), test_users, generator)
    test = [Target(user, held_out["test"][user], each) for each in MODES for user in tested]
    for path, rows in ((folder.rl_of(mode), training), (folder.val_of(mode), validation), (folder.test, test)):
        _write(
            path,
            (
                _record(folder.name, number, target, sequences, items, index, history)
                for number, target in enumerate(rows)
            ),
        )
    return {
        "rows": {"rl": len(training), "val": len(validation), "test": len(test)},
        "users without a test": len(sequences) - len(held_out["test"]),
    }


def _some(users: Sequence[str], count: int | None, generator: np.random.Generator) -> list[str]:
    """Draw ``count`` users, in the order of ``users``."""
    if count is None or count >= len(users):
        return list(users)
    return [users[number] for number in np.sort(generator.choice(len(users), count, replace=False)).tolist()]


def _record(
    source: str,
    number: int,
    target: Target,
    sequences: Mapping[str, Sequence[str]],
    items: Mapping[str, Item],
    index: ItemIndex,
    history: int,
) -> dict[str, Any]:
    past, item = sequences[target.user][: target.position], sequences[target.user][target.position]
    prompt = messages("".join(index.texts(past[-history:])), target.mode)
    made = row(source, number, target.user, past, item, prompt, target.mode, index)
    made["extra_info"]["title"] = items[item].title
    return made


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    with atomic_path(path) as temporary, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        while chunk := list(islice(rows, CHUNK)):
            writer.write_table(pa.Table.from_pylist(chunk, SCHEMA))
