"""Options from a run's configuration; an error names the key."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from omegaconf import OmegaConf
from pydantic import BaseModel, ValidationError

from gream_verl.core.errors import InputError

Options = TypeVar("Options", bound=BaseModel)


def checked_options(model: type[Options], node: str, given: Mapping[str, Any] | None) -> Options:
    """Return the options that a node of the configuration holds: ``given``, whose full name is ``node``.

    Raises:
        InputError: When a key is missing, unknown or has a wrong value; the message names it.
    """
    try:
        return model.model_validate(_plain(given or {}))
    except ValidationError as error:
        # A key that is unknown is often the reason why another one is missing.
        first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        known = _known_keys(model, first["loc"][:-1])
        raise InputError(
            f"{'.'.join([node, *map(str, first['loc'])])}: {first['msg']}; known keys are {', '.join(known)}"
        ) from None


def _known_keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Return the keys of the innermost model on the way to ``path``."""
    for part in path:
        annotation = model.model_fields[str(part)].annotation if part in model.model_fields else None
        inner = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        model = next((kind for kind in inner if issubclass(kind, BaseModel)), model)
    return list(model.model_fields)


def _plain(value: Any) -> Any:
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value
