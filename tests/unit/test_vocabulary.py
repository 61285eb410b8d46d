import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from gream_verl.files import InputError
from gream_verl.semantic_ids import ItemIndex
from gream_verl.tiny_model import make_tiny_model, train_tokenizer
from gream_verl.vocabulary import extend_checkpoint, extend_model, sid_token_ids

INDEX = ItemIndex.from_codes([str(n) for n in range(12)], [[n // 4, n % 4] for n in range(12)])
TEXTS = ["Recommend the next film after Fargo (1996), a Drama.", "Heat is a Crime film <|a_1|><|b_2|>"] * 20


def padded_base(tied: bool) -> tuple[Qwen3ForCausalLM, object]:
    """A base with padding rows behind its vocabulary, as Qwen3 has."""
    tokenizer = train_tokenizer(TEXTS, 320)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer) + 7, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, tie_word_embeddings=tied,
    )  # fmt: skip
    return Qwen3ForCausalLM(config), tokenizer


@pytest.mark.parametrize("tied", [True, False])
def test_base_rows_keep_their_values_and_every_new_row_is_drawn(tied):
    model, tokenizer = padded_base(tied)
    before = model.get_input_embeddings().weight.detach().clone()
    head_before = model.get_output_embeddings().weight.detach().clone()
    base = len(tokenizer)
    new = extend_model(model, tokenizer, INDEX, seed=3)
    assert new == list(range(base, len(tokenizer)))
    for weight, old in (
        (model.get_input_embeddings().weight, before),
        (model.get_output_embeddings().weight, head_before),
    ):
        assert torch.equal(weight[:base], old[:base])
        rows = weight[new].detach()
        distance = (rows - old[:base].mean(0)).abs().mean(0) / old[:base].std(0)
        assert (distance < 0.3).all()
        assert len(torch.unique(rows, dim=0)) == len(new)
    assert model.config.vocab_size % 64 == 0
    assert model.config.vocab_size >= len(tokenizer)


def test_extending_twice_changes_nothing():
    model, tokenizer = padded_base(tied=True)
    extend_model(model, tokenizer, INDEX)
    weight = model.get_input_embeddings().weight.detach().clone()
    assert extend_model(model, tokenizer, INDEX) == []
    assert torch.equal(model.get_input_embeddings().weight, weight)


def test_sid_tokens_are_one_token_each_and_survive_decoding(tmp_path):
    make_tiny_model(TEXTS, INDEX, tmp_path / "model", vocabulary_size=320, hidden_size=16, layers=1, heads=2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    ids = sid_token_ids(tokenizer, INDEX)
    text = "<think>why</think>" + "".join(INDEX.tokens) + "<answer><|a_1|><|b_1|></answer>"
    encoded = tokenizer.encode(text, add_special_tokens=False)
    assert [ids[token] for token in INDEX.tokens] == [i for i in encoded if i in ids.values()][: len(ids)]
    assert tokenizer.decode(encoded, skip_special_tokens=True) == text
    assert not set(ids.values()) & set(tokenizer.all_special_ids)


def test_the_same_seed_makes_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        make_tiny_model(TEXTS, INDEX, tmp_path / name, vocabulary_size=320, hidden_size=16, layers=1, heads=2, seed=5)
    for file in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_the_chat_template_is_that_of_llamafactory(tmp_path):
    from llamafactory.data.template import TEMPLATES

    tokenizer = train_tokenizer(TEXTS, 320)
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    template = TEMPLATES["qwen3_nothink"]
    system = template.format_system.apply(content="S")
    user = template.format_user.apply(content="U")
    assert rendered == "".join(system + user)


def test_a_checkpoint_is_extended_by_the_same_code(tmp_path):
    model, tokenizer = padded_base(tied=False)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    INDEX.save(tmp_path / "D.index.json")
    added = extend_checkpoint(str(tmp_path / "base"), tmp_path / "D.index.json", tmp_path / "out")
    assert added == len(INDEX.tokens) + 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.get_input_embeddings().num_embeddings == loaded.config.vocab_size
    sid_token_ids(AutoTokenizer.from_pretrained(tmp_path / "out"), INDEX)


def test_a_base_that_cannot_be_loaded_is_one_sentence(tmp_path):
    INDEX.save(tmp_path / "D.index.json")
    with pytest.raises(InputError, match="cannot be loaded"):
        extend_checkpoint(str(tmp_path / "absent"), tmp_path / "D.index.json", tmp_path / "out")


def test_a_model_without_sid_tokens_names_the_remedy():
    with pytest.raises(InputError, match="gream model extend"):
        sid_token_ids(train_tokenizer(TEXTS, 320), INDEX)
