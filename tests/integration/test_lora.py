"""LoRA by stock LLaMA-Factory on what `gream model adapter` writes: SID rows in full, nothing else of the embedding."""

import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from sft_run import logged, make_sft_run, train
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.decoding.prefix_tree import sid_ids
from gream_verl.model.lora import merge_adapter, write_adapter
from gream_verl.model.tiny_model import read_sft_texts, train_tokenizer
from gream_verl.model.vocabulary import RECORD, extend_checkpoint

pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]
TRAINING = (
    *("finetuning_type=lora", "num_train_epochs=9", "max_steps=6", "save_steps=3", "save_total_limit=2"),
    *("learning_rate=0.01", "warmup_steps=0", "disable_gradient_checkpointing=false"),
)


def train_here(folder):
    """Train the adapter a few steps without LLaMA-Factory, which costs ten times as much."""
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=0.01)
    ids = torch.randperm(480, generator=torch.Generator().manual_seed(0)).view(8, 60)
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(folder / "sft"), save_embedding_layers=False)


@pytest.fixture(params=["tied", "untied"])
def run(request, tmp_path):
    """A folder with data, a model extended with SIDs, and an untrained adapter for it."""
    mix = make_sft_run(tmp_path)
    shutil.rmtree(tmp_path / "model")
    tokenizer = train_tokenizer(read_sft_texts(mix), 320)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, tie_word_embeddings=request.param == "tied",
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    base = Qwen3ForCausalLM(config)
    base.generation_config.update(do_sample=True, top_k=7)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    index = tmp_path / "data" / "small.index.json"
    extend_checkpoint(str(tmp_path / "base"), index, tmp_path / "model")
    write_adapter(tmp_path / "model", index, tmp_path / "adapter", rank=4, alpha=8)
    return tmp_path


def test_sid_rows_are_trained_in_full_all_else_by_low_rank_updates_and_a_stop_changes_nothing(run):
    weights = (run / "model" / "model.safetensors").read_bytes()
    with_llamafactory = read_json(run / "model" / "config.json")["tie_word_embeddings"]
    straight = train(run, *TRAINING, f"adapter_name_or_path={run}/adapter") if with_llamafactory else train_here(run)
    assert (run / "model" / "model.safetensors").read_bytes() == weights
    saved = load_file(run / "sft" / "adapter_model.safetensors")
    assert all("lora_" in name or name.endswith("trainable_tokens_delta") for name in saved)

    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    sids = sid_ids(ItemIndex.load(run / "data" / "small.index.json"), tokenizer)
    rows = torch.tensor(sorted([*sids.values(), *tokenizer.convert_tokens_to_ids(["<think>", "</think>"])]))
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    adapted = PeftModel.from_pretrained(model, run / "sft").eval()
    merge_adapter(run / "sft", run / "merged")
    merged = AutoModelForCausalLM.from_pretrained(run / "merged").eval()
    tied = merged.config.tie_word_embeddings
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    after = merged.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        moved = (after[name] != before[name]).any(dim=1).nonzero().flatten()
        assert set(moved.tolist()) <= set(rows.tolist())
        assert len(moved) > 0.8 * len(rows)
    assert not torch.equal(after["model.layers.0.mlp.up_proj.weight"], before["model.layers.0.mlp.up_proj.weight"])
    ids = torch.arange(480)[None]
    assert torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-5)
    with adapted.disable_adapter():
        assert not torch.allclose(merged(ids).logits, adapted(ids).logits, atol=1e-2)

    assert read_json(run / "merged" / RECORD) == read_json(run / "model" / RECORD) | {"merged": str(run / "sft")}
    for file in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (run / "merged" / file).read_bytes() == (run / "model" / file).read_bytes()
    assert read_json(run / "merged" / "config.json") == read_json(run / "model" / "config.json")
    # an ordinary checkpoint: nothing in it makes a loader look for peft
    assert {file.name for file in (run / "merged").iterdir()} == {file.name for file in (run / "model").iterdir()}

    if tied:  # a stopped training goes on as if it had not been stopped
        for lost in ("checkpoint-6", "adapter_model.safetensors", "trainer_state.json"):  # as if killed after step 5
            path = run / "sft" / lost
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        resumed = train(run, *TRAINING, f"adapter_name_or_path={run}/adapter")
        assert "with epoch 1 and global step 3" in (run / "sft.log").read_text()
        assert logged(resumed, "loss") == pytest.approx(logged(straight, "loss"), abs=1e-5)


@pytest.mark.parametrize("run", ["tied"], indirect=True)
def test_the_same_adapter_is_written_again_and_changes_nothing_untrained(run):
    index = run / "data" / "small.index.json"
    made = write_adapter(run / "model", index, run / "again", rank=4, alpha=8)
    for file in (run / "adapter").iterdir():
        assert file.read_bytes() == (run / "again" / file.name).read_bytes()
    assert made["token_rows"] == read_json(run / "model" / RECORD)["added"]
    with pytest.raises(InputError, match="train one by LLaMA-Factory"):
        merge_adapter(run / "model", run / "merged")
    with pytest.raises(InputError, match="gream model extend"):
        write_adapter(run / "base", index, run / "other", rank=4, alpha=8)
    merge_adapter(run / "adapter", run / "untrained")
    assert (run / "untrained" / "model.safetensors").read_bytes() == (run / "model" / "model.safetensors").read_bytes()
    # an SFT checkpoint has no record of what was added
    shutil.copytree(run / "model", run / "trained")
    (run / "trained" / RECORD).unlink()
    assert write_adapter(run / "trained", index, run / "onward", rank=4, alpha=8) == made
