from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from zlib import crc32

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import make_data

from data_processing.layout import CHAINS
from data_processing.sft import mix
from data_processing.sft.best_of import NEAR, BestOf
from data_processing.sft.lengths import LengthLimit
from data_processing.sft.mix import MixOptions, write_mix
from data_processing.sft.rules import RuleTeacher
from data_processing.sft.tasks import REASONING, TARGET, Corpus, SftRow, Window
from gream_verl.core.data_folder import DataFolder
from gream_verl.core.files import read_json

ROWS = {"seqrec": 9, REASONING: 30}


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mix, "draw_curriculum", lambda *_: None)


def lottery(rows: Sequence[SftRow]) -> np.ndarray:
    """Score each response by its letters."""
    return np.array([crc32(row.assistant.encode()) / 2**32 for row in rows])


def score(chain: str) -> float:
    return float(lottery([SftRow("", chain, "")])[0])


def make_corpus(folder: DataFolder) -> Corpus:
    items = folder.read_items()
    return Corpus(folder.read_training(items), items, folder.read_index(items))


def answers(folder: DataFolder) -> dict[str, str]:
    rows = pl.read_parquet(folder.mix).filter(task=REASONING)["conversations"].to_list()
    return {asked["value"]: answer["value"] for asked, answer in rows}


def test_the_best_chain_of_each_row_is_written(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    write_mix(folder, MixOptions(ROWS))
    usual, corpus = answers(folder), make_corpus(folder)
    report = write_mix(folder, MixOptions(ROWS, best_of=BestOf(lottery, 3)))[REASONING]["best of"]
    chosen, expected, gains = answers(folder), {}, []
    for spec in corpus.draw(REASONING, None, 0).tolist():
        question = corpus.row(REASONING, *spec).user
        if question in usual:
            first, *others = islice(Window(corpus, *spec).chains(), 3)
            assert first == usual[question]
            expected[question] = max([first, *others], key=score)
            gains.append(score(expected[question]) - score(first))
    assert chosen == expected != usual
    assert report["another chain"] == sum(chosen[question] != usual[question] for question in usual)
    assert report["nats of the target"] == pytest.approx(np.mean(gains))
    assert report["nats of the target +-"] == pytest.approx(1.96 * np.std(gains) / len(gains) ** 0.5)
    assert report["nats of the wrong item"] != report["nats of the target"]


def test_the_best_of_one_is_the_mix_without_a_judge(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    files = []
    for best_of in (None, BestOf(lottery, 1), BestOf(lottery, 4)):
        write_mix(folder, MixOptions(ROWS, best_of=best_of))
        files.append({path.name: path.read_bytes() for path in tmp_path.glob("*.parquet")})
    assert files[0] == files[1]
    assert [name for name in files[0] if files[0][name] != files[2][name]] == ["small-mix.parquet"]


def test_chains_that_leak_lie_or_are_too_long_are_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_data(tmp_path)
    items, index = folder.read_items(), folder.read_index(folder.read_items())

    def chains(self: RuleTeacher, history: Sequence[str], target: str) -> Sequence[str]:
        answer = f"<answer>{index.text(target)}</answer>"
        bad = [f"It is {items[target].title}.", f"It is {index.text(target)}", "War 99", "long " * 99, "better"]
        return iter(f"<think>{thought}</think>{answer}" for thought in ["first", *bad])

    monkeypatch.setattr(RuleTeacher, "chains", chains)
    limit = LengthLimit(lambda rows: [len(row.assistant.split()) for row in rows], 50)
    options = MixOptions(
        ROWS, limit=limit, best_of=BestOf(lambda rows: np.array([len(row.assistant) for row in rows]), 6)
    )
    write_mix(folder, options)
    assert {chain.partition("</think>")[0] for chain in answers(folder).values()} == {"<think>better"}


def test_the_wrong_item_is_as_popular_and_not_of_the_history(tmp_path: Path) -> None:
    folder, judged = make_data(tmp_path, users=40), list[Sequence[SftRow]]()
    corpus = make_corpus(folder)
    specs = corpus.draw(REASONING, 20, 0)

    def judge(rows: Sequence[SftRow]) -> np.ndarray:
        judged.append(rows)
        return lottery(rows)

    BestOf(judge, 2).choose(corpus, specs, None, seed=0)
    popular = [item for sequence in corpus.sequences for item in sequence]
    popular = sorted(corpus.keys, key=lambda item: -popular.count(item))
    for row, spec in zip(judged[1], specs.tolist(), strict=False):
        window = Window(corpus, *spec)
        wrong = next(item for item in corpus.keys if row.assistant.endswith(f"<answer>{corpus.sids[item]}</answer>"))
        assert wrong not in {window.target, *window.history}
        assert abs(popular.index(wrong) - popular.index(window.target)) <= NEAR
    assert len(judged[1]) == 2 * len(specs)
    assert set(corpus.choices) == set(specs[:, TARGET].tolist())


def test_a_language_models_chains_for_a_target_are_candidates(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    sequences = folder.read_inter()
    user = max(sequences, key=lambda user: len(sequences[user]))
    row = {"user": user, "history": 5, "preference": "P.", "intent": "I.", "position": 5, "item": sequences[user][5]}
    chains = [{**row, "evidence": text, "keep": [sequences[user][1]]} for text in ("Short.", "Rather longer.", "Mid.")]
    pq.write_table(pa.Table.from_pylist(chains, CHAINS), folder.chains)
    longest = BestOf(lambda rows: np.array([len(row.assistant) for row in rows]), 3)
    for best_of, evidence in ((None, "Short."), (longest, "Rather longer.")):
        write_mix(folder, MixOptions({REASONING: 1}, best_of=best_of))
        (chain,) = answers(folder).values()
        assert chain.startswith(f"<think>{evidence} P. I.</think>")


def test_untrue_chains_are_counted(tmp_path: Path) -> None:
    folder = make_data(tmp_path)
    assert write_mix(folder, MixOptions(ROWS))[REASONING]["untrue"] == 0
    sequences = folder.read_inter()
    user = max(sequences, key=lambda user: len(sequences[user]))
    row = {"user": user, "history": 5, "preference": "P.", "intent": "I.", "position": 5, "item": sequences[user][5]}
    chain = {**row, "evidence": "Drama 77", "keep": [sequences[user][1]]}
    pq.write_table(pa.Table.from_pylist([chain], CHAINS), folder.chains)
    assert write_mix(folder, MixOptions({REASONING: 1}))[REASONING]["untrue"] == 1
    assert read_json(folder.mix.with_suffix(".json"))[REASONING]["untrue"] == 1
