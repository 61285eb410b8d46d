"""First values of the rows of semantic-ID tokens: the ones from which SFT starts best.

``python benchmarks/vocabulary_rows.py --base FOLDER --run FOLDER`` trains the same pretrained base on the same rows of
the SFT mix in the same order, and measures the loss of the responses on rows that no training saw: before the first
step, on the way and at the end. It compares the product's ``distribution`` and ``mean``, rows from the texts of the
items under a code, and two ways of Hugging Face: ``mean_resizing``, and rows drawn as for an untrained model.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from gream_verl.core.run_folder import RunFolder
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.model.vocabulary import add_sid_tokens, extend_model

ROLES = {"human": "user", "gpt": "assistant"}
IGNORED = -100
WARM_UP = 10


def resized(mean_resizing: bool) -> Callable[[Any, Any, ItemIndex], None]:
    """Return an extension by transformers alone."""

    def extend(model: Any, tokenizer: Any, index: ItemIndex) -> None:
        add_sid_tokens(tokenizer, index)
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=mean_resizing)

    return extend


def text_rows(model: Any, tokenizer: Any, index: ItemIndex, texts: dict[str, str], seed: int) -> None:
    """Extend a model by rows m + |s| d / |d| + 0.1 s z.

    m and s are mean and standard deviation of the base's rows, z is standard normal. d is what the items under a code
    say and others do not: the mean, over those items, of the mean row of the tokens of their texts, less the mean of
    that over the codes of the level. A code without texts gets d = 0.
    """
    base = len(tokenizer)
    extend_model(model, tokenizer, index, rows="mean", seed=seed)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    for weight in [embedding] if head is embedding else [embedding, head]:
        known: dict[str, list[torch.Tensor]] = {}
        for item, tokens in index.sids.items():
            if ids := tokenizer(texts.get(item, ""), add_special_tokens=False)["input_ids"]:
                row = weight.data[ids].float().mean(0)
                for token in tokens:
                    known.setdefault(token, []).append(row)
        means = {token: torch.stack(rows).mean(0) for token, rows in known.items()}
        spread = weight.data[:base].float().std(0).norm()
        for token, row in means.items():
            level = torch.stack([other for name, other in means.items() if name[2] == token[2]]).mean(0)
            direction = torch.nn.functional.normalize(row - level, dim=0)
            weight.data[tokenizer.convert_tokens_to_ids(token)] += spread * direction


def batches(mix: Path, tokenizer: Any, batch: int, longest: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Return shuffled batches [batch, tokens] of rows of at most ``longest`` tokens; labels only on responses."""
    rows = pl.read_parquet(mix).sample(fraction=1.0, shuffle=True, seed=seed).to_dicts()
    made, kept = [], []
    for row in rows:
        messages = [{"role": "system", "content": row["system"]}] if row["system"] else []
        messages += [{"role": ROLES[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        asked = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answered = tokenizer(messages[-1]["content"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        if len(asked) + len(answered) <= longest:
            kept.append((asked, answered))
        if len(kept) == batch:
            width = max(len(asked) + len(answered) for asked, answered in kept)
            ids, labels = torch.zeros(batch, width, dtype=torch.long), torch.full((batch, width), IGNORED)
            for place, (asked, answered) in enumerate(kept):
                ids[place, : len(asked) + len(answered)] = torch.tensor(asked + answered)
                labels[place, len(asked) : len(asked) + len(answered)] = torch.tensor(answered)
            made.append({"input_ids": ids, "labels": labels})  # right padding: no token attends to what comes after it
            kept = []
    return made


@torch.inference_mode()
def held_out_loss(model: Any, rows: list[dict[str, torch.Tensor]]) -> float:
    """Return the mean loss of a token of the responses."""
    tokens = [int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in rows]
    return sum(float(model(**batch).loss) * count for batch, count in zip(rows, tokens, strict=True)) / sum(tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", type=Path, default=Path("runs/pretrained/base"))
    parser.add_argument("--run", type=Path, default=Path("runs/pretrained"), help="run with an SFT mix")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--longest", type=int, default=256, help="tokens of a row; longer rows are left out")
    parser.add_argument("--held-out", type=int, default=4, help="batches that the loss is measured on")
    parser.add_argument("--rate", type=float, default=1e-4, help="after a linear warm-up of 10 steps")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    console = Console()
    if not given.base.exists() or not given.run.exists():
        console.print(f"skipped: it needs {given.base} (--base) and {given.run} (--run)", soft_wrap=True)
        return
    data = RunFolder.open(given.run).data
    index, mix = ItemIndex.load(data.index), data.mix
    texts = {
        item: " ".join([known.title, known.description, known.brand, *known.categories])
        for item, known in data.read_items().items()
    }
    ways: dict[str, Callable[[Any, Any, ItemIndex], Any]] = {
        "distribution": partial(extend_model, seed=given.seed),
        "mean": partial(extend_model, rows="mean", seed=given.seed),
        "texts": partial(text_rows, texts=texts, seed=given.seed),
    }
    ways |= {"transformers, mean_resizing": resized(True), "transformers, untrained": resized(False)}
    tokenizer = AutoTokenizer.from_pretrained(given.base)
    add_sid_tokens(tokenizer, index)
    rows = batches(mix, tokenizer, given.batch, given.longest, given.seed)
    if len(rows) < given.steps + given.held_out:
        parser.error(
            f"{mix} has {len(rows)} batches of rows of at most {given.longest} tokens, fewer than --steps "
            f"{given.steps} and --held-out {given.held_out}; lower those or --batch, or raise --longest"
        )
    training, held_out = rows[: given.steps], rows[-given.held_out :]
    points = sorted({0, given.steps // 4, given.steps // 2, given.steps})
    columns = [Column(f"after {point}", justify="right") for point in points]
    table = Table("first rows", *columns, Column("seconds", justify="right"), title="Held-out loss", box=SIMPLE_HEAD)
    for name, extend in ways.items():
        tokenizer = AutoTokenizer.from_pretrained(given.base)
        model = AutoModelForCausalLM.from_pretrained(given.base, dtype=torch.float32)
        extend(model, tokenizer, index)
        optimizer = torch.optim.AdamW(model.parameters(), lr=given.rate, weight_decay=0.0)
        warm_up = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP))
        losses, begin = [held_out_loss(model, held_out)], time.perf_counter()
        for step, batch in enumerate(training, 1):
            model(**batch).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            warm_up.step()
            optimizer.zero_grad()
            if step in points:
                losses.append(held_out_loss(model, held_out))
        cells = [f"{loss:.3f}" for loss in losses]
        table.add_row(name, *cells, f"{time.perf_counter() - begin:.0f}")
        console.print(f"{name}: {' '.join(cells)}")
    console.print(table)


if __name__ == "__main__":
    main()
