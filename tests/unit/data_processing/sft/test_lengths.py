from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from assets import make_tiny_model
from small_data import make_data

from data_processing.sft.corpus import Corpus
from data_processing.sft.fields import LENGTH
from data_processing.sft.lengths import LengthLimit, length_table, token_counter
from data_processing.sft.tasks import REASONING, TASKS, Renderer, Row
from gream_verl.core.errors import InputError


def words(rows: Sequence[Row]) -> list[int]:
    return [len(f"{row.system} {row.user} {row.assistant}".replace("<|a", " <|a").split()) for row in rows]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = make_data(tmp_path_factory.mktemp("data"))
    items = folder.read_items()
    return Corpus(folder.read_training(items), items, folder.read_index(items))


def test_every_row_keeps_the_longest_history_that_fits(corpus: Corpus) -> None:
    tasks = ["seqrec", "item2index", REASONING]
    plans = [TASKS[task].draw(corpus, 40, np.random.default_rng(0)) for task in tasks]
    specs, kinds = np.concatenate(plans), np.repeat(np.arange(3), [len(plan) for plan in plans])
    renderer = Renderer(corpus, tasks)
    longest = int(np.median(words(renderer.rows(kinds, specs))))
    fitted = specs.copy()
    tokens = LengthLimit(words, longest).fit(renderer, kinds, fitted)
    assert (fitted[:, LENGTH] < specs[:, LENGTH]).sum() > 10
    for row in range(len(specs)):
        one, kind = specs[row : row + 1].copy(), kinds[row : row + 1]
        while words(renderer.rows(kind, one))[0] > longest and one[0, LENGTH] > 1:
            one[0, LENGTH] -= 1
        assert np.array_equal(one[0], fitted[row])
        assert tokens[row] == words(renderer.rows(kind, one))[0]


def test_the_history_of_a_given_chain_is_left_as_it_is(corpus: Corpus, tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    items = folder.read_items()
    sequences, index = folder.read_training(items), folder.read_index(items)
    user = max(sequences, key=lambda user: len(sequences[user]))
    chain = f"<think>x</think><answer>{index.text(sequences[user][5])}</answer>"
    given = Corpus(sequences, items, index, chains={(user, 5): chain})
    specs = TASKS[REASONING].draw(given, 1, np.random.default_rng(0))
    tokens = LengthLimit(words, 1).fit(Renderer(given, [REASONING]), np.zeros(1, np.int64), specs)
    assert specs[0, LENGTH] == 5
    assert tokens[0] > 1


def test_tokens_are_those_of_the_whole_conversation(corpus: Corpus, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path, corpus.index))
    rows = [Row("Hello there", "<|a_1|>", "t"), Row("Hi", "<|a_1|><|b_1|>", "t", "Be kind.")]
    expected = []
    for row in rows:
        turns = [("system", row.system)] * bool(row.system) + [("user", row.user), ("assistant", row.assistant)]
        messages = [{"role": role, "content": text} for role, text in turns]
        expected.append(len(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]))
    assert token_counter(tokenizer)(rows * 700) == expected * 700
    assert token_counter(tokenizer)([]) == []


def test_a_slow_tokenizer_is_one_sentence() -> None:
    with pytest.raises(InputError, match="models/slow: not a fast tokenizer"):
        token_counter(SimpleNamespace(name_or_path="models/slow"))


def test_a_tokenizer_without_a_chat_template_is_one_sentence(corpus: Corpus, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path, corpus.index))
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="has no chat template; give a tokenizer that has one"):
        token_counter(tokenizer)


def test_the_table_is_about_the_rows_that_fit() -> None:
    table = length_table(np.array([1, 2, 3]), 1, 2)
    assert table == {"median": 2.0, "95%": 2.9, "longest": 3.0, "shortened": 1, "left out": 2}
    assert length_table(np.zeros(0, np.int32), 0, 1)["longest"] == 0
