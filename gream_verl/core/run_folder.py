"""The folder of a run: one data set, its models and its results."""

from __future__ import annotations

import os
import re
from pathlib import Path

from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.split import INTERACTIONS


class RunFolder:
    """The files of a run. Each attribute is a path; the file need not exist.

    Args:
        root: The folder, such as ``runs/Beauty``.
        data: Files of the data set: in ``root/data``, or in ``root`` itself for published data in the authors' layout.
    """

    def __init__(self, root: Path, data: DataFolder) -> None:
        self.root, self.data = root, data
        self.model = root / "model"  # the base model with the semantic IDs in its vocabulary
        self.sft = root / "sft"  # the SFT checkpoint
        self.srpo = root / "srpo"  # the SRPO checkpoints
        self.evaluation = root / "evaluation"  # results of `gream evaluate` and of baselines
        self.report = root / "report.html"

    @property
    def trained(self) -> Path:
        """The checkpoint of the last stage that has one: SRPO's, else that of SFT."""
        return self.srpo if list(self.srpo.glob("global_step_*")) else self.sft

    @classmethod
    def open(cls, root: str | os.PathLike[str], dataset: str | None = None) -> RunFolder:
        """Open a run with a prepared data set.

        Args:
            root: The folder.
            dataset: Name of the data set; needed only where the folder holds several.

        Raises:
            InputError: When the folder holds no data set, or several and none is named.
        """
        root = Path(root)
        folder = root / "data" if (root / "data").is_dir() else root
        found = sorted(path.name.removesuffix(INTERACTIONS) for path in folder.glob(f"*{INTERACTIONS}"))
        if not found:
            raise InputError(f"{folder}: holds no data set (*{INTERACTIONS}); run `gream data prepare {root}`")
        if dataset is None and len(found) > 1:
            raise InputError(f"{folder}: holds several data sets; choose one with --dataset: {', '.join(found)}")
        if dataset is not None and dataset not in found:
            raise InputError(f"{folder}: holds no data set {dataset!r}; it holds {', '.join(found)}")
        return cls(root, DataFolder(folder, dataset or found[0]))

    @classmethod
    def create(cls, root: str | os.PathLike[str], dataset: str | None = None) -> RunFolder:
        """Return the folder of a run before its data set is prepared.

        Args:
            root: The folder.
            dataset: Name of the data set; None for the name of the folder.
        """
        root, name = Path(root), dataset or Path(root).resolve().name
        if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
            raise InputError(
                f"data set name {name!r}: a recipe could not take it; choose letters, digits, '.', '_', '-'"
            )
        return cls(root, DataFolder(root / "data", name))
