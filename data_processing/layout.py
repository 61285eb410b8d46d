"""What a teacher writes for a data set: the schemas of its files, and their readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gream_verl.core.data_folder import DataFolder, item_text
from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json
from gream_verl.core.semantic_ids import ItemIndex

USER_TEXTS = "user_explicit_preference"
SEARCHES = "user_vague_intention"
SEARCHED = "searched_item"
"""Keys of :attr:`DataFolder.user_texts`; the last is ours, and says which item the searches of a user are for."""
CHAINS = pa.schema(
    [
        ("user", pa.string()),
        ("position", pa.int64()),
        ("item", pa.string()),
        ("history", pa.int64()),
        ("evidence", pa.string()),
        ("preference", pa.string()),
        ("intent", pa.string()),
        ("keep", pa.list_(pa.string())),
    ]
)
"""A chain of thought: the position (from 0) and item of its target, the length of its history, its three texts and the
items of its denoised history."""


def read_user_texts(
    folder: DataFolder, training: Mapping[str, Sequence[str]]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the preferences of users, and their searches for their last training item; nothing without a file.

    Args:
        folder: The data set.
        training: What ``folder.read_training`` gave.

    Raises:
        InputError: When ``folder.user_texts`` is malformed, or was written for other training parts.
    """
    raw = read_json(folder.user_texts) if folder.user_texts.is_file() else {}
    if not isinstance(raw, dict) or USER_TEXTS not in raw:  # a data set may have another file of that name
        return {}, {}
    try:
        texts = raw[USER_TEXTS], raw.get(SEARCHES, {}).get("train", {})
        preferences, queries = ({user: _texts(value) for user, value in part.items()} for part in texts)
        for user, item in raw.get(SEARCHED, {}).items():
            if list(training.get(user, ()))[-1:] != [item]:
                raise InputError(
                    f"{folder.user_texts}: user {user!r}: was written when the last item for training was {item!r}; "
                    "write it anew with `gream data enrich users`, or remove it"
                )
    except (AttributeError, TypeError) as error:
        raise InputError(
            f"{folder.user_texts}: expected {{{USER_TEXTS!r}: {{user: [text, ...]}}, {SEARCHES!r}: "
            "{'train': {user: [text, ...]}}; write it anew with `gream data enrich users`"
        ) from error
    return preferences, queries


def read_chains(
    folder: DataFolder, training: Mapping[str, Sequence[str]], index: ItemIndex, history: int
) -> dict[tuple[str, int], str]:
    """Return the responses in ``folder.chains`` by user and position of the target; nothing without a file.

    Args:
        folder: The data set.
        training: What ``folder.read_training`` gave.
        index: Semantic IDs of the items.
        history: Longest history of a prompt, in items: a chain speaks of the history that it was written for.

    Raises:
        InputError: When the file is malformed, or was written for other training parts or another history.
    """
    if not folder.chains.is_file():
        return {}
    remedy = "write it anew with `gream data enrich chains`"
    chains = {}
    try:
        file = pq.ParquetFile(folder.chains)
        rows = (row for batch in file.iter_batches(columns=CHAINS.names) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            user, position = row["user"], row["position"]
            taken = training.get(user, ())
            if position >= len(taken) or taken[position] != row["item"]:
                raise InputError(
                    f"{folder.chains}: row {number}: user {user!r} has no item {row['item']!r} at {position} for "
                    f"training; {remedy}"
                )
            if row["history"] != min(position, history):
                raise InputError(
                    f"{folder.chains}: row {number}: was written for {row['history']} items, not for "
                    f"{min(position, history)}; use the --history it was written with, or {remedy}"
                )
            chains[user, position] = (
                f"<think>{row['evidence']} {row['preference']} {row['intent']}</think>"
                f"{''.join(index.texts(row['keep']))}<answer>{index.text(row['item'])}</answer>"
            )
    except (pa.ArrowException, KeyError) as error:
        raise InputError(f"{folder.chains}: not a file of chains ({str(error).splitlines()[0]}); {remedy}") from error
    return chains


def _texts(value: Any) -> list[str]:
    """Return the texts of a list, or of one text."""
    return [text for part in (value if isinstance(value, list) else [value]) if (text := item_text(part))]
