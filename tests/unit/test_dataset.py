from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import verl  # noqa: F401  loads the plugin
from assets import make_index, make_tokenizer, rl_rows, write_rl_files
from omegaconf import OmegaConf

from gream_verl.dataset import SemanticIdDataset
from gream_verl.files import InputError

INDEX = make_index()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(["What is next?"], INDEX)


def config(tmp_path, **options):
    return OmegaConf.create({"cache_dir": str(tmp_path / "cache"), "filter_overlong_prompts": False, **options})


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
