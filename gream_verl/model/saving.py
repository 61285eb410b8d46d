"""Saving of model folders: whole or not at all, never over an input or over anything another command wrote."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gream_verl.core.errors import InputError

MARKER = ".gream"
"""In a folder: the name of the command that wrote it."""


@contextmanager
def new_folder(output: Path, command: str, inputs: Iterable[str | Path] = (), *, replace: bool) -> Iterator[Path]:
    """Yield an empty folder that becomes ``output`` when the block ends without an error.

    ``output`` may be none of ``inputs`` and may not hold files, except with ``replace`` those of the same ``command``.
    """
    from safetensors import SafetensorError

    output, marker = output.resolve(), output.resolve() / MARKER
    if output == Path.cwd() or output in [Path(path).resolve() for path in inputs]:
        raise InputError(f"{output}: is an input of this command or the current folder; choose another folder")
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        if not marker.is_file() or marker.read_text(encoding="utf-8") != command:
            raise InputError(f"{output}: exists, and `gream model {command}` did not write it; move it away")
        if not replace:
            raise InputError(f"{output}: exists; replace it with --overwrite")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as work:
            new = Path(work, "new")
            new.mkdir()
            yield new
            (new / MARKER).write_text(command, encoding="utf-8")
            if output.exists():
                output.rename(Path(work, "old"))
            new.rename(output)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{output}: cannot be written ({error}); free some space or choose another folder") from error


def save_model(model: Any, tokenizer: Any, folder: Path, base: str | Path | None = None) -> None:
    """Save a model and its tokenizer; copy the generation config of ``base``, which transformers may refuse to save."""
    from transformers import GenerationConfig
    from transformers.utils import cached_file

    name = "generation_config.json"
    kept = base and cached_file(base, name, _raise_exceptions_for_missing_entries=False)
    if kept:
        model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if kept:
        shutil.copyfile(kept, folder / name)
