"""The interactions of every user, and their split into training, validation and test.

Leave-one-out holds out the last two interactions of every user, as the authors do. A temporal split holds out the
interactions after two moments that are the same for all users, so that training knows nothing of the time of the test:
the validation of a user is the first interaction after the first moment, the test the first after the second (Ji et
al., "A Critical Study on Data Leakage in Recommender System Offline Evaluation", 2023).
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json

HELD_OUT = 2
"""Interactions at the end of every user that leave-one-out keeps from training: validation, then test."""
INTERACTIONS = ".inter.json"
SPLIT = ".split.json"
REMEDY = "make it with `gream data prepare`"


class UserSplit(NamedTuple):
    """Split of the interactions of one user, in time order.

    Attributes:
        training: Number of interactions, the first ones, that training may see.
        validation: Position of the interaction for validation, None without one.
        test: Position of the interaction for the test, None without one.
    """

    training: int
    validation: int | None
    test: int | None


def leave_one_out(length: int) -> UserSplit:
    """Return the split of a user with ``length`` interactions: the last is the test, the one before it validation.

    >>> leave_one_out(5), leave_one_out(2)
    (UserSplit(training=3, validation=3, test=4), UserSplit(training=0, validation=None, test=None))
    """
    if length <= HELD_OUT:
        return UserSplit(0, None, None)
    return UserSplit(length - HELD_OUT, length - HELD_OUT, length - HELD_OUT + 1)


def by_time(times: Sequence[int], validation_from: int, test_from: int) -> UserSplit:
    """Return the split of a user with interactions at these rising times.

    Validation and test begin at the two moments. An interaction without an earlier one cannot be predicted.

    >>> by_time([1, 2, 5, 6, 9], 5, 8)
    UserSplit(training=2, validation=2, test=4)
    """
    training, tested = bisect_left(times, validation_from), bisect_left(times, test_from)
    validation = training if 0 < training < tested else None
    return UserSplit(training, validation, tested if 0 < tested < len(times) else None)


def read_interactions(path: str | os.PathLike[str], remedy: str = REMEDY) -> dict[str, list[str]]:
    """Read ``<D>.inter.json``: the items of every user, in time order.

    Ids of items that are written as numbers, as in LC-Rec, become text. An InputError ends in ``remedy``.
    """
    raw = read_json(path, remedy)
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected {{user: [item, ...]}}; {remedy}")
    for user, items in raw.items():
        if not isinstance(items, list) or not all(isinstance(item, str | int) for item in items):
            raise InputError(f"{path}: user {user!r}: no list of ids, expected {{user: [item, ...]}}; {remedy}")
    return {user: list(map(str, items)) for user, items in raw.items()}


def read_splits(interactions: str | os.PathLike[str], sequences: Mapping[str, Sequence[Any]]) -> dict[str, UserSplit]:
    """Return the split of every user: that of ``<D>.split.json`` next to ``<D>.inter.json``, else leave-one-out.

    Args:
        interactions: ``<D>.inter.json``.
        sequences: Its content.
    """
    path = Path(str(interactions).removesuffix(INTERACTIONS) + SPLIT)
    if not path.is_file():
        return {user: leave_one_out(len(sequence)) for user, sequence in sequences.items()}
    raw = read_json(path)
    users = raw.get("users") if isinstance(raw, dict) else None
    if not isinstance(users, dict):
        raise InputError(f"{path}: expected {{users: {{user: [training, validation, test]}}}}; {REMEDY}")
    if users.keys() != sequences.keys():
        raise InputError(f"{path}: its users are not those of {interactions}; {REMEDY}")
    return {user: _user_split(path, user, users[user], len(sequence)) for user, sequence in sequences.items()}


def training_parts(
    interactions: str | os.PathLike[str], sequences: Mapping[str, Sequence[Any]]
) -> dict[str, Sequence[Any]]:
    """Return the interactions of every user that training may see; see :func:`read_splits`."""
    splits = read_splits(interactions, sequences)
    return {user: sequence[: splits[user].training] for user, sequence in sequences.items()}


def _user_split(path: Path, user: str, value: Any, length: int) -> UserSplit:
    label = f"{path}: user {user!r}"
    if not isinstance(value, list) or len(value) != 3 or not all(type(part) in (int, type(None)) for part in value):
        raise InputError(f"{label}: expected [training, validation or null, test or null]; {REMEDY}")
    split = UserSplit(*value)
    held_out = [position for position in split[1:] if position is not None]
    in_order = held_out == sorted(set(held_out)) and all(0 < position < length for position in held_out)
    if split.training is None or not 0 <= split.training <= min([length, *held_out]) or not in_order:
        raise InputError(f"{label}: {value} is no split of {length} interactions; {REMEDY}")
    return split
