"""A SFT config as LLaMA-Factory reads it: a YAML file, and keys that the command line overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_processing.sft.rows import read_rows
from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, require_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

READ_AS = {"formatting": "sharegpt", "columns": {"messages": "conversations", "system": "system"}}
"""What ``dataset_info.json`` says of each file of `gream data mix`, and nothing else."""


@dataclass(frozen=True)
class SftConfig:
    """The keys of a config.

    Attributes:
        path: The YAML file.
        keys: What it says, overrides included; names are LLaMA-Factory's.
        overrides: What the command line gave, ``key=value``.
    """

    path: Path
    keys: Mapping[str, Any]
    overrides: Sequence[str] = ()

    @classmethod
    def read(cls, path: Path, overrides: Sequence[str] = ()) -> SftConfig:
        """Read a config.

        Args:
            path: The YAML file.
            overrides: ``key=value``, as behind the file name in ``llamafactory-cli train``.

        Raises:
            InputError: When the file is missing or is not a mapping, or an override is not ``key=value``.
        """
        require_file(path, "choose one of sft_configs/")
        if wrong := [one for one in overrides if "=" not in one]:
            raise InputError(f"{wrong[0]!r}: expected key=value, such as max_steps=10")
        try:
            given = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
            keys = OmegaConf.to_container(given, resolve=True)
        except (OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}: cannot be read as a LLaMA-Factory config ({reason}); mend it") from error
        if not isinstance(keys, dict):
            raise InputError(f"{path}: expected `key: value` lines, as in sft_configs/")
        return cls(path, {str(key): value for key, value in keys.items()}, overrides)

    def text(self, key: str) -> str:
        """Return what ``key`` says.

        Raises:
            InputError: When it is missing.
        """
        if self.keys.get(key) in (None, ""):
            raise InputError(f"{self.path}: has no `{key}`; set it there or behind the file name, as {key}=VALUE")
        return str(self.keys[key])

    @property
    def model(self) -> Path:
        """Folder (or name) of the model that is trained."""
        return Path(self.text("model_name_or_path"))

    @property
    def output(self) -> Path:
        """Folder of the trained model."""
        return Path(self.text("output_dir"))

    @property
    def data_files(self) -> list[Path]:
        """The files of the config's data sets, in the order in which they are trained.

        Raises:
            InputError: When ``dataset_info.json`` does not name a data set, or would have it read otherwise than
                `gream data mix` has written it: without its system turns, or with rows drawn at random.
        """
        info = Path(self.text("dataset_dir")) / "dataset_info.json"
        known = read_json(info, "make the data with `gream data mix`")
        names = [name.strip() for name in self.text("dataset").split(",")]
        if not isinstance(known, dict) or not known.keys() >= set(names):
            raise InputError(
                f"{self.path}: dataset {self.text('dataset')!r} is not in {info}, which knows "
                f"{', '.join(known) or 'none'}; make it with `gream data mix` or name one of those"
            )
        files = []
        for name in names:
            file = known[name].get("file_name") if isinstance(known[name], dict) else None
            if not file or known[name] != {"file_name": file, **READ_AS}:
                raise InputError(
                    f"{info}: {name!r} must have a file_name, formatting sharegpt, the columns messages: conversations "
                    "and system: system, and nothing else, else system turns are dropped or rows drawn at random; make "
                    "it with `gream data mix`, and set `max_samples` in the config for fewer rows"
                )
            files.append(info.with_name(str(file)))
        return files

    def rows(self) -> pl.DataFrame:
        """Read the rows of all data sets, in the order in which they are trained: the columns of ``rows.Row``.

        Raises:
            InputError: When a file cannot be used, or ``max_samples`` is no number of rows.
        """
        most = self.keys.get("max_samples")
        if most is not None and not (isinstance(most, int) and most >= 1):
            raise InputError(f"`max_samples: {most}`: expected a whole number, at least 1; it takes the first rows")
        return pl.concat(read_rows(file).slice(0, most) for file in self.data_files)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer of the model that is trained.

        Raises:
            InputError: When that is not possible.
        """
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.model)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.model}: its tokenizer cannot be loaded ({error}); copy it from the base"
            ) from error
