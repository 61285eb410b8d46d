"""The folder of a run: one data set, its models and its results."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.split import INTERACTIONS


class _Part:
    """The path of a part of a run."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: RunFolder, _: type[RunFolder]) -> Path:
        return run.root / self.name


@dataclass(frozen=True)
class RunFolder:
    """The files of a run.

    Attributes:
        root: The folder, such as ``runs/Beauty``.
        data: Files of the data set: in ``root/data``, or in ``root`` itself for published data in the authors' layout.
    """

    root: Path
    data: DataFolder

    model = _Part("model")
    """The base model with the semantic IDs in its vocabulary."""
    sft = _Part("sft")
    """The SFT checkpoint."""
    srpo = _Part("srpo")
    """The SRPO checkpoints."""
    evaluation = _Part("evaluation")
    """Results of `gream evaluate` and of baselines."""
    report = _Part("report.html")
    """The report, as a page."""

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
        if dataset is None:
            if not found:
                raise InputError(f"{folder}: holds no data set (*{INTERACTIONS}); run `gream data prepare {root}`")
            if len(found) > 1:
                raise InputError(f"{folder}: holds several data sets; choose one with --dataset: {', '.join(found)}")
            dataset = found[0]
        elif dataset not in found:
            raise InputError(f"{folder}: holds no data set {dataset!r}; it holds {', '.join(found) or 'none'}")
        return cls(root, DataFolder(folder, dataset))

    @classmethod
    def create(cls, root: str | os.PathLike[str], dataset: str | None = None) -> RunFolder:
        """Return the folder of a run before its data set is prepared.

        Args:
            root: The folder.
            dataset: Name of the data set; None for the name of the folder.

        Raises:
            InputError: When the name cannot be used.
        """
        root = Path(root)
        return cls(root, DataFolder(root / "data", dataset or root.resolve().name))
