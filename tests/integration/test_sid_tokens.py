"""SID tokens are ordinary added tokens: what every engine makes of them, and what it would make of special ones.

The choice lives in `model.vocabulary.add_sid_tokens`. The tests of special tokens say why: when one of them
fails, an engine has changed and the choice can be made again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from assets import TITLES, make_index, make_tiny_model, rl_rows, teach
from hypothesis import given, settings
from hypothesis import strategies as st
from sft_run import train
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from gream_verl.core.files import write_json
from gream_verl.core.semantic_ids import find_tokens
from gream_verl.decoding.prefix_tree import sid_ids
from gream_verl.model.tiny_model import CHAT_TEMPLATE, SPECIAL_TOKENS, train_tokenizer
from gream_verl.model.vocabulary import add_sid_tokens

pytestmark = [pytest.mark.integration, pytest.mark.timeout(200)]

INDEX = make_index()
SIDS = [INDEX.text(item) for item in INDEX.sids]
FIRST, LAST = SIDS[0], SIDS[-1]  # three levels; three and the one that tells items of a collision apart
RESPONSE = f"<think>{FIRST} first, then\n{LAST}.</think> {LAST}<answer>{LAST}</answer> and {FIRST}!"
TEXTS = [*TITLES, "system user assistant", "0123456789 10 200", "like \"this\": [it's], don't\n\n\tand so on ..."] * 4

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def qwen_like() -> Any:
    return train_tokenizer(TEXTS, 400)


def llama3_like() -> Any:
    """Byte-level BPE that takes digits by three, adds a first token, and prefers whole words to merges."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    words = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    train_words(tokenizer, ["<|begin_of_text|>", *SPECIAL_TOKENS], pre_tokenizers.ByteLevel.alphabet())
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    return for_chats(tokenizer)


def smollm2_like() -> Any:
    """Byte-level BPE with GPT-2's words and single digits."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    train_words(tokenizer, SPECIAL_TOKENS, pre_tokenizers.ByteLevel.alphabet())
    return for_chats(tokenizer)


def metaspace() -> Any:
    """SentencePiece's BPE, as of Gemma: a space is a letter, unknown letters are bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    spaces = decoders.Replace("▁", " ")
    tokenizer.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse()])
    train_words(tokenizer, ["<unk>", *SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))], [])
    saved = json.loads(tokenizer.to_str())
    saved["added_tokens"] = saved["added_tokens"][: 1 + len(SPECIAL_TOKENS)]  # bytes are words like others
    return for_chats(Tokenizer.from_str(json.dumps(saved)))


def train_words(tokenizer: Tokenizer, special: Sequence[str], alphabet: Sequence[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(special), initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)


def for_chats(tokenizer: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


FAMILIES = (qwen_like, llama3_like, smollm2_like, metaspace)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda make: make.__name__)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer of each family that was given the SID tokens, saved and loaded."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made = request.param()
    add_sid_tokens(made, INDEX)
    made.save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


WORDS = (
    *(" ", "  ", "\n", "\t", "a", "Z", "é", "🎬", "日本", "1", "42", ".", ", ", "'s", '"', "[", "]", '{"id": "', '"}'),
    *("<", "|", "<|", "|>", "_", "<|a_", "<|a_1", "a_1", "_1|>", "<think>", "</think>", "<answer>", "</answer>"),
)
PIECES = st.sampled_from(SIDS) | st.sampled_from(WORDS) | st.text(max_size=3).filter(str.isprintable)
CONTEXTS = st.lists(PIECES, max_size=12).map("".join)


@settings(max_examples=50)
@given(text=CONTEXTS)
def test_a_sid_token_is_one_token_in_every_context(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    known = sid_ids(INDEX, tokenizer)
    expected = [token for token in find_tokens(text) if token in known]
    assert [token for token in tokenizer.convert_ids_to_tokens(ids) if token in known] == expected
    for skip in (False, True):
        assert tokenizer.decode(ids, skip_special_tokens=skip) == text


@settings(max_examples=25)
@given(user=CONTEXTS, assistant=CONTEXTS)
def test_a_sid_token_is_one_token_in_a_turn_of_a_chat(tokenizer: Any, user: str, assistant: str) -> None:
    chat = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    ids = tokenizer.apply_chat_template(chat, return_dict=False)
    known = sid_ids(INDEX, tokenizer)
    expected = [token for token in find_tokens(user) + find_tokens(assistant) if token in known]
    assert [token for token in tokenizer.convert_ids_to_tokens(ids) if token in known] == expected


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model``, which gives RESPONSE to every prompt, and ``special``, the same with SIDs as special tokens."""
    folder = tmp_path_factory.mktemp("engines")
    make_tiny_model(folder / "model", INDEX, texts=TEXTS)
    teach(folder / "model", INDEX, lambda _: RESPONSE, steps=150)
    shutil.copytree(folder / "model", folder / "special")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    vocabulary = tokenizer.get_vocab()
    tokenizer.add_special_tokens({"additional_special_tokens": list(INDEX.tokens)})
    assert tokenizer.get_vocab() == vocabulary
    tokenizer.save_pretrained(folder / "special")
    return folder


def without_sids(text: str) -> str:
    for token in INDEX.tokens:
        text = text.replace(token, "")
    return text


def read_transformers(folder: Path) -> str:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        rl_rows(INDEX, 1)[0]["prompt"], add_generation_prompt=True, return_tensors="pt"
    )
    made = model.generate(**prompt, max_new_tokens=80, do_sample=False)
    assert made[0, -1] == tokenizer.eos_token_id
    return tokenizer.batch_decode(made[:, prompt["input_ids"].shape[1] :], skip_special_tokens=True)[0]


def test_transformers_keeps_an_item(folder: Path) -> None:
    assert read_transformers(folder / "model") == RESPONSE


def test_transformers_drops_an_item_of_special_tokens(folder: Path) -> None:
    assert read_transformers(folder / "special") == without_sids(RESPONSE)


def predict(folder: Path, model: str) -> list[dict[str, str]]:
    """Train and predict with stock LLaMA-Factory; return what it wrote."""
    for package in ("jieba", "nltk", "rouge_chinese"):
        pytest.importorskip(package, reason="LLaMA-Factory predicts with llamafactory[metrics] only")
    rows = [
        {"conversations": [{"from": "human", "value": row["prompt"][0]["content"]}, {"from": "gpt", "value": RESPONSE}]}
        for row in rl_rows(INDEX, 4)
    ]
    write_json(folder / "data" / "rows.json", rows)
    columns = {"messages": "conversations"}
    known = {"rows": {"file_name": "rows.json", "formatting": "sharegpt", "columns": columns}}
    write_json(folder / "data" / "dataset_info.json", known)
    train(
        folder,
        *(f"model_name_or_path={folder}/{model}", f"output_dir={folder}/sft-{model}", "dataset=rows"),
        *(
            "max_steps=1",
            "learning_rate=1.0e-9",
            "train_on_prompt=false",
            "per_device_train_batch_size=4",
            "gradient_accumulation_steps=1",
        ),
        *("do_predict=true", "predict_with_generate=true", "eval_dataset=rows", "max_new_tokens=80", "do_sample=false"),
    )
    return [json.loads(line) for line in (folder / f"sft-{model}" / "generated_predictions.jsonl").open()]


def test_llamafactory_keeps_an_item_in_labels_and_predictions(folder: Path) -> None:
    rows = predict(folder, "model")
    log = (folder / "sft.log").read_text()
    assert log.count(f"\nlabels:\n{RESPONSE}<|im_end|>") == 2  # of the first row that is trained, and predicted
    for row in rows:
        assert row["label"].strip() == RESPONSE
        assert row["predict"].strip() == RESPONSE


def test_llamafactory_ends_at_the_first_token_of_an_item_of_special_tokens(folder: Path) -> None:
    for row in predict(folder, "special"):
        assert row["label"].strip() == without_sids(RESPONSE)
        assert row["predict"].strip() == "<think>"


def test_vllm_keeps_an_item(folder: Path) -> None:
    pytest.importorskip("vllm", reason="vLLM is not installed")
    import torch

    from gream_verl.core.cpu_environment import set_defaults

    if not torch.cuda.is_available():
        set_defaults()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(folder / "model"),
        dtype="auto" if torch.cuda.is_available() else "float32",
        max_model_len=256,
        gpu_memory_utilization=0.3,
        enforce_eager=True,
    )
    outputs = []
    for skip in (True, False):
        parameters = SamplingParams(temperature=0, max_tokens=80, skip_special_tokens=skip)
        outputs += engine.chat(rl_rows(INDEX, 1)[0]["prompt"], parameters, use_tqdm=False)[0].outputs
    assert [(output.text, output.finish_reason) for output in outputs] == [(RESPONSE, "stop")] * 2
    assert detokenize(folder / "model", outputs[0].token_ids) == RESPONSE
    assert detokenize(folder / "special", outputs[0].token_ids) == without_sids(RESPONSE)


def detokenize(folder: Path, tokens: Sequence[int]) -> str:
    """Return what vLLM's own detokenizer makes of a response, with its default of skipping special tokens."""
    from vllm import SamplingParams
    from vllm.v1.engine import EngineCoreRequest
    from vllm.v1.engine.detokenizer import IncrementalDetokenizer

    fields = dict.fromkeys(EngineCoreRequest.__struct_fields__[:9])
    request = EngineCoreRequest(**fields | {"prompt_token_ids": [0], "sampling_params": SamplingParams()})
    reader = IncrementalDetokenizer.from_new_request(AutoTokenizer.from_pretrained(folder), request)
    reader.update(list(tokens), stop_terminated=False)
    return reader.get_next_output_text(finished=True, delta=False)
