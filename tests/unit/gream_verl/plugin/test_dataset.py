from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import verl  # loads the plugin
from assets import make_index, make_tiny_model, make_tokenizer, rl_rows, write_rl_files
from omegaconf import OmegaConf

from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import parse_sid
from gream_verl.plugin.dataset import SemanticIdDataset, refuse_short_models

INDEX = make_index()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(["What is next?"], INDEX)


def config(tmp_path, **options):
    return OmegaConf.create({"cache_dir": str(tmp_path / "cache"), **options})


def write(path, rows):
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def test_good_rows_pass_and_are_verl_rows(tmp_path, tokenizer):
    write_rl_files(tmp_path, INDEX)
    dataset = SemanticIdDataset(
        str(tmp_path / "tiny-rl.parquet"),
        tokenizer,
        config(tmp_path, index_file=str(tmp_path / "tiny.index.json")),
    )
    assert len(dataset) == 64
    row = dataset[3]
    assert row["raw_prompt"][0]["role"] == "user"
    assert row["reward_model"]["ground_truth"] == INDEX.text(row["extra_info"]["item"])


@pytest.mark.parametrize("truth", ["", "<|b_1|>", "Alien", None])
def test_a_malformed_truth_is_named_with_file_and_row(tmp_path, tokenizer, truth):
    rows = rl_rows(INDEX, 3)
    rows[2]["reward_model"]["ground_truth"] = truth
    with pytest.raises(InputError, match=r"bad\.parquet: row 2: reward_model\.ground_truth is"):
        SemanticIdDataset(write(tmp_path / "bad.parquet", rows), tokenizer, config(tmp_path))


def test_a_token_the_model_does_not_know_is_named_with_the_remedy(tmp_path):
    small = make_tokenizer(["What is next?"], make_index(items=4))
    with pytest.raises(InputError, match=r"row \d+: <\|[a-d]_\d\|> is not one token.*gream model extend"):
        SemanticIdDataset(write(tmp_path / "rl.parquet", rl_rows(INDEX, 24)), small, config(tmp_path))


def test_a_truth_outside_the_index_is_named(tmp_path, tokenizer):
    make_index(items=8).save(tmp_path / "small.index.json")
    path = write(tmp_path / "rl.parquet", rl_rows(INDEX, 24))
    with pytest.raises(InputError, match=r"row \d+: .* is no item of .*small\.index\.json"):
        SemanticIdDataset(path, tokenizer, config(tmp_path, index_file=str(tmp_path / "small.index.json")))


def test_a_file_that_is_no_verl_parquet_is_named(tmp_path, tokenizer):
    path = tmp_path / "rl.parquet"
    path.write_text("not parquet")
    with pytest.raises(InputError, match=r"rl\.parquet: no verl parquet.*gream data rl"):
        SemanticIdDataset(str(path), tokenizer, config(tmp_path))


def test_a_token_in_a_prompt_that_the_model_does_not_know_is_named(tmp_path, tokenizer):
    rows = rl_rows(INDEX, 3)
    rows[1]["prompt"][0]["content"] += "<|a_999|>"
    with pytest.raises(InputError, match=r"row 1: <\|a_999\|> is not one token"):
        SemanticIdDataset(write(tmp_path / "rl.parquet", rows), tokenizer, config(tmp_path))


def test_the_columns_of_the_authors_are_enough(tmp_path, tokenizer):
    rows = [
        {**row, "extra_info": {"title": row["extra_info"]["title"], "type": "reasoning"}} for row in rl_rows(INDEX, 3)
    ]
    dataset = SemanticIdDataset(write(tmp_path / "Beauty-rl.parquet", rows), tokenizer, config(tmp_path))
    assert [row["reward_model"] for row in dataset] == [row["reward_model"] for row in rows]


def length(tokenizer, prompt):
    return len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True)["input_ids"])


def test_a_long_prompt_loses_its_oldest_items_and_no_more_than_it_must(tmp_path, tokenizer):
    path = write(tmp_path / "rl.parquet", rl_rows(INDEX, 24))
    whole = SemanticIdDataset(path, tokenizer, config(tmp_path))
    longest = max(length(tokenizer, row["raw_prompt"]) for row in whole)
    for limit in (longest, longest - 1, longest - 5, longest - 9):
        short = SemanticIdDataset(path, tokenizer, config(tmp_path, max_prompt_length=limit))
        for before, after in zip(whole, short, strict=True):
            text = after["raw_prompt"][0]["content"]
            items = text.removesuffix(" What is next?").split(" ")
            given = before["raw_prompt"][0]["content"].removesuffix(" What is next?").split(" ")
            assert items == given[len(given) - len(items) :]
            assert all(parse_sid(item) in INDEX.items for item in items)
            assert length(tokenizer, after["raw_prompt"]) <= limit
            if len(items) < len(given):
                longer = [{**after["raw_prompt"][0], "content": f"{given[-len(items) - 1]} {text}"}]
                assert length(tokenizer, longer) > limit


def test_a_prompt_that_cannot_be_shortened_enough_is_named(tmp_path, tokenizer):
    rows = rl_rows(INDEX, 4)
    rows[2]["prompt"][0]["content"] += " What is next?" * 40
    path = write(tmp_path / "rl.parquet", rows)
    with pytest.raises(InputError, match=r"rl\.parquet: row 2: the prompt is longer than data\.max_prompt_length=60"):
        SemanticIdDataset(path, tokenizer, config(tmp_path, max_prompt_length=60))


def test_a_shown_item_outside_the_index_is_named(tmp_path, tokenizer):
    make_index(items=12).save(tmp_path / "small.index.json")
    rows = rl_rows(make_index(items=12), 3)
    rows[1]["prompt"][0]["content"] = f"{INDEX.text('20')} {rows[1]['prompt'][0]['content']}"
    path = write(tmp_path / "rl.parquet", rows)
    with pytest.raises(InputError, match=r"row 1: <\|a_2\|>.* is no item of .*small\.index\.json"):
        SemanticIdDataset(path, tokenizer, config(tmp_path, index_file=str(tmp_path / "small.index.json")))


def test_long_rows_are_kept_and_other_options_of_the_template_are_passed_on(tmp_path, tokenizer):
    options = {"filter_overlong_prompts": True, "apply_chat_template_kwargs": {"tokenize": False, "return_dict": True}}
    path = write(tmp_path / "rl.parquet", rl_rows(INDEX, 8))
    dataset = SemanticIdDataset(path, tokenizer, config(tmp_path, max_prompt_length=40, **options))
    assert len(dataset) == 8
    assert length(tokenizer, dataset[0]["raw_prompt"]) <= 40


def test_fewer_rows_than_a_batch_are_refused_for_training_only(tmp_path, tokenizer):
    def rows(path: str, **options) -> int:
        node = {"train_files": train, "val_files": val, "train_batch_size": 8, **options}
        limit = node["train_max_samples" if path == node["train_files"] else "val_max_samples"]
        return len(SemanticIdDataset(path, tokenizer, config(tmp_path, **node), max_samples=limit))

    train, val = (write(tmp_path / f"{name}.parquet", rl_rows(INDEX, 7)) for name in ("rl", "val"))
    all_rows = {"train_max_samples": -1, "val_max_samples": -1}
    message = r"rl\.parquet: 7 rows are less than one batch of data\.train_batch_size=8; lower it"
    with pytest.raises(InputError, match=message):
        rows(train, **all_rows)
    with pytest.raises(InputError, match=message):
        SemanticIdDataset([train], tokenizer, config(tmp_path, train_files=[train], train_batch_size=8))
    assert rows(val, **all_rows) == 7
    assert rows(train, **all_rows, train_batch_size=7) == 7
    with pytest.raises(InputError, match="3 rows are less"):
        rows(train, train_max_samples=3, val_max_samples=-1, train_batch_size=4)
    # Validation on some rows of the training file.
    node = config(tmp_path, train_files=train, train_batch_size=4, train_max_samples=-1)
    validation = SemanticIdDataset(train, tokenizer, node, max_samples=2)
    assert len(validation) == 2
    assert not validation[0]["for_training"]
    assert SemanticIdDataset(train, tokenizer, node)[0]["for_training"]


def test_a_loader_that_goes_on_in_the_middle_of_an_epoch_gives_the_same_batches(tmp_path, tokenizer):
    from torchdata.stateful_dataloader import StatefulDataLoader
    from verl.trainer.ppo.utils import create_rl_sampler
    from verl.utils.dataset.rl_dataset import collate_fn

    def loader():
        options = config(tmp_path, shuffle=True, seed=3)
        dataset = SemanticIdDataset(write(tmp_path / "rl.parquet", rl_rows(INDEX, 24)), tokenizer, options)
        return StatefulDataLoader(
            dataset,
            batch_size=4,
            num_workers=0,
            drop_last=True,
            collate_fn=collate_fn,
            sampler=create_rl_sampler(dataset.config, dataset),
        )

    def prompts(batches):
        return [[prompt[-1]["content"] for prompt in batch["raw_prompt"]] for batch in batches]

    whole = prompts(loader())
    assert len(whole) > 5
    first = loader()
    iterator = iter(first)
    assert prompts(next(iterator) for _ in range(3)) == whole[:3]
    state = first.state_dict()
    after = loader()
    after.load_state_dict(state)
    assert prompts(after) == whole[3:]


def test_a_key_that_verl_no_longer_reads_is_refused_before_any_model_is_built(tmp_path, tokenizer):
    from verl.trainer.ppo.utils import create_rl_dataset

    path = write(tmp_path / "rl.parquet", rl_rows(INDEX, 4))
    run = OmegaConf.load(Path(verl.__file__).parent / "trainer/config/legacy_reward_impl.yaml")
    run.data = config(tmp_path, custom_cls={"path": "pkg://gream_verl.plugin.dataset", "name": "SemanticIdDataset"})
    run.reward_model.reward_manager = "dapo"
    with pytest.raises(InputError, match=r"reward_model\.reward_manager: .*set reward\.reward_manager\.name instead"):
        create_rl_dataset(path, run.data, tokenizer, None)
    run.reward_model.reward_manager = None
    assert len(create_rl_dataset(path, run.data, tokenizer, None)) == 4


def test_a_model_without_room_for_prompt_and_response_is_refused(tmp_path):
    model = make_tiny_model(tmp_path / "model", INDEX)  # of 1,024 positions

    def refuse(prompt: int, room: int | None) -> None:
        rollout = {"model": {"path": str(model)}, "rollout": {"max_model_len": room}}
        data = {"max_prompt_length": prompt, "max_response_length": 128}
        refuse_short_models(OmegaConf.create({"data": data, "actor_rollout_ref": rollout}))

    refuse(896, None)
    refuse(160, 288)
    with pytest.raises(InputError, match=r"max_prompt_length=897, .* of 1024 at most; change one"):
        refuse(897, None)
    with pytest.raises(InputError, match=r"do not fit into rollout\.max_model_len=288"):
        refuse(161, 288)
    with pytest.raises(InputError, match=r"max_model_len=1025: .*model has 1024 positions; lower it"):
        refuse(160, 1025)
