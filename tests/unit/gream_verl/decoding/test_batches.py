from __future__ import annotations

import logging
from collections.abc import Sequence

import pytest
import torch

from gream_verl.core.errors import InputError
from gream_verl.decoding.batches import HalvedBatches, pad_left


def batches(room: int, size: int, sizes: list[int]) -> HalvedBatches[int, int]:
    """Add up pairs, with memory for ``room`` of them, and record the sizes of the batches."""

    def work(batch: Sequence[tuple[Sequence[int], int]]) -> list[int]:
        sizes.append(len(batch))
        if len(batch) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return [len(ids) + extra for ids, extra in batch]

    return HalvedBatches(work, size, "30 beams")


ITEMS = [([0] * (1 + item % 5), 10 * item) for item in range(11)]
EXPECTED = [len(ids) + extra for ids, extra in ITEMS]


@pytest.mark.parametrize("size", [1, 4, 100])
def test_results_come_in_the_order_of_the_items(size: int) -> None:
    sizes: list[int] = []
    assert batches(100, size, sizes)(ITEMS) == EXPECTED
    assert max(sizes) == min(size, len(ITEMS))


def test_out_of_memory_halves_the_batch_that_failed_for_good_and_logs_it(caplog: pytest.LogCaptureFixture) -> None:
    sizes: list[int] = []
    run = batches(3, 100, sizes)
    with caplog.at_level(logging.WARNING):
        assert run(ITEMS) == run(ITEMS) == EXPECTED
    assert [size for size in sizes if size > 3] == [11, 5]
    assert run.size == 2
    assert [record.message for record in caplog.records] == [
        f"out of memory: batches of {size} from now on, 30 beams as before" for size in (5, 2)
    ]


def test_no_memory_for_a_single_item_is_an_error() -> None:
    with pytest.raises(InputError, match="no memory for one sequence with 30 beams"):
        batches(0, 4, [])(ITEMS)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: you tried"),
        MemoryError(),
    ],
)
def test_errors_of_memory_are_recognised(error: Exception) -> None:
    def work(batch: Sequence[tuple[Sequence[int], int]]) -> list[int]:
        raise error

    with pytest.raises(InputError, match="no memory"):
        HalvedBatches(work, 1, "a chain")(ITEMS)


def test_another_error_is_not_hidden() -> None:
    def work(batch: Sequence[tuple[Sequence[int], int]]) -> list[int]:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1"):
        HalvedBatches(work, 4, "a chain")(ITEMS)


def test_sequences_are_padded_on_the_left() -> None:
    ids, mask = pad_left([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
