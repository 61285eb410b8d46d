"""A SFT config as LLaMA-Factory reads it: a YAML file, and keys that the command line overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gream_verl.files import InputError, read_json, require_file


@dataclass(frozen=True)
class SftConfig:
    """The keys of a config.

    Attributes:
        path: The YAML file.
        keys: What it says, overrides included; names are LLaMA-Factory's.
    """

    path: Path
    keys: Mapping[str, Any]

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
            raise InputError(f"{path}: cannot be read as a LLaMA-Factory config ({error})") from error
        if not isinstance(keys, dict):
            raise InputError(f"{path}: expected `key: value` lines, as in sft_configs/")
        return cls(path, {str(key): value for key, value in keys.items()})

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
            InputError: When ``dataset_info.json`` does not name a data set.
        """
        folder = Path(self.text("dataset_dir"))
        known = read_json(folder / "dataset_info.json", "make the data with `gream data mix`")
        names = [name.strip() for name in self.text("dataset").split(",")]
        if unknown := [name for name in names if name not in known]:
            raise InputError(
                f"{self.path}: dataset {unknown[0]!r} is not in {folder}/dataset_info.json, which knows "
                f"{', '.join(known) or 'none'}; make it with `gream data mix` or name one of those"
            )
        return [folder / str(known[name].get("file_name", "")) for name in names]
