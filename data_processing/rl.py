"""Writer of the prompts of RL, validation and test, in verl's parquet."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.files import atomic_path
from gream_verl.core.origin import origin_of
from gream_verl.core.prompts import NO_TARGET, TEMPLATES, TrainingTargets, messages
from gream_verl.core.rsvr import Mode

CHUNK = 1024
MODES: tuple[Mode, ...] = ("direct", "reasoning")
INFO = {"index": pa.int64()} | dict.fromkeys(("user", "item", "title", "type"), pa.string())
SCHEMA = pa.schema(
    {
        "data_source": pa.string(),
        "prompt": pa.list_(pa.struct({"role": pa.string(), "content": pa.string()})),
        "ability": pa.string(),
        "reward_model": pa.struct({"style": pa.string(), "ground_truth": pa.string()}),
        "extra_info": pa.struct(INFO | {"history": pa.list_(pa.string())}),
    }
)


class Target(NamedTuple):
    """The interaction that a prompt asks for, by its position (from 0) in the user's sequence, and the wording."""

    user: str
    position: int
    mode: Mode
    template: int = 0


def write_prompts(
    folder: DataFolder, *, seed: int, mode: Mode = "reasoning", history: int = 20, rl_rows: int | None = None
) -> dict[str, Any]:
    """Write ``<D>-rl.parquet``, ``<D>-val.parquet`` and ``<D>-test.parquet``.

    RL asks for the interactions of every user from the 5th to the last one for training, in random order and in any
    wording of the mode. Validation and test ask for the interaction that the split holds out for each, in wording 0.
    The test asks once in direct and once in reasoning mode, all direct rows first.

    Args:
        folder: A prepared data set with an index.
        seed: Draws, orders and words the RL rows; same seed, same bytes.
        mode: Mode of RL and validation prompts; ``direct`` ones go to ``<D>-rl-direct.parquet`` and
            ``<D>-val-direct.parquet``.
        history: Most items in a prompt, the most recent ones.
        rl_rows: RL rows, the latest of every user first; all when None.

    Returns:
        Rows by file, and the number of users without a test.
    """
    items = folder.read_items()
    sequences = folder.read_inter(items)
    index = folder.read_index(items)
    splits = folder.read_splits(sequences)
    validation = [Target(user, part.validation, mode) for user, part in splits.items() if part.validation is not None]
    tested = [(user, part.test) for user, part in splits.items() if part.test is not None]
    for name, held_out in (("val", validation), ("test", tested)):
        if not held_out:
            raise InputError(f"{folder.inter}: no user has an interaction for {name}; bring longer histories")
    test = [Target(user, position, each) for each in MODES for user, position in tested]
    targets = TrainingTargets(split.training for split in splits.values())
    if not len(targets):
        raise InputError(f"{folder.inter}: {NO_TARGET}")
    generator, users = np.random.default_rng(seed), list(sequences)
    drawn = targets.draw(rl_rows, generator)
    worded = generator.integers(len(TEMPLATES[mode]), size=len(drawn)).tolist()
    located = zip(*(part.tolist() for part in targets.locate(drawn)), worded, strict=True)
    training = [Target(users[user], position, mode, template) for user, position, template in located]

    def row(number: int, target: Target) -> dict[str, Any]:
        past, item = sequences[target.user][: target.position], sequences[target.user][target.position]
        template = TEMPLATES[target.mode][target.template]
        info = {"index": number, "user": target.user, "item": item, "title": items[item].title, "type": target.mode}
        return {
            "data_source": folder.name,
            "prompt": messages("".join(index.texts(past[-history:])), target.mode, template),
            "ability": "recommendation",
            "reward_model": {"style": "rule", "ground_truth": index.text(item)},
            "extra_info": {**info, "history": past},
        }

    schema = SCHEMA.with_metadata(origin_of(folder.inter, folder.split, folder.index))
    for path, wanted in ((folder.rl_of(mode), training), (folder.val_of(mode), validation), (folder.test, test)):
        rows = itertools.starmap(row, enumerate(wanted))
        with atomic_path(path) as temporary, pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
            while chunk := list(itertools.islice(rows, CHUNK)):
                writer.write_table(pa.Table.from_pylist(chunk, schema))
    return {
        "rows": {"rl": len(training), "val": len(validation), "test": len(test)},
        "users without a test": len(sequences) - len(tested),
    }
