from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from assets import make_tiny_model
from small_data import make_data

from data_processing.sft.lengths import LengthLimit, token_counter
from data_processing.sft.tasks import LENGTH, REASONING, Corpus, SftRow, TeacherTexts
from gream_verl.core.errors import InputError


def words(rows: Sequence[SftRow]) -> list[int]:
    return [len(f"{row.system} {row.user} {row.assistant}".replace("<|a", " <|a").split()) for row in rows]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = make_data(tmp_path_factory.mktemp("data"))
    items = folder.read_items()
    return Corpus(folder.read_training(items), items, folder.read_index(items))


@pytest.mark.parametrize("task", ["seqrec", "item2index", REASONING])
def test_every_row_keeps_the_longest_history_that_fits(corpus: Corpus, task: str) -> None:
    specs = corpus.draw(task, 40, 0)
    longest = int(np.median(words([corpus.row(task, *spec) for spec in specs.tolist()])))
    fitted = specs.copy()
    tokens = LengthLimit(words, longest).fit(corpus, task, fitted)
    assert (fitted[:, LENGTH] < specs[:, LENGTH]).any() == (task != "item2index")
    for (target, length, *rest), one, count in zip(specs.tolist(), fitted.tolist(), tokens.tolist(), strict=True):
        shown = length
        while words([corpus.row(task, target, shown, *rest)])[0] > longest and shown > 1:
            shown -= 1
        assert one == [target, shown, *rest]
        assert count == words([corpus.row(task, *one)])[0]


def test_the_history_of_a_chain_of_a_language_model_stays_whole(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    items = folder.read_items()
    sequences, index = folder.read_training(items), folder.read_index(items)
    user = max(sequences, key=lambda user: len(sequences[user]))
    texts = TeacherTexts(chains={(user, 5): f"<think>x</think><answer>{index.text(sequences[user][5])}</answer>"})
    corpus = Corpus(sequences, items, index, texts=texts)
    specs = corpus.draw(REASONING, None, 0)
    assert LengthLimit(words, 1).fit(corpus, REASONING, specs)[0] > 1
    assert specs[0, LENGTH] == 5


def test_tokens_are_those_of_the_whole_conversation(corpus: Corpus, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(make_tiny_model(tmp_path, corpus.index))
    rows = [SftRow("Hello there", "<|a_1|>", "t"), SftRow("Hi", "<|a_1|><|b_1|>", "t", "Be kind.")]
    expected = []
    for row in rows:
        turns = [("system", row.system)] * bool(row.system) + [("user", row.user), ("assistant", row.assistant)]
        messages = [{"role": role, "content": text} for role, text in turns]
        expected.append(len(tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]))
    assert token_counter(tokenizer)(rows * 700) == expected * 700
    assert token_counter(tokenizer)([]) == []
    tokenizer.chat_template = None
    for unfit in (tokenizer, SimpleNamespace(name_or_path="models/slow")):
        with pytest.raises(InputError, match="not a fast tokenizer with a chat template"):
            token_counter(unfit)
