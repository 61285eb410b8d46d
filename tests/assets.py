"""Small real things that tests share: an item index, a tokenizer, a random Qwen3, training files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gream_verl.semantic_ids import ItemIndex

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TITLES = ("Alien", "Toy Story", "Fargo", "Heat", "Casablanca", "Psycho", "Jaws", "Brazil")


def make_index(items: int = 24, levels: int = 3, codes: int = 4) -> ItemIndex:
    """Return an index of distinct paths, the last two items sharing one and so having a collision token."""
    paths = [[(item // codes**level) % codes for level in reversed(range(levels))] for item in range(items - 1)]
    collision = [[*paths[-1], 0], [*paths[-1], 1]]
    return ItemIndex.from_codes([str(item) for item in range(items)], [*paths[:-1], *collision])


def make_tokenizer(texts: Iterable[str], index: ItemIndex, vocabulary: int = 512) -> Any:
    """Return a BPE tokenizer trained on ``texts``, with ChatML, ``<think>`` and the SID tokens as ordinary tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    ordinary = ["<think>", "</think>", *index.tokens]
    bpe.add_tokens([AddedToken(token, special=False, normalized=False) for token in ordinary])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
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
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = make_tokenizer([*texts, "system user assistant <answer> </answer>"], index, vocabulary)
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=(len(tokenizer) + 63) // 64 * 64,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,  # the smallest that vLLM's CPU attention takes
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).float()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
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
    import random

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(seed)
    draw = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    texts = [
        tokenizer.apply_chat_template(
            [
                *row["prompt"],
                {"role": "assistant", "content": reasoning_response(index.text(draw.choice(list(index.sids))))},
            ],
            tokenize=False,
        )
        for row in rl_rows(index, 256)
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
