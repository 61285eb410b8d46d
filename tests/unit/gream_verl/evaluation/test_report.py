from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from assets import make_index
from rich.console import Console

from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json
from gream_verl.evaluation.breakdown import Catalogue, describe
from gream_verl.evaluation.metrics import rank_of, ranking_metrics
from gream_verl.evaluation.pictures import color
from gream_verl.evaluation.prompts import Prompt
from gream_verl.evaluation.report import (
    RunRecord,
    read_sft_log,
    read_srpo_log,
    render_table,
    summarise,
    write_report,
)
from gream_verl.evaluation.results import Evaluation
from gream_verl.evaluation.tables import results_table, signed, table_rows

DIRTY = "<script>alert('x')</script> & \"Ça\" <b>"
USERS = 12


def evaluation(mode: str, shift: int) -> Evaluation:
    index = make_index()
    items = list(index.sids)
    rows = []
    for user in range(USERS):
        row = {
            "user": str(user),
            "target": items[user],
            "recommended": [items[(user + shift + place) % 24] for place in range(-3, 7)],
        }
        if mode != "popularity":
            row["rsvr"] = 1.0 if shift < 4 else 0.25
        if mode == "reasoning":
            text = f"<think>{DIRTY}</think>{index.text('0')}{index.text('1')}<answer>{index.text(items[user])}</answer>"
            row["chains"] = [{"text": text, "rsvr": row["rsvr"]}]
        rows.append(row)
    metrics = ranking_metrics([rank_of(row["target"], row["recommended"]) for row in rows])
    if mode in ("direct", "reasoning"):
        metrics["rsvr"] = sum(row["rsvr"] for row in rows) / USERS
    if mode == "reasoning":
        metrics["valid_item"] = 0.75
    return Evaluation(metrics, {"mode": mode, "users": USERS, "seed": 0}, rows)


@pytest.fixture
def record() -> RunRecord:
    index = make_index()
    return RunRecord(
        title=f"Run {DIRTY}",
        results={
            "Popularity": evaluation("popularity", 9),
            "SFT, reasoning": evaluation("reasoning", 5),
            "SRPO, reasoning": evaluation("reasoning", 2),
        },
        comparisons=[("SRPO, reasoning", "SFT, reasoning")],
        index=index,
        titles={item: f"{DIRTY} {item}" for item in index.sids if item != "3"},
        prompts=[Prompt(str(user), "0", ("1", "2", "3"), [], index.text("0")) for user in range(USERS)],
        examples="SRPO, reasoning",
        sft_log=[{"step": step, "loss": 1 / step} for step in range(1, 30)],
        srpo_log=[{"step": step, "critic/rewards/mean": 0.1 * step, "actor/kl_loss": 0.01} for step in range(1, 9)],
        tasks=["seqrec"] * 50 + ["seqrec", "reasoning"] * 50,
        details={"Settings": {DIRTY: DIRTY, "seeds": [0, 1], "peak memory (GB)": 7.8}},
    )


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loaded: list[str] = []
        self.text: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loaded += [
            value or ""
            for name, value in attributes
            if name in ("src", "href", "xlink:href", "srcset", "data", "action")
        ]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read_page(folder: Path) -> tuple[Page, str]:
    html = (folder / "report.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(html)
    return page, html


def test_the_page_loads_nothing_from_elsewhere(record: RunRecord, tmp_path: Path) -> None:
    write_report(tmp_path, record)
    page, html = read_page(tmp_path)
    assert all(link.startswith("#") for link in page.loaded), page.loaded
    assert not set(page.tags) & {"script", "link", "iframe", "img", "object", "embed"}
    assert not re.search(r"@import|url\((?!#)", html)
    assert page.tags.count("svg") == 5  # loss, reward, KL, index, curriculum


def test_dirty_titles_chains_and_settings_are_text_and_nothing_else(record: RunRecord, tmp_path: Path) -> None:
    write_report(tmp_path, record)
    page, html = read_page(tmp_path)
    assert "<script" not in html
    assert "<b>" not in html
    text = "".join(page.text)
    assert text.count(f"Run {DIRTY}") == 2
    assert f"{DIRTY} 1" in text
    assert text.count("Chain of thought") == 5
    assert f"<think>{DIRTY}</think>[{DIRTY} 0] [{DIRTY} 1] <answer>[" in text
    assert "item 3" in text  # an item without a title
    assert "✓" in text


def test_the_same_run_gives_the_same_bytes(record: RunRecord, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        write_report(tmp_path / folder, record)
    for name in ("report.html", "metrics.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_metrics_json_holds_the_table_with_intervals_and_the_paired_difference(
    record: RunRecord, tmp_path: Path
) -> None:
    write_report(tmp_path, record)
    summary = read_json(tmp_path / "metrics.json")
    assert list(summary["results"]) == list(record.results)
    srpo = summary["results"]["SRPO, reasoning"]
    assert srpo["metrics"] == record.results["SRPO, reasoning"].metrics
    assert srpo["intervals_95"]["rsvr"] == [1.0, 1.0]
    assert "rsvr" not in summary["results"]["Popularity"]["intervals_95"]
    difference = summary["comparisons"][0]["differences"]["rsvr"]
    assert difference == {"difference": 0.75, "low": 0.75, "high": 0.75, "p": pytest.approx(2**-11, abs=5e-4)}
    assert json.loads(json.dumps(summarise(record))) == summary

    rows = {row[0]: row[1:] for row in table_rows(summary["results"])}
    assert rows["Popularity"][-3:] == ["1.0000", "–", "12"]
    assert rows["SRPO, reasoning"][-3:] == ["0.7500", "1.0000\n1.0000 to 1.0000", "12"]
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(render_table(summary))
    shown = " ".join(console.export_text().split())
    assert "SRPO, reasoning" in shown
    assert "rsvr +0.7500 (95% +0.7500 to +0.7500, p<.001)" in shown


def test_a_comparison_of_different_users_is_refused(record: RunRecord) -> None:
    left = record.results["SRPO, reasoning"]
    fewer = Evaluation(left.metrics, left.settings, left.rows[1:])
    with pytest.raises(InputError, match="11 of 12 users in common"):
        summarise(RunRecord("x", {"a": left, "b": fewer}, [("a", "b")], record.index, {}, []))


def test_the_page_tells_for_whom_by_which_protocol_and_what_cannot_be_compared(
    record: RunRecord, tmp_path: Path
) -> None:
    catalogue = Catalogue({str(item): item % 7 for item in range(24)})
    protocol = {"split": "test", "history": 20, "drop_history": True}
    results = {}
    for name, plain in record.results.items():
        rows = [{**row, "history_length": 3 * user} for user, row in enumerate(plain.rows)]
        kept = {**plain.settings, "protocol": protocol | {"drop_history": name != "Popularity"}}
        results[name] = describe(Evaluation(plain.metrics, kept, rows), catalogue)
    write_report(tmp_path, replace(record, results=results))
    page, _ = read_page(tmp_path)
    text = "".join(page.text)
    assert page.tags.count("svg") == 7
    assert "WARNING: Popularity cannot be compared with SRPO, reasoning: drop history is False, not True." in text
    assert "drop historyTrue; Popularity: False" in text.replace("\n", "")
    assert "Cov@10" in text
    summary = read_json(tmp_path / "metrics.json")
    buckets = summary["results"]["SRPO, reasoning"]["breakdown"]["history length"]
    assert [bucket["bucket"] for bucket in buckets] == ["0", "1-4", "5-9", "10-19", "20-49"]
    assert [bucket["users"] for bucket in buckets] == [1, 1, 2, 3, 5]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(results_table(results))
    shown = console.export_text()
    assert "WARNING: Popularity" in shown
    assert max(map(len, shown.splitlines())) <= 80
    for short in ("R@10", "N@10", "Cov@10", "Nov@10", "Popularity", "SRPO"):
        assert short in shown


def test_a_report_without_training_data_is_still_written(record: RunRecord, tmp_path: Path) -> None:
    bare = RunRecord("x", {"Popularity": record.results["Popularity"]}, [], record.index, {}, [])
    write_report(tmp_path, bare)
    page, _ = read_page(tmp_path)
    assert page.tags.count("svg") == 1


def test_logs_of_both_frameworks_are_read(tmp_path: Path) -> None:
    state = {"log_history": [{"step": 10, "loss": 2.5, "epoch": 0.1}, {"step": 20, "train_runtime": 3.0}]}
    (tmp_path / "trainer_state.json").write_text(json.dumps(state))
    assert read_sft_log(tmp_path) == [{"step": 10, "loss": 2.5}]

    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    lines = [json.dumps({"step": step, "data": {"critic/rewards/mean": step / 10}}) for step in range(3)]
    first.write_text("\n".join(lines) + '\n{"step": 3, "da')
    second.write_text(json.dumps({"step": 2, "data": {"critic/rewards/mean": 9.0}}) + "\n")
    assert [row["critic/rewards/mean"] for row in read_srpo_log([first, second])] == [0.0, 0.1, 9.0]
    first.write_text("rubbish\n")
    with pytest.raises(InputError, match="line 1"):
        read_srpo_log([first])


def test_names_are_text_in_pictures_and_all_are_in_the_legend(record: RunRecord, tmp_path: Path) -> None:
    catalogue = Catalogue({str(item): item % 7 for item in range(24)})
    described = describe(record.results["Popularity"], catalogue)
    names = [r"a$b_{$", "_private", *(f"model {number}" for number in range(10))]
    write_report(tmp_path, replace(record, results=dict.fromkeys(names, described), comparisons=[], examples=None))
    _, html = read_page(tmp_path)
    svg = next(part for part in html.split("<svg")[1:] if "popularity of the target" in part)
    for name in names:
        assert name in svg
    assert len({tuple(color(place)) for place in range(20)}) == 20


@pytest.mark.parametrize(
    ("value", "text"), [(10.5, "+10.5000"), (-0.25, "-.2500"), (0.0021, "+.0021"), (-20.0, "-20.0000")]
)
def test_differences_leave_out_a_zero_before_the_point_only(value: float, text: str) -> None:
    assert signed(value) == text


def test_a_cell_of_the_terminal_has_half_of_the_interval(record: RunRecord) -> None:
    entry = {"metrics": {"recall@10": 0.5}, "settings": {"mode": "direct", "users": 4}}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(render_table({"title": "x", "results": {"m": entry | {"intervals_95": {"recall@10": [0.25, 0.7]}}},
                                "comparisons": [], "warnings": []}))  # fmt: skip
    shown = console.export_text()
    assert "±.2250" in shown
    assert ".5000" in shown
