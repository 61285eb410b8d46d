from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import torch
from assets import make_index, make_tiny_model
from evaluation_files import write_prompts
from transformers import AutoModelForCausalLM, AutoTokenizer

from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.evaluation.direct import evaluate_direct
from gream_verl.evaluation.prompts import read_prompts
from gream_verl.evaluation.results import Evaluation

USERS = 11


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("direct")
    index = make_index()
    index.save(folder / "tiny.index.json")
    make_tiny_model(folder / "model", index)
    write_prompts(folder / "tiny-test.parquet", index, USERS)
    return folder


def evaluate(world: Path, **options: object) -> Evaluation:
    prompts, _ = read_prompts(world / "tiny-test.parquet", "direct")
    return evaluate_direct(world / "model", prompts, world / "tiny.index.json", **{"beams": 30} | options)


def brute_force(world: Path, row: dict[str, object], history: list[str]) -> list[str]:
    index = ItemIndex.load(world / "tiny.index.json")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32).eval()
    text = "<|im_start|>system\nRecommend.<|im_end|>\n<|im_start|>user\n"
    text += "".join(index.texts(history)) + " Next?<|im_end|>\n<|im_start|>assistant\n"
    prompt = tokenizer(text)["input_ids"]
    scores = {}
    for item in index.sids:
        sid = tokenizer(index.text(item))["input_ids"]
        with torch.inference_mode():
            log_probs = model(torch.tensor([prompt + sid])).logits[0].log_softmax(-1)
        scores[item] = sum(log_probs[len(prompt) - 1 + place, token].item() for place, token in enumerate(sid))
    return [item for item in sorted(scores, key=lambda item: -scores[item]) if item not in history]


def test_all_items_are_ranked_as_brute_force_ranks_them_and_the_history_is_dropped(world: Path) -> None:
    evaluation = evaluate(world)
    prompts = pl.read_parquet(world / "tiny-test.parquet").to_dicts()
    for place in (0, 4, 7):
        row = evaluation.rows[place]
        history = prompts[place]["extra_info"]["history"]
        assert row["user"] == str(place)
        assert row["target"] == prompts[place]["extra_info"]["item"]
        assert row["recommended"] == brute_force(world, row, history)
    assert evaluation.metrics["recall@10"] == sum(1 <= rank <= 10 for rank in evaluation.ranks) / USERS
    assert 0 <= evaluation.metrics["rsvr"] <= 1


def test_the_history_stays_when_it_is_not_dropped(world: Path) -> None:
    evaluation = evaluate(world, drop_history=False)
    assert all(len(row["recommended"]) == 24 for row in evaluation.rows)


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_the_batch_size_changes_nothing(world: Path, batch_size: int) -> None:
    expected, found = evaluate(world, batch_size=3, beams=5), evaluate(world, batch_size=batch_size, beams=5)
    assert [row["recommended"] for row in found.rows] == [row["recommended"] for row in expected.rows]
    assert found.metrics == expected.metrics


@pytest.mark.timeout(300)
def test_shards_change_nothing_and_lose_no_user(world: Path) -> None:
    alone = evaluate(world, batch_size=3, beams=5)
    sharded = evaluate(world, batch_size=3, beams=5, shards=3)  # 11 users: 4 batches, the last of two
    assert sharded.rows == alone.rows
    assert [row["user"] for row in sharded.rows] == [str(user) for user in range(USERS)]
    assert sharded.metrics == alone.metrics


def test_the_protocol_is_kept_with_the_result(world: Path) -> None:
    protocol = {"split": "test", "prompts": "somewhere", "users_in_file": 70, "seed": 3}
    settings = evaluate(world, protocol=protocol).settings
    assert settings["protocol"] == protocol
    assert (settings["prompts"], settings["users"], settings["users_in_file"], settings["seed"]) == (
        "somewhere", USERS, 70, 3,
    )  # fmt: skip


def test_the_generation_config_in_the_folder_changes_nothing(world: Path, tmp_path: Path) -> None:
    expected = evaluate(world)
    file = world / "model" / "generation_config.json"
    before = file.read_text()
    leaking = {"do_sample": True, "temperature": 0.1, "top_k": 1, "num_beams": 1, "max_new_tokens": 1}
    file.write_text(json.dumps(json.loads(before) | leaking))
    try:
        assert evaluate(world).rows == expected.rows
    finally:
        file.write_text(before)


def test_results_survive_the_disk(world: Path, tmp_path: Path) -> None:
    evaluation = evaluate(world)
    evaluation.save(tmp_path / "out" / "sft-direct.json")
    loaded = Evaluation.load(tmp_path / "out" / "sft-direct.json")
    assert loaded == evaluation
    assert loaded.ranks.tolist() == evaluation.ranks.tolist()
    (tmp_path / "out" / "sft-direct.json").write_text("{}")
    with pytest.raises(InputError, match="gream evaluate"):
        Evaluation.load(tmp_path / "out" / "sft-direct.json")


def test_what_cannot_be_used_is_named_with_its_remedy(world: Path, tmp_path: Path) -> None:
    index = tmp_path / "other.index.json"
    ItemIndex.from_codes([str(item) for item in range(24)], [[9, item] for item in range(24)]).save(index)
    model = world / "model"
    prompts, _ = read_prompts(world / "tiny-test.parquet", "direct")
    with pytest.raises(InputError, match=r"another index.*gream data rl"):
        evaluate_direct(model, prompts, index)
    others, _ = read_prompts(write_prompts(tmp_path / "other-test.parquet", ItemIndex.load(index), 2), "direct")
    with pytest.raises(InputError, match=r"SID tokens.*gream model extend"):
        evaluate_direct(model, others, index)
    with pytest.raises(InputError, match="no Hugging Face model"):
        evaluate_direct(tmp_path, prompts, world / "tiny.index.json")
    config = json.loads((model / "config.json").read_text())
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 20}))
    with pytest.raises(InputError, match=r"but the model takes 20; .*shorter history"):
        evaluate_direct(tmp_path, prompts, world / "tiny.index.json")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(InputError, match=r"the model cannot be loaded .*copy or train it anew"):
        evaluate_direct(tmp_path, prompts, world / "tiny.index.json")
