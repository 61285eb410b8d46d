"""verl's dataset, which refuses data that the model cannot answer (``data.custom_cls.name=SemanticIdDataset``)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq
from verl.utils.dataset.rl_dataset import RLHFDataset

from gream_verl.files import InputError
from gream_verl.semantic_ids import ItemIndex
from gream_verl.token_text import TokenText


class SemanticIdDataset(RLHFDataset):
    """Checks every ground truth before training starts.

    Each must be a well-formed SID, every token of it one token of the tokenizer, and, where ``data.index_file`` names
    an item index, an item of it.

    Raises:
        InputError: Naming file, row and token.
    """

    def _read_files_and_tokenize(self) -> None:
        index_file = self.config.get("index_file")
        index = ItemIndex.load(index_file) if index_file else None
        text = TokenText(self.tokenizer)
        for place, reward_model in _reward_models(self.data_files):
            truth = text.ground_truth(reward_model, place)
            if index is not None and truth not in index.items:
                raise InputError(
                    f"{place}: {''.join(truth)} is no item of {index.source}; build the parquet files from this index"
                )
        super()._read_files_and_tokenize()


def _reward_models(files: list[str]) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield where each row stands, and its column ``reward_model``."""
    for file in files:
        try:
            column = pq.read_table(file, columns=["reward_model"])["reward_model"].to_pylist()
        except (OSError, KeyError, ValueError) as error:
            raise InputError(
                f"{file}: cannot be read as verl parquet ({error}); make it with `gream data rl`"
            ) from error
        for row, reward_model in enumerate(column):
            yield f"{file}: row {row}", reward_model
