from __future__ import annotations

import copy

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import verl  # noqa: F401  loads the plugin
from assets import make_index, make_tokenizer, rl_rows, write_rl_files
from omegaconf import OmegaConf

from gream_verl.core.errors import InputError
from gream_verl.core.files import write_json
from gream_verl.core.prompts import TEMPLATES, messages
from gream_verl.core.semantic_ids import find_tokens, parse_sid
from gream_verl.plugin.dataset import SemanticIdDataset

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
    with pytest.raises(InputError, match=r"rl\.parquet: cannot be read.*gream data rl"):
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
    with pytest.raises(InputError, match=r"tiny\.inter\.json: the prompt is longer than data\.max_prompt_length=60"):
        made(tmp_path, tokenizer, max_prompt_length=60)


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


def test_prompts_that_are_not_text_are_left_alone(tmp_path, tokenizer):
    rows = [{**row, "prompt": [{"role": "user", "content": [{"type": "text"}]}]} for row in rl_rows(INDEX, 1)]
    dataset = SemanticIdDataset(write(tmp_path / "rl.parquet", rows), tokenizer, config(tmp_path))
    assert dataset[0]["raw_prompt"] == rows[0]["prompt"]


def test_options_for_rows_on_the_fly_are_refused_beside_parquet(tmp_path, tokenizer):
    path = write(tmp_path / "rl.parquet", rl_rows(INDEX, 3))
    options = {"next_item": {"history": 3}, "val_files": path}
    assert len(SemanticIdDataset(path, tokenizer, config(tmp_path, **options))) == 3
    with pytest.raises(InputError, match=r"data\.next_item: has no effect on .*rl\.parquet"):
        SemanticIdDataset(path, tokenizer, config(tmp_path, **{**options, "val_files": None}))


def made(tmp_path, tokenizer, sequences=None, **options):
    items = list(INDEX.sids)
    write_json(tmp_path / "tiny.inter.json", sequences or {f"u{row}": items[row:] + items[:row] for row in range(4)})
    INDEX.save(tmp_path / "tiny.index.json")
    options = {"index_file": str(tmp_path / "tiny.index.json"), "shuffle": False, "seed": 0, **options}
    return SemanticIdDataset(str(tmp_path / "tiny.inter.json"), tokenizer, config(tmp_path, **options))


def test_rows_are_made_from_interactions_and_index(tmp_path, tokenizer):
    items = list(INDEX.sids)
    dataset = made(tmp_path, tokenizer, next_item={"history": 3, "passes": 2})
    per_user = len(items) - 2 - 4
    assert len(dataset) == 4 * per_user * 2
    rows = [dataset[number] for number in range(len(dataset))]
    for number, row in enumerate(rows):
        info, first = row["extra_info"], int(row["extra_info"]["user"][1:])
        sequence = items[first:] + items[:first]
        position = len(info["history"])
        assert 4 <= position < len(sequence) - 2
        assert info["history"] == sequence[:position]
        assert row["reward_model"]["ground_truth"] == INDEX.text(sequence[position])
        assert row["raw_prompt"] == messages("".join(INDEX.texts(sequence[position - 3 : position])), "reasoning")
        assert (row["data_source"], info["type"], info["index"]) == ("tiny", "reasoning", number)
    targets = [(row["extra_info"]["user"], row["extra_info"]["item"]) for row in rows]
    first, second = targets[: len(targets) // 2], targets[len(targets) // 2 :]
    assert sorted(first) == sorted(second)
    assert len(set(first)) == len(first)
    assert first != second
    assert first != sorted(first)


def test_items_may_be_numbers_as_in_published_files(tmp_path, tokenizer):
    (row,) = made(tmp_path, tokenizer, sequences={"u": [1, 2, 3, 4, 5, 6, 7]})
    assert row["extra_info"]["history"] == ["1", "2", "3", "4"]
    assert row["extra_info"]["item"] == "5"


def test_rows_depend_on_their_number_and_the_seed_only(tmp_path, tokenizer):
    options = {"next_item": {"mode": "direct", "passes": 3}}
    dataset, other = made(tmp_path, tokenizer, **options), made(tmp_path, tokenizer, seed=1, **options)
    places = [100, 3, 100, 150, 3]
    once = [copy.deepcopy(dataset[place]["prompt"]) for place in places]
    again = made(tmp_path, tokenizer, **options)
    assert once == [again[place]["prompt"] for place in places]
    assert [row["prompt"] for row in dataset] != [row["prompt"] for row in other]
    starts = {row["prompt"][0]["content"].split("<|")[0] for row in dataset}
    assert starts == {template.split("{history}")[0] for template in TEMPLATES["direct"]}


def test_templates_are_drawn_anew_in_every_pass(tmp_path, tokenizer):
    options = {"templates": ["{history} A?", "{history} B?"], "system": "", "passes": 6}
    rows = list(made(tmp_path, tokenizer, next_item=options))
    endings: dict[tuple[str, str], str] = {}
    for row in rows:
        target = (row["extra_info"]["user"], row["extra_info"]["item"])
        endings[target] = endings.get(target, "") + row["prompt"][0]["content"][-2]
    assert {len(ending) for ending in endings.values()} == {6}
    assert sum("A" in ending and "B" in ending for ending in endings.values()) > 0.8 * len(endings)


def test_a_long_history_is_shortened_by_whole_items(tmp_path, tokenizer):
    dataset = made(tmp_path, tokenizer, max_prompt_length=190)
    for row in dataset:
        assert length(tokenizer, row["raw_prompt"]) <= 190
        shown = "".join(find_tokens(row["raw_prompt"][1]["content"]))
        whole = "".join(INDEX.texts(row["extra_info"]["history"]))
        assert shown.startswith("<|a_")
        assert whole.endswith(shown)


def test_a_limit_draws_targets(tmp_path, tokenizer):
    made(tmp_path, tokenizer)
    options = {"index_file": str(tmp_path / "tiny.index.json"), "shuffle": False, "next_item": {"passes": 2}}
    dataset = SemanticIdDataset(
        str(tmp_path / "tiny.inter.json"), tokenizer, config(tmp_path, **options), max_samples=5
    )
    targets = [(row["extra_info"]["user"], row["extra_info"]["item"]) for row in dataset]
    assert len(targets) == 10
    assert set(targets[:5]) == set(targets[5:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shuffle": True}, r"data\.shuffle: set it to false"),
        ({"index_file": None}, r"data\.index_file: missing"),
        ({"next_item": {"templates": ["What?"]}}, r"data\.next_item\.templates: .*no \{history\} in 'What\?'"),
        ({"next_item": {"histroy": 3}}, r"data\.next_item\.histroy: .*known keys are mode, history"),
        ({"seed": -1}, r"data\.seed: must not be negative"),
        ({"prompt_key": "question"}, r"data\.prompt_key: .*in 'prompt'"),
        ({"sequences": {"u": ["1", "2"]}}, "no user has 5 interactions for training"),
        ({"sequences": {"u": ["1", "gone"]}}, r"user 'u': item 'gone' is not in .*tiny\.index\.json"),
        ({"sequences": ["u"]}, r"expected \{user: \[item"),
    ],
)
def test_what_rows_cannot_be_made_from_is_named(tmp_path, tokenizer, options, message):
    with pytest.raises(InputError, match=message):
        made(tmp_path, tokenizer, **options)


def test_validation_rows_are_not_made(tmp_path, tokenizer):
    with pytest.raises(InputError, match=r"data\.val_files: .*has no validation rows"):
        made(tmp_path, tokenizer, val_files=str(tmp_path / "tiny.inter.json"))


@pytest.mark.parametrize("kind", ["parquet", "on the fly"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_goes_on_in_the_middle_of_an_epoch_gives_the_same_batches(tmp_path, tokenizer, kind, workers):
    from torchdata.stateful_dataloader import StatefulDataLoader
    from verl.trainer.ppo.utils import create_rl_sampler
    from verl.utils.dataset.rl_dataset import collate_fn

    def loader():
        if kind == "parquet":
            options = config(tmp_path, shuffle=True, seed=3)
            dataset = SemanticIdDataset(write(tmp_path / "rl.parquet", rl_rows(INDEX, 24)), tokenizer, options)
        else:
            dataset = made(tmp_path, tokenizer, next_item={"mode": "direct", "passes": 2})
        return StatefulDataLoader(
            dataset,
            batch_size=4,
            num_workers=workers,
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
