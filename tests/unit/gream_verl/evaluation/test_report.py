from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from small_data import make_data

from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, write_json, write_text
from gream_verl.core.run_folder import RunFolder
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.evaluation.metrics import rank_of, ranking_metrics
from gream_verl.evaluation.report import read_sft_log, read_srpo_log, write_report
from gream_verl.evaluation.results import Evaluation

DIRTY = "<script>alert('x')</script> & \"Ça\" <b>"


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run whose trainings and evaluations are done, with dirty titles and chains."""
    data = make_data(tmp_path / "data")
    titles = read_json(data.item)
    write_json(data.item, {item: fields | {"title": f"{DIRTY} {item}"} for item, fields in titles.items()})
    index, sequences = ItemIndex.load(data.index), data.read_inter()
    for name, mode, reward in (
        ("popularity", "popularity", None), ("sft-reasoning", "reasoning", 0.25), ("srpo-reasoning", "reasoning", 1.0),
        ("sft-val-reasoning", "reasoning", 0.5),
    ):  # fmt: skip
        rows = []
        for user, items in sequences.items():
            row = {"user": user, "target": items[-1], "history_length": len(items) - 1, "rsvr": reward}
            row["recommended"] = [*list(index.sids)[int(user) : int(user) + 9], items[-1]]
            text = f"<think>{DIRTY}</think>{index.text('0')}{index.text('1')}<answer>{index.text(items[-1])}</answer>"
            rows.append(row | {"chains": [{"text": text}]} if reward is not None else row | {"rsvr": 0.0})
        metrics = ranking_metrics([rank_of(row["target"], row["recommended"]) for row in rows])
        split = "val" if "-val-" in name else "test"
        settings = {"mode": mode, "users": len(rows), "protocol": {"split": split, "template": DIRTY}}
        Evaluation(metrics, settings, rows, {"recall@10": (0.5, 1.0)}).save(tmp_path / "evaluation" / f"{name}.json")
    log = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5, "eval_test_loss": 2.0}, {"step": 2, "train_loss": 1}]
    write_json(tmp_path / "sft" / "trainer_state.json", {"log_history": log})
    steps = [{"step": step, "data": {"critic/rewards/mean": step / 9, "actor/kl_loss": 0.01}} for step in range(1, 9)]
    write_text(tmp_path / "srpo/logs/now/gream/srpo.jsonl", "".join(json.dumps(step) + "\n" for step in steps))
    return RunFolder.open(tmp_path)


class Page(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        loading = ("src", "href", "xlink:href", "srcset", "data", "action")
        self.loaded += [value or "" for name, value in attributes if name in loading]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_shows_everything_and_loads_nothing(run: RunFolder) -> None:
    write_report(run)
    html = run.report.read_text(encoding="utf-8")
    page = Page(html)
    assert all(link.startswith("#") for link in page.loaded), page.loaded
    assert not set(page.tags) & {"script", "link", "iframe", "img", "object", "embed", "b"}
    assert not re.search(r"@import|url\((?!#)", html)
    assert page.tags.count("svg") == 4  # loss, reward, KL, index
    for text in ("SFT: loss", "eval_test_loss", "SRPO: mean reward of rollouts", "Items per code"):
        assert text in page.text
    assert "60 items, 3 levels, 2 items with a collision token." in page.text
    assert "level a: 4 codes, 12 to 16 items each" in page.text
    assert page.text.count("Chain of thought") == 5
    assert f"<think>{DIRTY}</think>[{DIRTY} 0] [{DIRTY} 1] <answer>[" in page.text
    assert "✓" in page.text
    assert "sft-val" not in page.text
    assert "WARNING" not in page.text


def test_the_numbers_and_the_paired_difference_are_kept_and_each_time_the_same(run: RunFolder) -> None:
    files = run.report, run.root / "metrics.json"
    write_report(run)
    first = [file.read_bytes() for file in files]
    write_report(run)
    assert first == [file.read_bytes() for file in files]
    kept = read_json(run.root / "metrics.json")
    assert list(kept["results"]) == ["popularity", "sft-reasoning", "srpo-reasoning"]
    assert kept["results"]["popularity"]["intervals"] == {"recall@10": [0.5, 1.0]}
    assert list(kept["differences"]) == ["srpo-reasoning"]
    difference = kept["differences"]["srpo-reasoning"]["rsvr"]
    assert difference == {"difference": 0.75, "low": 0.75, "high": 0.75, "p": pytest.approx(2**-11, abs=5e-4)}


def test_a_run_with_direct_results_only_has_a_report_and_one_without_names_the_command(run: RunFolder) -> None:
    for path in (*run.evaluation.glob("*reasoning*"), run.sft / "trainer_state.json", *run.srpo.rglob("*.jsonl")):
        path.unlink()
    write_report(run)
    page = Page(run.report.read_text(encoding="utf-8"))
    assert page.tags.count("svg") == 1
    assert "Some users" not in page.text
    for path in run.evaluation.iterdir():
        path.unlink()
    with pytest.raises(InputError, match="gream evaluate"):
        write_report(run)


def test_logs_of_both_frameworks_are_read(tmp_path: Path) -> None:
    assert read_sft_log(tmp_path) == []
    state = {"log_history": [{"step": 10, "loss": 2.5, "epoch": 0.1}, {"step": 20, "train_runtime": 3.0}]}
    write_json(tmp_path / "trainer_state.json", state)
    assert [row.get("loss") for row in read_sft_log(tmp_path)] == [2.5, None]

    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    lines = [json.dumps({"step": step, "data": {"critic/rewards/mean": step / 10}}) for step in range(3)]
    first.write_text("\n".join(lines) + '\n{"step": 3, "da')
    second.write_text(json.dumps({"step": 2, "data": {"critic/rewards/mean": 9.0}}) + "\n")
    assert [row["critic/rewards/mean"] for row in read_srpo_log([first, second])] == [0.0, 0.1, 9.0]
