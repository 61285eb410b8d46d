"""What the files of a checkpoint say of its model, without loading a weight."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data_processing.sft.config import SftConfig
from gream_verl.core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Model:
    """What a checkpoint's files say of a model.

    Attributes:
        folder: The checkpoint.
        tokenizer: Its tokenizer, as SRPO and the evaluation load it.
        rows: Rows of the input embedding.
        parameters: How many there are in all weight files.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    rows: int
    parameters: int

    @classmethod
    def read(cls, config: SftConfig) -> Model:
        """Read the tokenizer and the heads of the weight files of the model that a config trains.

        Raises:
            InputError: When the folder is no complete checkpoint in safetensors.
        """
        shapes = tensor_shapes(config.model, "make the model with `gream model extend` or `gream model tiny`")
        rows = [shape[0] for name, shape in shapes.items() if name.endswith("embed_tokens.weight")]
        if not rows:
            raise InputError(
                f"{config.model}: no weights of an input embedding; make the model anew with `gream model extend`"
            )
        return cls(config.model, config.tokenizer(), rows[0], sum(map(math.prod, shapes.values())))


def tensor_shapes(folder: Path, remedy: str) -> dict[str, list[int]]:
    """Return the shape of every tensor in the ``.safetensors`` files of a folder, from their heads.

    Raises:
        InputError: When there is no such file, or one is shorter than its head says; the message ends in ``remedy``.
    """
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                head = json.loads(file.read(size)) if size < path.stat().st_size else {}
        except (struct.error, ValueError) as error:
            raise InputError(f"{path}: not a safetensors file ({error}); {remedy}") from error
        head.pop("__metadata__", None)
        if 8 + size + max((tensor["data_offsets"][1] for tensor in head.values()), default=0) != path.stat().st_size:
            raise InputError(f"{path}: is cut off; {remedy}")
        shapes |= {name: tensor["shape"] for name, tensor in head.items()}
    if not shapes:
        raise InputError(f"{folder}: no weights there (*.safetensors); {remedy}")
    return shapes
