"""SFT rows: the time and the memory of all eight alignment tasks, every row that exists, on made-up data.

python benchmarks/data_tasks.py            # 5 million interactions, half an hour
python benchmarks/data_tasks.py --quick    # 200 thousand interactions, a million rows
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from data_processing.sft.mix import MixOptions, write_mix
from data_processing.sft.tasks import REASONING, TASKS
from gream_verl.core.data_folder import DataFolder, Item
from gream_verl.core.files import write_json
from gream_verl.core.semantic_ids import ItemIndex

INTERACTIONS, QUICK = 5_000_000, 200_000


def make_data(root: str, interactions: int, seed: int) -> None:
    """Write a data set: about 8 interactions per user, 50 per item, titles, descriptions, categories, random SIDs."""
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
    sequences = {
        str(user): [str(item) for item in popular[end - length : end]]
        for user, (end, length) in enumerate(zip(ends, lengths.tolist(), strict=True))
    }
    write_json(folder.inter, sequences)
    codes = generator.permutation(256**4 >> 8)[:count] * 256 + generator.integers(256, size=count)
    ItemIndex.from_codes(list(items), np.stack(np.unravel_index(codes, (256,) * 4), axis=1).tolist()).save(folder.index)


def measure(root: str, share: float) -> tuple[int, float, float]:
    """Write a share of the rows of every task; return the rows, the seconds and the peak of memory in MB."""
    start = time.perf_counter()
    tasks = {task: share for task in TASKS if task != REASONING}
    folder = DataFolder(root, "made")
    report = write_mix(folder, MixOptions(tasks, block=16), folder.align)
    rows = sum(counts["made"] for counts in report.values())
    return rows, time.perf_counter() - start, peak_megabytes()


def peak_megabytes() -> float:
    """Return the most memory that this process ever held; `ru_maxrss` would count the one that started it too."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main(arguments: Sequence[str] | None = None) -> None:
    """Write a tenth of the rows, then all, and print rows, seconds and memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--interactions", type=int, default=INTERACTIONS)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK:,} interactions")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as root:
        alone(make_data, root, QUICK if options.quick else options.interactions, options.seed)
        for share in (0.1, 1.0):
            rows, seconds, megabytes = alone(measure, root, share)
            print(f"{rows:,} rows: {seconds:.1f} s, {rows / seconds:,.0f} rows per second, peak {megabytes:,.0f} MB")


if __name__ == "__main__":
    main()
