"""What validation and test hold out is in no row: whole mixes, every task, every row."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pyarrow.parquet as pq
import pytest
from small_data import make_data

from data_processing.sft.mix import MixOptions, write_mix
from data_processing.sft.tasks import CONTINUATION, ITEM_TASKS, REASONING, TASKS, WINDOW
from gream_verl.core.data_folder import DataFolder, short_title

SIDS = re.compile(r"(?:<\|[a-z]_\d+\|>)+")
EVERYTHING = dict.fromkeys(TASKS, 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    folder = make_data(tmp_path_factory.mktemp("data"), users=24)
    report = write_mix(folder, MixOptions(EVERYTHING, history=8))
    assert all(counts["made"] == counts["exist"] > 0 for counts in report.values())
    assert len(list(rows(folder))) == sum(counts["made"] for counts in report.values())
    return folder


def rows(folder: DataFolder) -> Iterator[tuple[str, str, str]]:
    """Yield task, question and answer of every row of the file."""
    for batch in pq.ParquetFile(folder.mix).iter_batches():
        turns = batch["conversations"].flatten().field("value").to_pylist()
        yield from zip(batch["task"].to_pylist(), turns[::2], turns[1::2], strict=True)


def test_items_that_only_validation_and_test_hold_are_in_no_row_about_users(folder: DataFolder) -> None:
    items = folder.read_items()
    index, sequences = folder.read_index(items), folder.read_inter(items)
    held_out = {item for sequence in sequences.values() for item in sequence[-2:]}
    assert not held_out & {item for sequence in sequences.values() for item in sequence[:-2]}
    forbidden = [text.casefold() for item in held_out for text in (index.text(item), items[item].title)]
    for task, question, answer in rows(folder):
        if task not in ITEM_TASKS:
            text = f"{question} {answer}".casefold()
            assert not [word for word in forbidden if word in text]


def test_every_history_and_target_is_part_of_a_training_part(folder: DataFolder) -> None:
    items = folder.read_items()
    index = folder.read_index(items)
    pieces: list[str] = []
    windows: set[str] = set()
    titles: set[str] = set()
    for sequence in folder.read_inter(items).values():
        part = sequence[:-2]
        pieces.append("".join(index.texts(part)))
        sids, names = index.texts(part), [short_title(items[item].title) for item in part]
        for end in range(1, len(part) + 1):
            windows.update("".join(sids[start:end]) for start in range(max(end - 9, 0), end))
            titles.update("; ".join(names[start:end]) for start in range(max(end - 9, 0), end))
    for task, question, answer in rows(folder):
        if task in ITEM_TASKS:
            continue
        runs = SIDS.findall(question)
        assert windows.issuperset(runs)
        if task == CONTINUATION:
            assert any(runs[0] + answer in piece for piece in pieces)
        elif task in ("seqrec", WINDOW, REASONING):
            assert runs[0] + SIDS.findall(answer)[-1] in windows
        elif task == "historyreconstruction":
            assert answer in (titles if runs else windows)
