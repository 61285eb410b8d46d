"""LLaMA-Factory feeds the rows of the mix in the file's order: on one process, on two ranks, epoch by epoch."""

from __future__ import annotations

import json
from itertools import accumulate, chain
from pathlib import Path

import polars as pl
import pytest
from sft_run import RECORDER, ROWS, logged, make_sft_run, train
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from data_processing.sft.lengths import token_counter
from data_processing.sft.tasks import Row

pytestmark = [pytest.mark.integration, pytest.mark.timeout(200)]

BATCH, ACCUMULATION, EPOCHS = 3, 2, 2
SETTINGS = (
    f"per_device_train_batch_size={BATCH}",
    f"gradient_accumulation_steps={ACCUMULATION}",
    f"num_train_epochs={EPOCHS}",
    "include_num_input_tokens_seen=non_padding",
    "save_steps=1000",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("order")
    make_sft_run(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder / "model")


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[Row]:
    table = pl.read_parquet(folder / "data" / "small-mix.parquet").to_dicts()
    rows = [
        Row(*(turn["value"] for turn in line["conversations"]), task=line["task"], system=line["system"])
        for line in table
    ]
    assert len(set(rows)) == len(rows) == sum(ROWS.values())
    return rows


def micro_batches(rows: int, ranks: int) -> list[list[int]]:
    """Return the numbers of the rows that all ranks together are fed at once, in the order of ranks, for one epoch.

    The last micro-batch of one process is short. That of several ranks is filled up with rows from the beginning of the
    file (accelerate's ``even_batches``), which are thus trained once more.
    """
    share = BATCH * ranks
    numbers = [*range(rows), *range(-rows % share if ranks > 1 else 0)]
    return [numbers[start : start + share] for start in range(0, len(numbers), share)]


def steps(rows: int, ranks: int) -> list[list[int]]:
    """Return the numbers of the rows of each optimizer step, all epochs one after the other."""
    epoch = micro_batches(rows, ranks)
    grouped = (epoch[start : start + ACCUMULATION] for start in range(0, len(epoch), ACCUMULATION))
    return [list(chain(*group)) for group in grouped] * EPOCHS


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_rank_is_fed_the_next_rows_of_the_file(
    folder: Path, tokenizer: PreTrainedTokenizerBase, rows: list[Row], ranks: int
) -> None:
    output = folder / f"recorded-{ranks}"
    state = train(folder, *SETTINGS, f"output_dir={output}", ranks=ranks, script=RECORDER)
    texts = {tokenizer.apply_chat_template(chat(row), tokenize=False): number for number, row in enumerate(rows)}
    fed = [
        [[texts[text] for text in json.loads(line)] for line in (output / f"fed-{rank}.jsonl").open()]
        for rank in range(ranks)
    ]
    together = [list(chain(*parts)) for parts in zip(*fed, strict=True)]
    assert together == micro_batches(len(rows), ranks) * EPOCHS
    assert all(len(part) == BATCH for part in chain(*fed)) == (ranks > 1)
    assert state["global_step"] == len(steps(len(rows), ranks))


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_tokens_that_stock_llamafactory_counts_tell_the_order(
    folder: Path, tokenizer: PreTrainedTokenizerBase, rows: list[Row], ranks: int
) -> None:
    lengths = token_counter(tokenizer)(rows)
    expected = list(accumulate(sum(lengths[row] for row in step) for step in steps(len(rows), ranks)))
    state = train(folder, *SETTINGS, f"output_dir={folder}/stock-{ranks}", ranks=ranks)
    assert logged(state, "num_input_tokens_seen") == expected


def test_shuffling_would_be_seen(folder: Path, tokenizer: PreTrainedTokenizerBase, rows: list[Row]) -> None:
    lengths = token_counter(tokenizer)(rows)
    expected = list(accumulate(sum(lengths[row] for row in step) for step in steps(len(rows), 1)))
    seen = logged(
        train(folder, *SETTINGS, f"output_dir={folder}/shuffled", "disable_shuffling=false"), "num_input_tokens_seen"
    )
    assert seen[-1] == expected[-1]
    assert seen != expected


def chat(row: Row) -> list[dict[str, str]]:
    turns = {"system": row.system, "user": row.user, "assistant": row.assistant}
    return [{"role": role, "content": text} for role, text in turns.items() if text]
