"""A Qwen3 small enough to train on a laptop, with a tokenizer trained on the data set's own text.

It is the test bed: everything that later runs on Qwen3-4B runs on this first, through the same code.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gream_verl.core.files import require_file, write_json
from gream_verl.core.semantic_ids import SID_TOKEN, ItemIndex
from gream_verl.model.saving import new_folder, save_model
from gream_verl.model.vocabulary import RECORD, extend_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# ChatML as Qwen3-4B-Instruct-2507 writes it for plain conversations.
CHAT_TEMPLATE = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HEAD = 32
"""Width of an attention head: the smallest that vLLM takes on a CPU."""
# Qwen's own split of text into words, before byte-pair merges.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def read_sft_texts(mix: Path) -> Iterator[str]:
    """Yield every text of an SFT file: system prompts and turns."""
    import polars as pl

    require_file(mix, "make it with `gream data mix`")
    rows = pl.read_parquet(mix, columns=["conversations", "system"], glob=False)
    for row in rows.iter_rows(named=True):
        yield row["system"]
        yield from (turn["value"] for turn in row["conversations"])


def train_tokenizer(texts: Iterable[str], vocabulary_size: int = 2048) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on ``texts``, with Qwen's word split and chat template.

    SID tokens are cut out of the texts first: they join the vocabulary whole, later.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((SID_TOKEN.sub(" ", text) for text in texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_tiny_model(
    texts: Iterable[str],
    index: ItemIndex,
    output: str | Path,
    *,
    vocabulary_size: int = 2048,
    hidden_size: int = 128,
    layers: int = 3,
    seed: int = 0,
) -> dict[str, int]:
    """Write an untrained tiny Qwen3 that knows the SIDs of ``index``, and replace an earlier one.

    The tokenizer learns ``vocabulary_size`` tokens of ``texts`` and gets the SID tokens. ``hidden_size`` is the width
    of the residual stream; each 32 of it make an attention head.

    Returns:
        ``parameters`` and ``vocabulary`` (with padding rows).
    """
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with new_folder(Path(output), "tiny", replace=True) as folder:
        tokenizer = train_tokenizer(texts, vocabulary_size)
        heads = max(1, hidden_size // HEAD)
        config = Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 2),
            head_dim=HEAD,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = Qwen3ForCausalLM(config).to(torch.float32)
        record = extend_model(model, tokenizer, index, rows="mean", seed=seed)
        save_model(model, tokenizer, folder)
        write_json(folder / RECORD, record, indent=1)
    return {"parameters": sum(p.numel() for p in model.parameters()), "vocabulary": model.config.vocab_size}
