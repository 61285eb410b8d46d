from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from assets import make_index, make_tiny_model
from hypothesis import given
from hypothesis import strategies as st

from gream_verl.core.errors import InputError
from gream_verl.decoding.prefix_tree import PrefixTree
from gream_verl.evaluation.memory import out_of_memory
from gream_verl.evaluation.prompts import load_model
from gream_verl.evaluation.ranking import ItemRanker, shared_prefix
from gream_verl.model.vocabulary import sid_token_ids

INSTRUCTION = [4, 9, 11, 30]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("ranking") / "model", make_index())


@pytest.fixture
def ranker(folder: Path) -> ItemRanker:
    return make_ranker(folder)


def make_ranker(folder: Path, batch_size: int = 8, prefix: tuple[int, ...] = ()) -> ItemRanker:
    index = make_index()
    model, tokenizer = load_model(folder)
    tree = PrefixTree.from_index(index, sid_token_ids(tokenizer, index, str(folder)))
    return ItemRanker(model, tree, list(index.sids), 5, batch_size, prefix=prefix)


def prompts(count: int) -> list[list[int]]:
    return [INSTRUCTION + [1 + (7 * user + place) % 200 for place in range(1 + user % 4)] for user in range(count)]


def run_out_above(ranker: ItemRanker, most: int) -> list[int]:
    """Let the model run out of memory for more than ``most`` sequences; return the sizes it was called with."""
    sizes: list[int] = []

    def refuse(_: object, __: object, inputs: dict[str, torch.Tensor]) -> None:
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    ranker.model.register_forward_pre_hook(refuse, with_kwargs=True)
    return sizes


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=5))
def test_the_shared_prefix_is_the_longest_that_leaves_each_prompt_a_token(sequences: list[list[int]]) -> None:
    prefix = list(shared_prefix(sequences))
    longest = max(
        length
        for length in range(min(map(len, sequences)))
        if all(sequence[:length] == sequences[0][:length] for sequence in sequences)
    )
    assert prefix == sequences[0][:longest]


def test_a_prefix_computed_once_changes_no_ranking(folder: Path) -> None:
    plain, cached = make_ranker(folder), make_ranker(folder, prefix=shared_prefix(prompts(7)))
    dropped = [[str(user)] for user in range(7)]
    expected, found = (dict(ranker.rank(prompts(7), dropped)) for ranker in (plain, cached))
    for place, ranking in expected.items():
        assert list(found[place]) == list(ranking)
        assert list(found[place].values()) == pytest.approx(list(ranking.values()), abs=1e-4)
    with pytest.raises(ValueError, match="does not begin with the prefix"):
        list(cached.rank([[1, 2, 3]], [[]]))


def test_out_of_memory_halves_the_batch_never_the_beams_and_says_so(
    folder: Path, ranker: ItemRanker, caplog: pytest.LogCaptureFixture
) -> None:
    expected = dict(ranker.rank(prompts(11), [[]] * 11))
    sizes = run_out_above(ranker, 3)
    with caplog.at_level(logging.WARNING):
        found = dict(ranker.rank(prompts(11), [[]] * 11))
    assert sorted(found) == sorted(expected) == list(range(11))
    for place, ranking in expected.items():
        assert list(found[place]) == list(ranking)
        assert len(ranking) == 5
    assert ranker.batch_size == 2
    assert [size for size in sizes if size > 3] == [8, 4]
    assert [record.message for record in caplog.records] == [
        f"out of memory: batches of {size} from now on, 5 beams as before" for size in (4, 2)
    ]


def test_batches_are_halved_from_what_failed_and_not_from_the_size_asked_for(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ranker = make_ranker(folder, batch_size=100)
    sizes = run_out_above(ranker, 3)
    assert len(list(ranker.rank(prompts(6), [[]] * 6))) == 6
    assert [size for size in sizes if size > 3] == [6]
    assert ranker.batch_size == 3


def test_an_item_that_is_twice_in_a_history_is_not_recommended(ranker: ItemRanker) -> None:
    best = next(iter(dict(ranker.rank(prompts(1), [[]]))[0]))
    [(_, ranking)] = ranker.rank(prompts(1), [[best, "no such item", best]])
    assert best not in ranking


def test_no_memory_for_a_single_prompt_is_one_sentence(ranker: ItemRanker) -> None:
    run_out_above(ranker, 0)
    with pytest.raises(InputError, match=r"no memory for a batch of one with 5 beams; use fewer --beams"):
        list(ranker.rank(prompts(2), [[], []]))


def test_only_a_lack_of_memory_is_taken_for_one() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**60)
    assert out_of_memory(refused.value)
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"))
    assert out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_another_error_of_the_model_is_not_hidden(ranker: ItemRanker) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("something else")

    ranker.model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="something else"):
        list(ranker.rank(prompts(2), [[], []]))
