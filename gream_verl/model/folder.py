"""Model folders: loaded whole or refused, written whole or not at all, never in the place of anything a user may miss.

One rule says what the commands of ``gream model`` may write to. A folder that is new or empty is written. One that
holds something is replaced only when the same command wrote it, every file in it is byte for byte as written, nothing
was added, and the user asked for it. An input, or the folder one stands in, never is.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from gream_verl.core.errors import InputError
from gream_verl.core.files import hold, read_json, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MANIFEST = ".gream.json"
"""In a folder: the command that wrote it, and the SHA-256 of each of its files."""
GENERATION = "generation_config.json"
NAMED = 5
"""Changed files that a refusal names."""


@contextmanager
def reading(source: str | Path) -> Iterator[None]:
    """Turn what the loaders of transformers and peft raise over unusable files into one sentence.

    Raises:
        InputError: When the block raises one of those.
    """
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{source}: cannot be loaded ({type(error).__name__}: {reason}); check the path, or make or fetch it anew"
        ) from error


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model, a name or a folder.

    Raises:
        InputError: When there is none.
    """
    from transformers import AutoTokenizer

    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise InputError(f"{source}: no config.json; not a model folder")
    with reading(source):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source)
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # what transformers makes where there is no file of one
        raise InputError(f"{source}: holds no tokenizer; copy the files of its tokenizer there")
    return tokenizer


def load_model(source: str | Path) -> PreTrainedModel:
    """Return a causal language model, a name or a folder, in its own number format.

    Raises:
        InputError: When it cannot be loaded or weights are missing, which transformers would draw at random.
    """
    from transformers import AutoModelForCausalLM

    with reading(source):
        model, info = AutoModelForCausalLM.from_pretrained(source, dtype="auto", output_loading_info=True)
    if missing := sorted(info["missing_keys"]):
        raise InputError(
            f"{source}: {len(missing)} weights are missing, {missing[0]} among them; fetch or make the model anew"
        )
    return model


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, source: str | Path | None = None
) -> None:
    """Save a model and its tokenizer.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        folder: Where to.
        source: What the model was made from, a name or a folder: its generation config is kept byte for byte, also
            where transformers would refuse to write it.
    """
    from transformers import GenerationConfig
    from transformers.utils import cached_file
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    kept = None
    if source is not None:
        kept = cached_file(
            source,
            GENERATION,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    if kept:
        model.generation_config = GenerationConfig()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if kept:
        shutil.copyfile(kept, folder / GENERATION)


def check_output(output: Path, command: str, inputs: Iterable[str | Path] = (), *, replace: bool) -> None:
    """Make sure that ``command`` may write to the folder ``output``, by the rule of the module.

    Args:
        output: The folder, resolved.
        command: Name of the command.
        inputs: What the command reads.
        replace: Whether the user asked to replace what the same command wrote.

    Raises:
        InputError: When it may not.
    """
    if output == Path.cwd() or output in [Path(path).resolve() for path in inputs]:
        raise InputError(f"{output}: is an input of this command or the current folder; choose another folder")
    if output.exists() and not output.is_dir():
        raise InputError(f"{output}: is a file; choose another folder")
    if not output.exists() or not any(output.iterdir()):
        return
    manifest = read_json(output / MANIFEST) if (output / MANIFEST).is_file() else None
    if not isinstance(manifest, dict) or manifest.get("command") != command:
        raise InputError(
            f"{output}: exists, and `gream model {command}` did not write it; delete it or choose another folder"
        )
    written, there = manifest["files"], _hashes(output)
    if changed := sorted(name for name in written | there if written.get(name) != there.get(name)):
        names = ", ".join(changed[:NAMED]) + (", ..." if len(changed) > NAMED else "")
        raise InputError(
            f"{output}: changed since `gream model {command}` wrote it ({names}); delete it or choose another folder"
        )
    if not replace:
        raise InputError(f"{output}: exists; replace it with --overwrite, or choose another folder")


def _hashes(folder: Path) -> dict[str, str]:
    from gream_verl.core.files import fingerprint

    paths = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    return {path.name: fingerprint(path) if path.is_file() else "no file" for path in paths}


@contextmanager
def new_folder(output: Path, command: str, inputs: Iterable[str | Path] = (), *, replace: bool) -> Iterator[Path]:
    """Yield an empty folder that takes the place of ``output`` when the block ends without an error.

    Long work belongs into the block: ``output`` is checked before it, and once more behind it.

    Args:
        output: The folder.
        command: Name of the command.
        inputs: What the command reads.
        replace: Whether the user asked to replace what the same command wrote.

    Raises:
        InputError: When ``output`` may not be written, see :func:`check_output`, or cannot be.
    """
    from safetensors import SafetensorError

    output = output.resolve()
    work = output.with_name(f".{output.name}.new")
    new, previous = work / "new", work / "previous"

    def clear() -> None:
        """Bring back what was moved away, and remove what was begun: by this call, or by one that was killed."""
        if previous.exists() and not output.exists():
            previous.rename(output)
        for leftover in (new, previous):
            shutil.rmtree(leftover, ignore_errors=True)

    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work, os.O_RDONLY)
        try:
            hold(lock, f"{output}: is written by another process; wait for it, or choose another folder")
            clear()
            try:
                check_output(output, command, inputs, replace=replace)
                new.mkdir()
                yield new
                write_json(new / MANIFEST, {"command": command, "files": _hashes(new)}, indent=1)
                check_output(output, command, inputs, replace=replace)
                if output.exists():
                    output.rename(previous)
                new.rename(output)
            finally:
                clear()
                with suppress(OSError):
                    work.rmdir()
        finally:
            os.close(lock)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InputError(f"{output}: cannot be written ({reason}); free some space or choose another folder") from error
