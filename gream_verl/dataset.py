"""verl's dataset, which refuses data that the model cannot answer (``data.custom_cls.name=SemanticIdDataset``)."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow.parquet as pq
from verl.utils.dataset.rl_dataset import RLHFDataset

from gream_verl.files import InputError
from gream_verl.semantic_ids import ItemIndex, SemanticId, parse_sid
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
        for place, truth in _ground_truths(self.data_files):
            if index is not None and truth not in index.items:
                raise InputError(
                    f"{place}: {''.join(truth)} is no item of {index.source}; build the parquet files from this index"
                )
            text.check(truth, place)
        super()._read_files_and_tokenize()


def _ground_truths(files: list[str]) -> Iterator[tuple[str, SemanticId]]:
    """Yield where each ground truth stands, and its SID."""
    for file in files:
        try:
            column = pq.read_table(file, columns=["reward_model"])["reward_model"].to_pylist()
        except (OSError, KeyError, ValueError) as error:
            raise InputError(
                f"{file}: cannot be read as verl parquet ({error}); make it with `gream data rl`"
            ) from error
        for row, reward_model in enumerate(column):
            text = (reward_model or {}).get("ground_truth")
            truth = parse_sid(text) if isinstance(text, str) else None
            if truth is None:
                raise InputError(
                    f"{file}: row {row}: reward_model.ground_truth is {text!r}; expected a SID such as "
                    "'<|a_1|><|b_7|>'; make the file with `gream data rl`"
                )
            yield f"{file}: row {row}", truth
