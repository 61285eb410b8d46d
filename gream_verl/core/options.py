"""Options from a run's configuration; an error names the key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from omegaconf import OmegaConf
from pydantic import BaseModel, TypeAdapter, ValidationError

from gream_verl.core.errors import InputError
from gream_verl.core.files import require_file

Options = TypeVar("Options")
"""A pydantic model or a dataclass."""

UNKNOWN_KEY = ("extra_forbidden", "unexpected_keyword_argument")


def checked_options(model: type[Options], node: str, given: Mapping[str, Any] | None) -> Options:
    """Return the options in ``given``; an InputError for a wrong key begins with ``node``, its place."""
    try:
        return TypeAdapter(model).validate_python(_plain(given or {}))
    except ValidationError as error:
        # A key that is unknown is often the reason why another one is missing.
        first = min(error.errors(), key=lambda one: one["type"] not in UNKNOWN_KEY)
        key = ".".join([node, *map(str, first["loc"])])
        known = ", ".join(_known_keys(model, first["loc"][:-1]))
        raise InputError(f"{key}: {first['msg']}; known keys are {known}") from None


def file_options(model: type[Options], file: Path | None, line: Mapping[str, Any], command: str) -> Options:
    """Return the options of a command, from a YAML file and from the command line.

    Args:
        model: The options.
        file: YAML file with any of them, or None.
        line: Options of the command line, which win; None leaves that of the file.
        command: The command, for messages.
    """
    try:
        kept = yaml.safe_load(require_file(file, "write it, or leave out -c").read_text("utf-8")) if file else {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not valid YAML ({' '.join(str(error).split())}); correct it") from error
    if not isinstance(kept := kept or {}, dict):
        raise InputError(f"{file}: expected one option per line, such as `timeout: 60`")
    given = {name: value for name, value in line.items() if value is not None}
    return checked_options(model, str(file or command), {**kept, **given})


def _known_keys(model: type[Any], path: tuple[int | str, ...]) -> list[str]:
    """Return the keys of the innermost model on the way to ``path``."""
    for part in path:
        known = getattr(model, "model_fields", {})
        annotation = known[part].annotation if part in known else None
        inner = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
        model = next((kind for kind in inner if issubclass(kind, BaseModel)), model)
    return [field.name for field in fields(model)] if is_dataclass(model) else list(model.model_fields)


def _plain(value: Any) -> Any:
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value, resolve=True)
    return {key: _plain(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value
