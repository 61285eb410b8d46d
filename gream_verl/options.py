"""Options out of a run's configuration; a wrong one ends in a sentence that names its key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from omegaconf import OmegaConf
from pydantic import BaseModel, ValidationError

from gream_verl.files import InputError

Options = TypeVar("Options", bound=BaseModel)


def checked_options(model: type[Options], node: str, given: Mapping[str, Any] | None) -> Options:
    """Return the options that a node of the configuration holds.

    Args:
        model: What may stand there; should forbid other keys.
        node: Full name of the node, for messages.
        given: The node itself, None for an empty one.

    Raises:
        InputError: When a key is missing, unknown or has a wrong value; the message names it.
    """
    try:
        return model.model_validate(_plain(given or {}))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join([node, *map(str, first["loc"])])
        known = ", ".join(model.model_fields)
        raise InputError(f"{key}: {first['msg']}; known keys are {known}") from None


def _plain(value: Any) -> Any:
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value
