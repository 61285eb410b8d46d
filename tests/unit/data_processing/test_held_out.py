"""What validation and test hold out is in no row: whole mixes, every task, every row."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from small_data import make_data

from data_processing.sft.mix import write_mix
from data_processing.sft.rules import short_title
from data_processing.sft.tasks import REASONING, TASKS
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.semantic_ids import ItemIndex

BEAUTY = Path(__file__).parents[4] / "shared" / "data" / "beauty2014"
ITEM_TASKS = ("item2index", "index2item", "itemfeatureobtain")
SIDS = re.compile(r"(?:<\|[a-z]_\d+\|>)+")


def rows(folder: DataFolder) -> Iterator[tuple[str, str, str]]:
    """Yield task, question and answer of every row of the file."""
    for batch in pq.ParquetFile(folder.mix).iter_batches():
        turns = batch["conversations"].flatten().field("value").to_pylist()
        yield from zip(batch["task"].to_pylist(), turns[::2], turns[1::2], strict=True)


def test_items_that_only_validation_and_test_hold_are_in_no_row_about_users(tmp_path: Path) -> None:
    folder = make_data(tmp_path, users=60)
    items = folder.read_items()
    index, sequences = folder.read_index(items), folder.read_inter(items)
    held_out = {item for sequence in sequences.values() for item in sequence[-2:]}
    assert not held_out & {item for sequence in sequences.values() for item in sequence[:-2]}
    report = write_mix(folder, rows=dict.fromkeys(TASKS, 1.0), seed=0)
    assert all(counts["made"] == counts["exist"] > 0 for counts in report["tasks"].values())
    forbidden = [text.casefold() for item in held_out for text in (index.text(item), items[item].title)]
    seen = 0
    for task, question, answer in rows(folder):
        seen += 1
        if task not in ITEM_TASKS:
            text = f"{question} {answer}".casefold()
            assert not [word for word in forbidden if word in text]
    assert seen == sum(counts["made"] for counts in report["tasks"].values())


@pytest.mark.skipif(not BEAUTY.is_dir(), reason="needs ../shared/data/beauty2014")
def test_every_history_and_target_of_amazon_beauty_is_part_of_a_training_part(tmp_path: Path) -> None:
    for path in BEAUTY.glob("Beauty.i*.json"):
        shutil.copyfile(path, tmp_path / path.name)
    folder = DataFolder(tmp_path, "Beauty")
    items = folder.read_items()
    codes = np.random.default_rng(0).permutation(2**24)[: len(items)]
    index = ItemIndex.from_codes(list(items), np.stack(np.unravel_index(codes, (256,) * 3), axis=1).tolist())
    index.save(folder.index)
    report = write_mix(folder, rows=dict.fromkeys(TASKS, 1.0), seed=0, history=8)
    windows, titles = set(), set()
    for sequence in folder.read_inter(items).values():
        part = sequence[:-2]
        sids, names = index.texts(part), [short_title(items[item].title) for item in part]
        for end in range(1, len(part) + 1):
            windows.update(hash("".join(sids[start:end])) for start in range(max(end - 9, 0), end))
            titles.update(hash("; ".join(names[start:end])) for start in range(max(end - 9, 0), end))
    seen = 0
    for task, question, answer in rows(folder):
        seen += 1
        if task in ITEM_TASKS:
            continue
        runs = SIDS.findall(question)
        assert all(hash(run) in windows for run in runs)
        if task in ("seqrec", REASONING):
            assert hash(runs[0] + SIDS.findall(answer)[-1]) in windows
        elif task == "historyreconstruction":
            assert hash(answer) in (titles if runs else windows)
    assert seen == sum(counts["made"] for counts in report["tasks"].values()) > 900_000
