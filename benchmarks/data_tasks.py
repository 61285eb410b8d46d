"""SFT rows: ours against a plain-Python pass, on one synthetic corpus, each in a process of its own.

The plain pass does what research code does: row by row, with look-ups, joins and ``str.format``, every row a dictionary
in a list that is written at the end. It is given the specs that ours drew, so that its rows can be compared with ours
one by one; drawing, the check for leaks and the order of the curriculum ("plan") are on our side alone. "Prepare" makes
arrays or look-ups of what was read, "write" renders and writes. The run fails when a row differs.

    python benchmarks/data_tasks.py            # 5 million interactions: all rows there are, minutes
    python benchmarks/data_tasks.py --quick    # 200 thousand
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from data_processing.sft import mix, prompts
from data_processing.sft.corpus import Corpus, description, features, telling_text, title_and_description
from data_processing.sft.fields import LENGTH, TARGET, TEMPLATE, TITLES_SHOWN
from data_processing.sft.rules import RuleTeacher, short_title
from data_processing.sft.tasks import REASONING, TASKS
from gream_verl.core.data_folder import DataFolder, Item
from gream_verl.core.files import write_json
from gream_verl.core.prompts import SYSTEM, TEMPLATES
from gream_verl.core.semantic_ids import ItemIndex

INTERACTIONS, QUICK = 5_000_000, 200_000
PLAIN_ROWS = 1_000_000
"""Rows that the plain pass makes: it keeps them all in memory."""
ITEM_TASKS = ("item2index", "index2item", "itemfeatureobtain")
GROUPS: dict[str, Mapping[str, Sequence[str]]] = {
    "index2item": prompts.INDEX_TO_ITEM,
    "itemfeatureobtain": prompts.FEATURES,
    "fusionseqrec": prompts.FUSION,
    "itemsearch": prompts.ITEM_SEARCH,
    "historyreconstruction": prompts.RECONSTRUCTION,
}
KINDS = {
    task: [(kind, template) for kind, templates in groups.items() for template in templates]
    for task, groups in GROUPS.items()
}
"""Kind and text of every template."""


class PlainCorpus:
    """The readable definition of every row, with strings and dictionaries only."""

    def __init__(self, training: Mapping[str, Sequence[str]], items: Mapping[str, Item], index: ItemIndex) -> None:
        self.users = list(training.values())
        self.keys = list(items)
        self.items = items
        self.sid = {key: "".join(tokens) for key, tokens in index.sids.items()}
        self.teacher = RuleTeacher(items, index)

    def row(self, task: str, number: int, position: int, length: int, template: int) -> tuple[str, str]:
        """Return question and answer of one row.

        Args:
            task: Its name.
            number: Number of the user or, for tasks about one item, of the item.
            position: Position of the target in the user's sequence.
            length: Length of the history.
            template: Number of the template.
        """
        if task in ITEM_TASKS:
            return self._item_row(task, self.keys[number], template)
        sequence = self.users[number]
        history, target = sequence[position - length : position], sequence[position]
        return self._user_row(task, history, target, template)

    def _item_row(self, task: str, key: str, number: int) -> tuple[str, str]:
        item, sid = self.items[key], self.sid[key]
        if task == "item2index":
            text = item.title if number % 3 == 0 else (title_and_description, telling_text)[number % 3 - 1](item)
            return prompts.ITEM_TO_INDEX[number].format(text=text), sid
        if task == "index2item":
            kind, template = KINDS[task][number]
            return template.format(sid=sid), item.title if kind == "title" else description(item)
        kind, template = KINDS[task][number]
        text = features(item)
        return template.format(sid=sid, text=text), text if kind == "features" else sid

    def _user_row(self, task: str, history: Sequence[str], target: str, number: int) -> tuple[str, str]:
        sids, sid = "".join(self.sid[item] for item in history), self.sid[target]
        if task == "seqrec":
            return TEMPLATES["direct"][number].format(history=sids), sid
        if task == "preferenceobtain":
            return prompts.PREFERENCE[number].format(history=sids), self.preference(history)
        if task == REASONING:
            return TEMPLATES["reasoning"][0].format(history=sids), self.teacher.chain(history, target)
        kind, template = KINDS[task][number]
        if task == "fusionseqrec":
            titles = self.titles(history[-TITLES_SHOWN:]) if "{titles}" in template else ""
            item = self.items[target]
            answer = sid if kind == "sid" else item.title if kind == "title" else description(item)
            return template.format(history=sids, titles=titles), answer
        if task == "itemsearch":
            query = features(self.items[target]) if "{query}" in template else ""
            preference = self.preference(history) if "{preference}" in template else ""
            return template.format(history=sids, query=query, preference=preference), sid
        titles = self.titles(history)  # the question or the answer has them
        return template.format(history=sids, titles=titles), titles if kind == "titles" else sids

    def titles(self, history: Sequence[str]) -> str:
        """Return short titles with semicolons between."""
        return "; ".join(short_title(self.items[item].title) for item in history)

    def preference(self, history: Sequence[str]) -> str:
        """Return the traits that are most frequent in a history; the last title when there are none."""
        counts = Counter(name for item in history for name in self.teacher.traits[item])
        return ", ".join(name for name, _ in counts.most_common(3)) or short_title(self.items[history[-1]].title)


def plain_specs(corpus: Corpus, task: str, specs: np.ndarray) -> list[list[int]]:
    """Return number of the user or item, position, length and template of every row."""
    numbers, positions = specs[:, TARGET], np.zeros(len(specs), np.int64)
    if task not in ITEM_TASKS:
        users = np.searchsorted(corpus.starts, numbers, side="right") - 1
        numbers, positions = users, numbers - corpus.starts[users]
    return np.stack([numbers, positions, specs[:, LENGTH], specs[:, TEMPLATE]], axis=1).tolist()


def make_data(root: str, interactions: int, seed: int) -> None:
    """Write a data set: about 8 interactions a user, 50 an item, titles, descriptions, categories, random SIDs."""
    generator = np.random.default_rng(seed)
    users, count = interactions * 3 // 25, interactions // 50
    words = np.array([f"{first}{last}" for first in ("ba", "ki", "mo", "tre", "su") for last in range(400)])
    kinds = [f"Kind {number}" for number in range(400)]
    items = {}
    for item in range(count):
        title, text = (" ".join(generator.choice(words, size)) for size in generator.integers((3, 10), (12, 60)))
        names = ["All", *(kinds[kind] for kind in generator.choice(400, generator.integers(1, 5), replace=False))]
        items[str(item)] = vars(Item(title, text, f"Brand {item % 997}", tuple(names)))
    folder = DataFolder(root, "made")
    write_json(folder.item, items)
    lengths = 5 + generator.geometric(1 / (interactions / users - 4), users)
    popular = (count * generator.random(int(lengths.sum())) ** 2).astype(np.int64).tolist()
    ends = np.cumsum(lengths).tolist()
    write_json(
        folder.inter,
        {
            str(user): [str(item) for item in popular[end - length : end]]
            for user, (end, length) in enumerate(zip(ends, lengths.tolist(), strict=True))
        },
    )
    codes = generator.permutation(256**4 >> 8)[:count] * 256 + generator.integers(256, size=count)
    ItemIndex.from_codes(list(items), np.stack(np.unravel_index(codes, (256,) * 4), axis=1).tolist()).save(folder.index)


def read(root: str) -> tuple[dict[str, Sequence[str]], dict[str, Item], ItemIndex]:
    folder = DataFolder(root, "made")
    items = folder.read_items()
    return folder.read_training(items), items, folder.read_index(items)


def ours(root: str, rows: int | None, name: str) -> dict[str, float]:
    """Make rows our way: all that exist, or ``rows`` of them in the same proportions."""
    data = read(root)
    start = time.perf_counter()
    corpus = Corpus(*data)
    del data
    prepared = time.perf_counter()
    exist = {task: TASKS[task].exist(corpus) for task in TASKS}
    counts = mix.asked_rows(exist, exist, rows) if rows else exist
    plan = mix.plan_mix(corpus, counts, seed=0, block=16)
    planned = time.perf_counter()
    mix.write_rows(Path(root, f"{name}.parquet"), corpus, plan)
    done = time.perf_counter()
    if rows:
        specs = {
            task: plain_specs(corpus, task, chosen.specs) for task, chosen in zip(plan.tasks, plan.chosen, strict=True)
        }
        write_json(Path(root, "specs.json"), {"specs": specs, "order": plan.order.tolist()})
    return _measured(len(plan.order), prepare=prepared - start, plan=planned - prepared, write=done - planned)


def plain(root: str, name: str) -> dict[str, float]:
    """Make the rows of the specs that ours drew, one by one."""
    data = read(root)
    given = json.loads(Path(root, "specs.json").read_text())
    flat = [(task, spec) for task, specs in given["specs"].items() for spec in specs]
    start = time.perf_counter()
    corpus = PlainCorpus(*data)
    corpus.teacher.traits  # noqa: B018 - made when first asked for
    prepared = time.perf_counter()
    rows = []
    for number in given["order"]:
        task, spec = flat[number]
        question, answer = corpus.row(task, *spec)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
        rows.append({"conversations": turns, "system": SYSTEM["reasoning"] if task == REASONING else "", "task": task})
    pq.write_table(pa.Table.from_pylist(rows, mix.SCHEMA), Path(root, f"{name}.parquet"), compression="zstd")
    return _measured(len(rows), prepare=prepared - start, write=time.perf_counter() - prepared)


def same(root: str) -> bool:
    """Return whether both sides wrote the same rows."""
    made, expected = (pq.read_table(Path(root, f"{name}.parquet")) for name in ("ours", "plain"))
    return bool(made.equals(expected))


def peak_megabytes() -> float:
    """Return the most memory this process ever held; `ru_maxrss` would count the one that started it too."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def _measured(rows: int, **seconds: float) -> dict[str, float]:
    """Return what a side took; the memory is the most its process ever had, files read and all."""
    return {"rows": rows, "megabytes": peak_megabytes(), **seconds}


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run both sides and print rows a second, memory and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--interactions", type=int, default=INTERACTIONS)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK:,} interactions")
    parser.add_argument("--plain-rows", type=int, default=PLAIN_ROWS, help="rows that both sides make and compare")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    interactions = QUICK if options.quick else options.interactions
    table = Table(title=f"SFT rows of {interactions:,} interactions, one process each")
    for column in ("side", "rows", "prepare s", "plan s", "write s", "written/s", "peak MB"):
        table.add_column(column, justify="left" if column == "side" else "right")

    def show(side: str, got: dict[str, float]) -> dict[str, float]:
        seconds = (f"{got[part]:.1f}" if part in got else "" for part in ("prepare", "plan", "write"))
        table.add_row(
            side, f"{got['rows']:,}", *seconds, f"{got['rows'] / got['write']:,.0f}", f"{got['megabytes']:,.0f}"
        )
        return got

    with tempfile.TemporaryDirectory() as root:
        alone(make_data, root, interactions, options.seed)
        alone(ours, root, 900, "warm")  # compiles
        fast = show("ours", alone(ours, root, options.plain_rows, "ours"))
        slow = show("plain Python", alone(plain, root, "plain"))
        if not alone(same, root):
            raise SystemExit("the rows differ")
        everything = alone(ours, root, None, "all")
        show("ours, tenth", alone(ours, root, everything["rows"] // 10, "tenth"))
        show("ours, all", everything)
    Console().print(table)
    print(f"equal rows; same rows, rendering and writing: {slow['write'] / fast['write']:.1f} times as fast")
    whole = sum(everything[part] for part in ("prepare", "plan", "write")) / everything["rows"]
    print(f"all rows, everything but reading files: {slow['write'] / slow['rows'] / whole:.1f} times as fast a row")


if __name__ == "__main__":
    main()
