"""Which interactions of a user are for training, which one for validation and which one for test.

Leave-one-out holds out the last two of every user, as the authors do. A temporal split holds out what comes after two
moments that are the same for all users, so that training knows nothing of the time it is tested on: the validation of
a user is the first interaction after the first moment, the test the first after the second (Ji et al., "A Critical
Study on Data Leakage in Recommender System Offline Evaluation", 2023).
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
REMEDY = "prepare the data set anew with `gream data prepare`"


class UserSplit(NamedTuple):
    """How the interactions of one user, in time order, are split.

    Attributes:
        training: Number of interactions, the first ones, that training may see.
        validation: Position of the interaction to validate on, None for no such one.
        test: Position of the interaction to test on, likewise.
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
    """Return the split of a user by two moments.

    An interaction is held out from its moment on; one with nothing before it cannot be predicted.

    Args:
        times: Times of the user's interactions, rising.
        validation_from: First moment of validation.
        test_from: First moment of the test, not before that.

    >>> by_time([1, 2, 5, 6, 9], 5, 8)
    UserSplit(training=2, validation=2, test=4)
    """
    training, tested = bisect_left(times, validation_from), bisect_left(times, test_from)
    validation = training if 0 < training < tested else None
    return UserSplit(training, validation, tested if 0 < tested < len(times) else None)


def split_file(interactions: str | os.PathLike[str]) -> Path:
    """Return the file with the split of ``<D>.inter.json``: ``<D>.split.json`` beside it."""
    path = Path(interactions)
    return path.with_name(path.name.removesuffix(INTERACTIONS) + SPLIT)


def read_interactions(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Read ``<D>.inter.json``: the items of every user, in time order.

    Ids of items that are written as numbers, as LC-Rec does, become text.

    Raises:
        InputError: When the file is missing or malformed.
    """
    raw = read_json(path, "make it with `gream data prepare`")
    if not isinstance(raw, dict) or not all(isinstance(items, list) for items in raw.values()):
        raise InputError(f"{path}: expected {{user: [item, ...]}}; make it with `gream data prepare`")
    return {user: list(map(str, items)) for user, items in raw.items()}


def read_splits(interactions: str | os.PathLike[str], sequences: Mapping[str, Sequence[Any]]) -> dict[str, UserSplit]:
    """Return the split of every user: that of ``<D>.split.json``, or leave-one-out where there is no such file.

    Args:
        interactions: ``<D>.inter.json``.
        sequences: What it holds.

    Raises:
        InputError: When the split is malformed, or of other interactions.
    """
    path = split_file(interactions)
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
    """Return what training may see of every user; see :func:`read_splits`."""
    splits = read_splits(interactions, sequences)
    return {user: sequence[: splits[user].training] for user, sequence in sequences.items()}


def _user_split(path: Path, user: str, value: Any, length: int) -> UserSplit:
    place = f"{path}: user {user!r}"
    if not isinstance(value, list) or len(value) != 3 or not all(type(part) in (int, type(None)) for part in value):
        raise InputError(f"{place}: expected [training, validation or null, test or null]; {REMEDY}")
    split = UserSplit(*value)
    held_out = [position for position in split[1:] if position is not None]
    ordered = held_out == sorted(set(held_out)) and all(0 < position < length for position in held_out)
    if split.training is None or not 0 <= split.training <= min([length, *held_out]) or not ordered:
        raise InputError(f"{place}: {value} is no split of {length} interactions; {REMEDY}")
    return split
