"""Schemas and readers of the files that a teacher writes for a data set."""

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
"""Keys of :attr:`DataFolder.user_texts`; LC-Rec's layout lacks the last, the item that a user's searches are for."""
CHAINS = pa.schema(
    {"user": pa.string(), "position": pa.int64(), "item": pa.string(), "history": pa.int64()}
    | dict.fromkeys(("evidence", "preference", "intent"), pa.string())
    | {"keep": pa.list_(pa.string())}
)
"""A chain of thought: position (from 0) and item of its target, length of its history in items, its three texts and the
items of its denoised history."""


def read_user_texts(
    folder: DataFolder, training: Mapping[str, Sequence[str]]
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return the preferences of users, and their searches for their last training item; two empty ones without a file.

    ``training`` is the result of ``folder.read_training``; a file that was written for another one is refused.
    """
    raw = read_json(folder.user_texts) if folder.user_texts.is_file() else {}
    if not isinstance(raw, dict) or USER_TEXTS not in raw:  # a data set may have another file of that name
        return {}, {}
    remedy = "write it again with `gream data enrich RUN users`, or remove it"
    try:
        texts = raw[USER_TEXTS], raw.get(SEARCHES, {}).get("train", {})
        preferences, queries = ({user: _texts(value) for user, value in part.items()} for part in texts)
        searched = list(raw.get(SEARCHED, {}).items())
    except (AttributeError, TypeError) as error:
        form = f"{{{USER_TEXTS!r}: {{user: [text, ...]}}, {SEARCHES!r}: {{'train': {{user: [text, ...]}}}}}}"
        raise InputError(f"{folder.user_texts}: expected {form}; {remedy}") from error
    for user, item in searched:
        if list(training.get(user, ()))[-1:] != [item]:
            raise InputError(
                f"{folder.user_texts}: user {user!r}: was written when the last training item was {item!r}; {remedy}"
            )
    return preferences, queries


def read_chains(
    folder: DataFolder, training: Mapping[str, Sequence[str]], index: ItemIndex, history: int
) -> dict[tuple[str, int], list[str]]:
    """Return the responses in ``folder.chains`` by user and position of the target; none without a file.

    Args:
        folder: The data set.
        training: Result of ``folder.read_training``.
        index: Semantic IDs of the items.
        history: Longest history of a prompt, in items. A chain fits only the history that it was written for.
    """
    if not folder.chains.is_file():
        return {}
    remedy = "write it again with `gream data enrich RUN chains`"
    chains: dict[tuple[str, int], list[str]] = {}
    try:
        file = pq.ParquetFile(folder.chains)
        for row in (row for batch in file.iter_batches(columns=CHAINS.names) for row in batch.to_pylist()):
            user, position, items = row["user"], row["position"], training.get(row["user"], ())
            label = f"{folder.chains}: the chain of user {user!r} at {position}"
            if position >= len(items) or items[position] != row["item"]:
                raise InputError(f"{label}: is about another item, {row['item']!r}; {remedy}")
            if row["history"] != (shown := min(position, history)):
                raise InputError(f"{label}: has a history of {row['history']} items, not {shown}; use that --history")
            thought = f"<think>{row['evidence']} {row['preference']} {row['intent']}</think>"
            kept = "".join(index.texts(row["keep"]))
            response = f"{thought}{kept}<answer>{index.text(row['item'])}</answer>"
            chains.setdefault((user, position), []).append(response)
    except (pa.ArrowException, KeyError) as error:
        raise InputError(f"{folder.chains}: not a file of chains ({str(error).splitlines()[0]}); {remedy}") from error
    return chains


def _texts(value: Any) -> list[str]:
    """Return the texts of a list, or of one text."""
    return [text for part in (value if isinstance(value, list) else [value]) if (text := item_text(part))]
