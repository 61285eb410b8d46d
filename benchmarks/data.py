"""Ingest of raw data: ours against plain Python.

Reviews and metadata are read, texts of items cleaned, repeats dropped, the 5-core taken, every user's items put
in order and split by leave-one-out. The plain side does it as research code does: `gzip.open`, `json.loads` per line,
dictionaries of lists, loops until the core stands. The reviews are made up, in the format of Amazon 2018, with dirty
lines and about as many users and items as real dumps of that size. Every pass runs in its own process. The run fails
when the results differ. Compare processor seconds on a machine with busy cores: ours unpacks in a second thread.

    python benchmarks/data.py                       # 5 million reviews: some minutes, 1 GB on disk for a while
    python benchmarks/data.py --reviews 200000      # a quick look
"""

from __future__ import annotations

import argparse
import gzip
import html
import json
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

CORE = 5
AIM_RATIO, AIM_MEGABYTES = 2, 2000
REVIEWS, METADATA = "reviews.json.gz", "metadata.json.gz"
CHUNK = 100_000
TEXTS, WORDS = 20_000, 5_000
DAY, FIRST_DAY, LAST_DAY = 86_400, 12_000, 17_800


def make_dump(folder: Path, reviews: int, seed: int = 0) -> None:
    """Write reviews and metadata; the same arguments give the same lines.

    Users write 1.9 reviews on average, with a tail of some hundred. Items have 18 on average; the share of an item
    falls with its rank. One line in 50 repeats a user and item, one in 10,000 is dirty, one item in 30 has no title.
    """
    import numpy as np
    from isal import igzip

    draw = np.random.default_rng(seed)
    letters = draw.integers(97, 123, (WORDS, 12), np.uint8)
    words = [row[:length].tobytes().decode() for row, length in zip(letters, draw.integers(2, 12, WORDS), strict=True)]
    words[::50] = ["\\u2019s", '\\"so\\"', "a &amp; b", "<br />", "\\ud83d\\ude00"] * (WORDS // 250)
    lengths = np.clip(draw.lognormal(3.4, 0.9, TEXTS), 2, 400).astype(int)
    texts = [" ".join(words[place] for place in draw.integers(0, WORDS, length)) for length in lengths]

    activity = np.minimum(draw.zipf(2.5, reviews), 500)
    users = np.repeat(np.arange(reviews), activity)[:reviews]
    share = (np.arange(max(reviews // 18, 10)) + 10.0) ** -0.9
    items = draw.choice(len(share), reviews, p=share / share.sum())
    again = draw.integers(1, reviews, reviews // 50)
    users[again], items[again] = users[again - 1], items[again - 1]
    order = draw.permutation(reviews)
    users, items = users[order], items[order]
    dirty = iter(
        ['{"overall": 5.0, "reviewerID": "A', '{"overall": 5.0, "unixReviewTime": 1400000000}', "", "[1, 2]"] * reviews
    )
    with igzip.open(folder / REVIEWS, "wb", compresslevel=1) as file:
        for start in range(0, reviews, CHUNK):
            part = slice(start, min(start + CHUNK, reviews))
            size = part.stop - start
            columns = [
                users[part], items[part], draw.integers(FIRST_DAY, LAST_DAY, size) * DAY, draw.integers(1, 6, size),
                draw.integers(0, TEXTS, size), draw.integers(0, TEXTS, size), draw.integers(0, 10_000, size),
            ]  # fmt: skip
            lines = [
                f'{{"overall": {rating}.0, "verified": true, "reviewTime": "02 26, 2014", "reviewerID": "A{user:013}", '
                f'"asin": "B{item:09}", "style": {{"Size:": " {rating}"}}, "reviewerName": "{words[title % WORDS]}", '
                f'"reviewText": "{texts[text]}", "summary": "{texts[title][:30].rpartition(" ")[0]}", '
                f'"unixReviewTime": {moment}}}'
                if chance
                else next(dirty)
                for user, item, moment, rating, text, title, chance in zip(*(c.tolist() for c in columns), strict=True)
            ]
            file.write(("\n".join(lines) + "\n").encode())
    others = ", ".join(f'"B{item:09}"' for item in draw.integers(0, len(share), 18))
    picture = '"https://images.example.com/images/I/61xe7XAgMoL._SX38_SY50_CR,0,0,38,50_.jpg"'
    extras = f'"also_buy": [{others}], "also_view": [{others}], "image": [{picture}, {picture}], "rank": "5 in Snacks"'
    with igzip.open(folder / METADATA, "wb", compresslevel=1) as file:
        for item, (title, text) in enumerate(draw.integers(0, TEXTS, (len(share), 2)).tolist()):
            named = texts[title].replace("<br />", "and")[:40].rpartition(" ")[0] if title % 30 else ""
            described = f'"{texts[text]}"' if title % 30 else ""
            file.write(
                f'{{"category": ["Grocery", "Snacks &amp; more", "{words[title % 40]}"], "description": '
                f'[{described}], "fit": "", "title": "{named}", {extras}, "brand": "{words[text % 40 + 1]}", '
                f'"feature": [], "details": {{"Shipping Weight:": "2 pounds", "ASIN: ": "B{item:09}"}}, '
                f'"price": "$5", "asin": "B{item:09}"}}\n'.encode()
            )


def plainly(folder: Path) -> dict[str, Any]:
    """Ingest with the standard library, line by line."""

    def lines(name: str) -> Iterator[dict[str, Any]]:
        with gzip.open(folder / name, "rb") as file:
            for line in file:
                try:
                    value = json.loads(line)
                except ValueError:
                    continue
                if isinstance(value, dict):
                    yield value

    def clean(text: str) -> str:
        return " ".join(re.sub(r"</?\w+[^>]*>", " ", html.unescape(html.unescape(text))).split())

    items = {}
    for line in lines(METADATA):
        title = clean(line["title"])
        if title:
            categories = [clean(name) for name in line["category"]]
            description = clean(" ".join(line["description"]))
            fields = {
                "title": title,
                "description": description,
                "brand": clean(line["brand"]),
                "categories": categories,
            }
            items[line["asin"]] = fields
    by_user: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for number, line in enumerate(lines(REVIEWS)):
        if "reviewerID" in line and "asin" in line and line["asin"] in items:
            by_user[line["reviewerID"]].append((int(line["unixReviewTime"]), number, line["asin"]))
    for user, taken in by_user.items():
        first: dict[str, tuple[int, int, str]] = {}
        for entry in sorted(taken):
            first.setdefault(entry[2], entry)
        by_user[user] = list(first.values())
    while True:
        popular = Counter(item for taken in by_user.values() for _, _, item in taken)
        kept = {
            user: [entry for entry in taken if popular[entry[2]] >= CORE]
            for user, taken in by_user.items()
            if len(taken) >= CORE
        }
        if sum(map(len, kept.values())) == sum(map(len, by_user.values())):
            break
        by_user = defaultdict(list, kept)
    sequences = {user: [item for _, _, item in sorted(kept[user])] for user in sorted(kept)}
    kept_items = {item: items[item] for item in sorted({item for taken in sequences.values() for item in taken})}
    (folder / "plain.inter.json").write_text(json.dumps(sequences, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "plain.item.json").write_text(json.dumps(kept_items, ensure_ascii=False) + "\n", encoding="utf-8")
    return _split(sequences)


def ours(folder: Path) -> dict[str, Any]:
    """Ingest as `gream data prepare` does."""
    from data_processing.interactions import prepare
    from data_processing.sources.amazon import read_amazon
    from gream_verl.core.data_folder import DataFolder

    target = DataFolder(folder, "ours")
    prepare(read_amazon(2018, folder / REVIEWS, folder / METADATA), target, core=CORE)
    return _split(json.loads(target.inter.read_bytes()))


def _split(sequences: dict[str, list[str]]) -> dict[str, int]:
    """Split by leave-one-out; return the sizes of the parts."""
    train = {user: items[:-2] for user, items in sequences.items()}
    validation = {user: items[-2] for user, items in sequences.items()}
    test = {user: items[-1] for user, items in sequences.items()}
    return {"training": sum(map(len, train.values())), "validation": len(validation), "test": len(test)}


def peak_megabytes() -> float:
    """Return the peak memory of this process; `ru_maxrss` would count its parent too."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


STEPS = {"plain": plainly, "ours": ours}


def run_step(step: str, folder: Path, reviews: int) -> dict[str, Any]:
    """Run one step in its own process; return its outcome, seconds, processor seconds and peak memory in MB."""
    command = [sys.executable, __file__, "--step", step, "--folder", str(folder), "--reviews", str(reviews)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{step} failed; its messages stand above")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def ingest(reviews: int, console: Console) -> None:
    """Run both sides on a tenth of the reviews and on all, and print seconds, ratio and memory."""
    table = Table("reviews", "side", "seconds", "processor s", "ratio", "peak MB", "users kept", title="ingest")
    for count in (reviews // 10, reviews):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            run_step("make", folder, count)
            console.print(f"{count:,} reviews, {(folder / REVIEWS).stat().st_size / 1e6:.0f} MB of gzip")
            results = {step: run_step(step, folder, count) for step in STEPS}
            for kind in ("inter", "item"):
                plain, ours = (json.loads((folder / f"{step}.{kind}.json").read_bytes()) for step in STEPS)
                if list(plain.items()) != list(ours.items()):
                    raise SystemExit(f"{kind}.json differs")
        for step, result in results.items():
            ratio = results["plain"]["seconds"] / result["seconds"]
            row = (f"{result['seconds']:.1f}", f"{result['processor']:.1f}", f"{ratio:.1f}", f"{result['peak']:.0f}")
            table.add_row(f"{count:,}", step, *row, f"{result['outcome']['test']:,}")
    console.print(table)
    peak = results["ours"]["peak"]
    console.print(f"aims at 5,000,000: ratio {AIM_RATIO}, peak of ours under {AIM_MEGABYTES} MB")
    console.print(f"here at {reviews:,}: ratio {ratio:.1f}, peak {peak:.0f} MB, results equal")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark, or one step of it in its own process."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reviews", type=int, default=5_000_000)
    parser.add_argument("--step", choices=["make", *STEPS], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.step == "make":
        make_dump(options.folder, options.reviews)
        print("{}")
    elif options.step:
        started = time.perf_counter()
        outcome = STEPS[options.step](options.folder)
        seconds = time.perf_counter() - started
        result = {"outcome": outcome, "seconds": seconds, "processor": time.process_time(), "peak": peak_megabytes()}
        print(json.dumps(result))
    else:
        ingest(options.reviews, Console())


if __name__ == "__main__":
    main()
