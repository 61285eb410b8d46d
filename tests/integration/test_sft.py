import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from small_data import make_data

from data_processing.sft.mix import write_mix
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.model.tiny_model import make_tiny_model, read_sft_texts
from gream_verl.model.vocabulary import sid_token_ids

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]


def train(folder, *overrides):
    command = [str(Path(sys.executable).parent / "llamafactory-cli"), "train", str(ROOT / "sft_configs/tiny_cpu.yaml")]
    paths = [
        f"model_name_or_path={folder}/model",
        f"dataset_dir={folder}/data",
        "dataset=small-mix",
        f"output_dir={folder}/sft",
    ]
    done = subprocess.run(
        [*command, *paths, *overrides], cwd=folder, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "sft" / "trainer_state.json").read_text())


def test_llamafactory_trains_the_mix_in_its_order_and_goes_on_after_a_stop(tmp_path):
    folder = make_data(tmp_path / "data", users=60)
    write_mix(folder, rows={"seqrec": 200, "item2index": 20, "reasoning": 60}, seed=0, block=16)
    index = ItemIndex.load(folder.index)
    make_tiny_model(read_sft_texts(folder.mix), index, tmp_path / "model", hidden_size=32, layers=1, heads=2)

    first = train(tmp_path, "num_train_epochs=8", "max_steps=40", "save_steps=40", "logging_steps=5")
    losses = [row["loss"] for row in first["log_history"] if "loss" in row]
    assert losses[-1] < losses[0] - 0.5

    from transformers import AutoTokenizer

    sid_token_ids(AutoTokenizer.from_pretrained(tmp_path / "sft"), index)
    assert len(pl.read_parquet(folder.mix)) == 280

    second = train(tmp_path, "num_train_epochs=8", "max_steps=50", "save_steps=40", "logging_steps=5")
    assert second["global_step"] == 50
    assert [row["step"] for row in second["log_history"] if "loss" in row][: len(losses)] == list(range(5, 41, 5))
