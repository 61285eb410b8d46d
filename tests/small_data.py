"""A small data set that tests of data processing share."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import numpy as np

from gream_verl.core.data_folder import DataFolder, Item
from gream_verl.core.files import write_json
from gream_verl.core.semantic_ids import ItemIndex

GENRES = ("Drama", "Comedy", "Crime", "War", "Western")
NUMBERS = ("Alpha", "Bravo", "Charlie", "Delta", "Echo", "Foxtrot", "Golf", "Hotel", "India", "Juliett")


def title_of(number: int) -> str:
    """Return a title that no other item has and that no other title contains."""
    return f"{NUMBERS[number // 10 % 10]} {NUMBERS[number % 10]} Story"


def make_data(root: Path, *, users: int = 12, items: int = 60, longest: int = 16, seed: int = 0) -> DataFolder:
    """Write a data set whose held-out items (the last ten) occur nowhere but in the last two places of users."""
    generator = np.random.default_rng(seed)
    folder = DataFolder(root, "small")
    catalogue = {
        str(number): Item(
            title_of(number),
            "Released in 1995.",
            categories=tuple(GENRES[genre] for genre in sorted({number % 5, number % 3})),
        )
        for number in range(items)
    }
    seen, held_out = items - 10, np.arange(items - 10, items)
    sequences = {}
    for user in range(users):
        past = generator.choice(seen, int(generator.integers(1, longest - 1)), replace=False)
        last = generator.choice(held_out, 2, replace=False)
        sequences[str(user)] = [str(item) for item in [*past, *last]]
    write_json(folder.item, {key: asdict(item) for key, item in catalogue.items()})
    write_json(folder.inter, sequences)
    codes = [(number // 16, number // 4 % 4, number % 4) for number in range(items - 2)]
    collision = [(3, 3, 3, 0), (3, 3, 3, 1)]
    ItemIndex.from_codes(list(catalogue), [*codes, *collision]).save(folder.index)
    return folder
