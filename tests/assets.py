"""Small real things that tests share: an item index, a tokenizer, a random Qwen3, training files."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.model import tiny_model
from gream_verl.model.tiny_model import train_tokenizer
from gream_verl.model.vocabulary import add_sid_tokens

TITLES = ("Alien", "Toy Story", "Fargo", "Heat", "Casablanca", "Psycho", "Jaws", "Brazil")


def make_index(items: int = 24, levels: int = 3, codes: int = 4) -> ItemIndex:
    """Return an index of distinct paths, the last two items sharing one and so having a collision token."""
    paths = [[(item // codes**level) % codes for level in reversed(range(levels))] for item in range(items - 1)]
    collision = [[*paths[-1], 0], [*paths[-1], 1]]
    return ItemIndex.from_codes([str(item) for item in range(items)], [*paths[:-1], *collision])


def make_tokenizer(texts: Iterable[str], index: ItemIndex, vocabulary: int = 512) -> Any:
    """Return the project's own tokenizer, trained on ``texts``, that knows the SIDs of ``index``."""
    tokenizer = train_tokenizer(texts, vocabulary)
    add_sid_tokens(tokenizer, index)
    return tokenizer


def make_tiny_model(
    folder: str | os.PathLike[str],
    index: ItemIndex,
    *,
    texts: Sequence[str] = TITLES,
    hidden: int = 64,
    layers: int = 2,
    vocabulary: int = 512,
    seed: int = 0,
) -> Path:
    """Save a random Qwen3 and a tokenizer that knows the SIDs of ``index``; return the folder."""
    tiny_model.make_tiny_model(
        [*texts, "system user assistant <answer> </answer>"],
        index,
        folder,
        vocabulary_size=vocabulary,
        hidden_size=hidden,
        layers=layers,
        seed=seed,
    )
    return Path(folder)


def reasoning_response(sid: str) -> str:
    """Return a well-formed response in reasoning mode."""
    return f"<think>likes Alien.</think>{sid}<answer>{sid}</answer>"


def rl_rows(index: ItemIndex, rows: int, mode: str = "reasoning", data_source: str = "tiny") -> list[dict[str, Any]]:
    """Return rows as verl's parquet files hold them."""
    items = list(index.sids)
    made = []
    for row in range(rows):
        history = [items[(row + step) % len(items)] for step in range(5)]
        target = items[(row + 5) % len(items)]
        made.append(
            {
                "data_source": data_source,
                "prompt": [{"role": "user", "content": f"{' '.join(index.texts(history))} What is next?"}],
                "ability": "recommendation",
                "reward_model": {"style": "rule", "ground_truth": index.text(target)},
                "extra_info": {
                    "index": row,
                    "user": str(row),
                    "item": target,
                    "title": TITLES[row % len(TITLES)],
                    "type": mode,
                    "history": history,
                },
            }
        )
    return made


def teach_form(folder: str | os.PathLike[str], index: ItemIndex, steps: int = 150, seed: int = 0) -> None:
    """Train the model in ``folder`` until it answers in the right form, with SIDs that are mostly wrong."""
    draw = random.Random(seed)
    items = list(index.sids)
    teach(folder, index, lambda _: reasoning_response(index.text(draw.choice(items))), steps, seed)


def teach(
    folder: str | os.PathLike[str], index: ItemIndex, respond: Callable[[int], str], steps: int = 150, seed: int = 0
) -> None:
    """Train the model in ``folder`` to give ``respond(row)`` to the prompts of ``rl_rows``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    texts = [
        tokenizer.apply_chat_template(
            [*row["prompt"], {"role": "assistant", "content": respond(number)}], tokenize=False
        )
        for number, row in enumerate(rl_rows(index, 256))
    ]
    for _ in range(steps):
        batch = tokenizer(draw.sample(texts, 16), return_tensors="pt", padding=True, add_special_tokens=False)
        # padding comes after <|im_end|> and teaches nothing
        model(**batch, labels=batch.input_ids.masked_fill(batch.attention_mask == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)


def write_rl_files(folder: str | os.PathLike[str], index: ItemIndex, name: str = "tiny", rows: int = 64) -> Path:
    """Write ``name``-rl.parquet, ``name``-val.parquet and ``name``.index.json; return the folder."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rl_rows(index, rows, data_source=name)), folder / f"{name}-rl.parquet")
    pq.write_table(pa.Table.from_pylist(rl_rows(index, 8, data_source=name)), folder / f"{name}-val.parquet")
    index.save(folder / f"{name}.index.json")
    return folder
