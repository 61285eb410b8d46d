import json

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from gream_verl.core.errors import InputError
from gream_verl.core.files import write_json
from gream_verl.core.semantic_ids import SID_TOKEN, ItemIndex
from gream_verl.decoding.prefix_tree import sid_ids
from gream_verl.model.tiny_model import make_tiny_model, train_tokenizer
from gream_verl.model.vocabulary import (
    NOISE,
    RECORD,
    extend_checkpoint,
    extend_model,
    padding_multiple,
    require_dialogue,
    require_sid_tokens,
)

INDEX = ItemIndex.from_codes([str(n) for n in range(12)], [[n // 4, n % 4] for n in range(12)])
TEXTS = ["Recommend the next film after Fargo (1996), a Drama.", "Heat is a Crime film <|a_1|><|b_2|>"] * 20
SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEMPLATE = "{{ bos_token }}{% for m in messages %}<|start|>{{ m.role }}\n\n{{ m.content }}<|eot|>{% endfor %}"


def qwen_tokenizer():
    """Byte-level BPE with Qwen's word split."""
    return train_tokenizer(TEXTS, 320)


def llama3_tokenizer():
    """Byte-level BPE that puts a token of its own in front, as Llama 3's does."""
    backend = Tokenizer(models.BPE(ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|begin|>", "<|eot|>", "<|start|>"]
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", pair="<|begin|> $A <|begin|>:1 $B:1", special_tokens=[("<|begin|>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|eot|>", chat_template=TEMPLATE
    )


def sentencepiece_tokenizer():
    """BPE on words that begin with a metaspace, as Llama 2's does."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=140, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False)
    # SID tokens are cut out: without a split into words, merges would make whole ones
    texts = [SID_TOKEN.sub("", text) for text in TEXTS]
    backend.train_from_iterator([*texts, "why, then\n"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def make_base(family, tied, dtype, rows=None):
    tokenizer = {"qwen3": qwen_tokenizer, "llama3": llama3_tokenizer, "llama2": sentencepiece_tokenizer}[family]()
    rows = rows or len(tokenizer) + 7
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    kind, config = (Qwen3ForCausalLM, Qwen3Config) if family == "qwen3" else (LlamaForCausalLM, LlamaConfig)
    torch.manual_seed(0)
    keys = {"num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": tied, **special}
    return kind(config(vocab_size=rows, **SIZES, **keys)).to(dtype), tokenizer


@pytest.fixture
def files(tmp_path):
    """A base on disk, and an index; returns what `extend_checkpoint` needs first."""
    model, tokenizer = make_base("qwen3", True, torch.bfloat16, rows=384)
    model.generation_config.update(do_sample=True, top_k=7)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    INDEX.save(tmp_path / "D.index.json")
    return str(tmp_path / "base"), tmp_path / "D.index.json", tmp_path / "out"


@pytest.mark.parametrize(
    ("family", "tied", "dtype"),
    [
        ("qwen3", True, torch.bfloat16),
        ("qwen3", False, torch.float32),
        ("llama3", False, torch.bfloat16),
        ("llama3", True, torch.float32),
        ("llama2", True, torch.float32),
    ],
)
def test_base_rows_stay_and_every_new_row_is_drawn_in_each_family(family, tied, dtype):
    model, tokenizer = make_base(family, tied, dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    special = tokenizer.special_tokens_map, tokenizer.all_special_ids, tokenizer.chat_template
    greeting = tokenizer.encode("Fargo is a Drama")
    base = len(tokenizer)
    done = extend_model(model, tokenizer, INDEX, seed=3)

    assert (done["first_id"], done["last_id"], done["tied"]) == (base, len(tokenizer) - 1, tied)
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert (tokenizer.special_tokens_map, tokenizer.all_special_ids, tokenizer.chat_template) == special
    assert tokenizer.encode("Fargo is a Drama") == greeting
    after = model.state_dict()
    grown = {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - grown)
    for name in grown:
        assert after[name].dtype == dtype
        assert torch.equal(after[name][:base], before[name][:base])
        drawn, old = after[name][base:].float(), before[name][:base].float()
        assert len(torch.unique(drawn, dim=0)) == len(drawn)
        assert (drawn.norm(dim=1) < 3 * old.norm(dim=1).max()).all()
    assert model.config.vocab_size == done["rows_after"] == len(after["lm_head.weight"])
    assert done["rows_after"] % done["multiple"] == 0
    if not tied:
        assert not torch.equal(after["lm_head.weight"][base:], after["model.embed_tokens.weight"][base:])


@pytest.mark.parametrize("family", ["qwen3", "llama3", "llama2"])
def test_sid_tokens_are_one_token_each_wherever_they_stand_and_survive_decoding(family):
    model, tokenizer = make_base(family, True, torch.float32)
    extend_model(model, tokenizer, INDEX)
    ids = sid_ids(INDEX, tokenizer)
    for text in ("<|a_1|><|b_2|>", "after <|a_3|><|b_4|>, then", "<think>why</think><|a_1|>\n<|b_1|>x"):
        encoded = tokenizer.encode(text, add_special_tokens=False)
        assert [token for token in tokenizer.convert_ids_to_tokens(encoded) if token in ids] == [
            token for token in INDEX.tokens if token in text
        ]
        decoded = tokenizer.decode(encoded, skip_special_tokens=True)
        assert decoded.replace(" ", "") == text.replace(" ", "")
    assert not set(ids.values()) & set(tokenizer.all_special_ids)


def test_mean_rows_lie_close_to_the_mean_and_distribution_rows_spread_as_the_base_does():
    many = ItemIndex.from_codes([str(n) for n in range(3000)], [[n] for n in range(3000)])
    drawn = {}
    for rows in ("mean", "distribution"):
        model, tokenizer = make_base("qwen3", True, torch.float32)
        base = len(tokenizer)
        with torch.no_grad():  # dimensions that go together
            model.get_input_embeddings().weight[:, 1] = 3 * model.get_input_embeddings().weight[:, 0]
        extend_model(model, tokenizer, many, rows=rows)
        weight = model.get_input_embeddings().weight.detach()
        old, drawn[rows] = weight[:base], weight[base : base + 3000]
    assert torch.allclose(drawn["mean"].std(0), NOISE * old.std(0), rtol=0.1)
    assert torch.allclose(drawn["mean"].mean(0), old.mean(0), atol=float(0.01 * old.std(0).max()))
    assert torch.allclose(torch.cov(drawn["distribution"].T), torch.cov(old.T), atol=float(0.1 * old.var(0).max()))


@pytest.mark.parametrize(
    ("rows", "multiple"), [(151_936, 128), (49_152, 128), (128_256, 128), (32_016, 16), (50_257, 64), (100, 64)]
)
def test_the_padding_of_the_base_is_kept(rows, multiple):
    assert padding_multiple(rows) == multiple


def test_tokens_that_fit_behind_the_base_take_its_padding_rows():
    model, tokenizer = make_base("qwen3", True, torch.float32, rows=1024)
    done = extend_model(model, tokenizer, INDEX)
    assert (done["rows_before"], done["rows_after"], done["multiple"]) == (1024, 1024, 128)


def test_a_tokenizer_of_another_model_is_refused():
    model, tokenizer = make_base("qwen3", True, torch.float32, rows=256)
    with pytest.raises(InputError, match="not of one model"):
        extend_model(model, tokenizer, INDEX)


def test_a_checkpoint_is_extended_and_keeps_what_the_base_had(files):
    base, index, output = files
    done = extend_checkpoint(base, index, output)
    assert json.loads((output / RECORD).read_text()) == done
    assert done["base"] == base
    assert done["added"] == len(INDEX.tokens) + 2
    assert done["reasoning_tokens"] == ["<think>", "</think>"]
    assert (done["rows_before"], done["rows_after"], done["multiple"]) == (384, 384, 128)
    old, new = (AutoTokenizer.from_pretrained(folder) for folder in (base, output))
    assert (output / "chat_template.jinja").read_bytes() == (index.parent / "base/chat_template.jinja").read_bytes()
    assert (old.eos_token, old.pad_token, old.bos_token) == (new.eos_token, new.pad_token, new.bos_token)
    loaded = AutoModelForCausalLM.from_pretrained(output, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert loaded.generation_config.top_k == 7
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.get_input_embeddings().num_embeddings == loaded.config.vocab_size
    assert sid_ids(INDEX, new) == {token: done["first_id"] + 2 + n for n, token in enumerate(INDEX.tokens)}


def test_a_refusal_comes_before_the_model_is_loaded(files, monkeypatch):
    base, index, output = files
    extend_checkpoint(base, index, output)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    for given, message in (
        ({}, "--overwrite"),
        ({"output": index.parent / "base"}, "is an input"),
        ({"base": f"{base}-absent", "output": output.with_name("twice")}, "cannot be loaded"),
        ({"base": str(output), "output": output.with_name("twice")}, r"holds 7 SID tokens; .*--grow"),
    ):
        with pytest.raises(InputError, match=message):
            extend_checkpoint(**{"base": base, "index_file": index, "output": output, **given})
    assert not output.with_name("twice").exists()


def test_a_base_that_cannot_ask_or_answer_is_refused(files):
    base, index, output = files
    (index.parent / "base" / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="has no chat template; take the instruct variant"):
        extend_checkpoint(base, index, output)
    tokenizer = AutoTokenizer.from_pretrained(base)
    require_dialogue(AutoTokenizer.from_pretrained(base, chat_template="{{ messages }}"), "here")
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("<", "")
    with pytest.raises(InputError, match="here: its tokenizer reads <answer></answer> as 'answer>/answer>'"):
        require_dialogue(tokenizer, "here")


@pytest.mark.parametrize("recorded", [True, False])
def test_a_grown_index_adds_what_is_missing_and_leaves_trained_rows(files, recorded):
    base, index, output = files
    extend_checkpoint(base, index, output)
    if not recorded:  # as SFT leaves it
        (output / RECORD).unlink()
    trained = AutoModelForCausalLM.from_pretrained(output)
    first = min(sid_ids(INDEX, AutoTokenizer.from_pretrained(output)).values())
    with torch.no_grad():
        trained.model.embed_tokens.weight[first:] += 100
    trained.save_pretrained(output)
    old = trained.model.embed_tokens.weight
    sids = {item: list(sid) for item, sid in INDEX.sids.items()}
    write_json(index, {**sids, "0": [*sids["0"], "<|c_1|>"], "new": [*sids["0"], "<|c_2|>"]})
    grown = output.with_name("grown")
    done = extend_checkpoint(str(output), index, grown, grow=True)
    assert (done["added"], done.get("earlier", {}).get("added")) == (2, 9 if recorded else None)
    assert done["reasoning_tokens"] == ["<think>", "</think>"]
    new = AutoModelForCausalLM.from_pretrained(grown).model.embed_tokens.weight
    assert torch.equal(new[: done["first_id"]], old[: done["first_id"]])
    assert new[done["first_id"] :].abs().max() < 1  # drawn like text rows, not like trained SID rows
    sid_ids(ItemIndex.load(index), AutoTokenizer.from_pretrained(grown))
    with pytest.raises(InputError, match="knows each of its tokens"):
        extend_checkpoint(str(grown), index, output.with_name("again"), grow=True)


def test_the_same_seed_makes_the_same_bytes(files):
    base, index, output = files
    for name in ("one", "two", "tiny one", "tiny two"):
        folder = output.with_name(name)
        if "tiny" in name:
            make_tiny_model(TEXTS, INDEX, folder, vocabulary_size=320, hidden_size=16, layers=1, seed=5)
        else:
            extend_checkpoint(base, index, folder, seed=5)
    for kind in ("", "tiny "):
        for file in output.with_name(f"{kind}one").iterdir():
            assert file.read_bytes() == (output.with_name(f"{kind}two") / file.name).read_bytes()


def test_the_tiny_model_replaces_an_earlier_one_and_no_other(files):
    _, index, output = files
    sizes = {"vocabulary_size": 320, "hidden_size": 16, "layers": 1}
    made = [make_tiny_model(TEXTS, INDEX, output, **sizes) for _ in range(2)]
    assert made[0] == made[1] == {"vocabulary": 320, "parameters": 9584}
    with pytest.raises(InputError, match="`gream model tiny` did not write it"):
        make_tiny_model(TEXTS, INDEX, index.parent / "base", **sizes)


def test_the_chat_template_is_that_of_llamafactory():
    from llamafactory.data.template import TEMPLATES

    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    rendered = qwen_tokenizer().apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    template = TEMPLATES["qwen3_nothink"]
    assert rendered == "".join(template.format_system.apply(content="S") + template.format_user.apply(content="U"))


def test_sid_tokens_that_are_not_one_ordinary_token_are_refused(files):
    base, index, output = files
    tokenizer = qwen_tokenizer()
    with pytest.raises(InputError, match=r"here: <\|a_1\|> is not one token of the tokenizer; .*gream model extend"):
        require_sid_tokens(tokenizer, INDEX.tokens, "here")
    tokenizer.add_tokens([AddedToken("<|a_1|>", special=True), AddedToken("<|a_2|>")])
    require_sid_tokens(tokenizer, ["<|a_2|>"], "here")
    with pytest.raises(InputError, match=r"<\|a_1\|> is a special token"):
        require_sid_tokens(tokenizer, ["<|a_2|>", "<|a_1|>"], "here")
    tokenizer.save_pretrained(base)
    with pytest.raises(InputError, match="is a special token"):
        extend_checkpoint(base, index, output, grow=True)
