"""What goes wrong in a training run, with the real trainer: it ends or goes on, it never hangs and never lies."""

from __future__ import annotations

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import verl  # noqa: F401  loads the plugin
from assets import make_index, make_tiny_model, rl_rows, teach_form, write_rl_files
from trainer import Training, logged, rollouts

from gream_verl import cpu
from gream_verl.core.files import write_json

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not cpu.is_active(), reason="torch was built for an accelerator"),
]

HF_ROLLOUTS = "actor_rollout_ref.rollout.name=hf_cpu"
TIMEOUT = "trainer.v1.sampler.sampler_kwargs.step_timeout=30"
NO_VALIDATION = ("trainer.val_before_train=false", "trainer.test_freq=-1")


@pytest.fixture
def make_run(tmp_path):
    def make(name: str, taught: bool = True):
        index = make_index()
        folder = tmp_path / name
        make_tiny_model(folder / "sft", index)
        if taught:
            teach_form(folder / "sft", index)
        write_rl_files(folder / "data", index)
        return folder

    return make


ON_THE_FLY = (
    *("data.train_files=${gream.data}/tiny.inter.json", "data.shuffle=false"),
    "+data.next_item={history:5,system:'',templates:['{history} What is next?','{history} And then?']}",
)


@pytest.mark.parametrize("rows", [(), ON_THE_FLY], ids=["parquet", "on the fly"])
def test_a_killed_run_goes_on_to_the_same_batches_and_the_same_curve(make_run, rows):
    run, index = make_run("run"), make_index()
    # No prompt twice: rollouts tell equal ones apart by their arrival only.
    write_rl_files(run / "data", index, rows=20)
    draw = random.Random(0)
    write_json(run / "data/tiny.inter.json", {f"u{user}": draw.sample(list(index.sids), 24) for user in range(6)})
    overrides = (
        *(HF_ROLLOUTS, *NO_VALIDATION, *rows, "trainer.total_training_steps=4"),
        "trainer.v1.sampler.sampler_kwargs.reproducible=true",
        "algorithm.filter_groups.max_num_gen_batches=1",  # 16 prompts in all
    )
    training = Training(run, *overrides)
    training.wait_until(lambda: 3 in logged(run) and (run / "srpo/rollouts/3.jsonl").exists())
    training.kill()
    assert (run / "srpo/global_step_2").is_dir()
    assert not (run / "srpo/global_step_4").exists()
    before, answers = logged(run), rollouts(run, 3)
    assert len(answers) == 16
    (run / "srpo/rollouts/3.jsonl").unlink()

    Training(run, *overrides).finish()
    after = logged(run)
    assert set(after) == {1, 2, 3, 4}
    assert len(list(run.glob("srpo/logs/*/gream/srpo.jsonl"))) == 2
    assert seen(rollouts(run, 3)) == seen(answers)
    for key in ("critic/score/mean", "actor/pg_loss", "actor/kl_loss", "actor/grad_norm", "actor/lr"):
        assert after[3][key] == pytest.approx(before[3][key], rel=1e-3, abs=1e-6), key
    batches = [{row["input"] for row in rollouts(run, step)} for step in (1, 2, 3, 4)]
    assert sum(map(len, batches)) == len(set().union(*batches)) == 16  # in the middle of the first pass


def seen(rows: list[dict]) -> list[tuple[str, str, float]]:
    return sorted((row["input"], row["output"], row["score"]) for row in rows)


def test_a_dead_rollout_engine_ends_the_run_with_what_to_do(make_run):
    run = make_run("run")
    training = Training(run, *NO_VALIDATION, "trainer.total_training_steps=99", "trainer.save_freq=-1", TIMEOUT)
    training.wait_until(lambda: 1 in logged(run))
    for process in training.children("EngineCore"):
        process.kill()
    printed = training.finish(240, expect=None)
    # The engine may die while it generates, and its requests fail, or later, and the weight update waits forever.
    assert "groups of step" in printed or "no new batch for 30.0 s" in printed
    assert "Start the run again: it goes on from its last checkpoint" in printed


def test_a_row_without_ground_truth_is_refused_before_training(make_run):
    run = make_run("run", taught=False)
    rows = rl_rows(make_index(), 8)
    rows[5]["reward_model"]["ground_truth"] = None
    pq.write_table(pa.Table.from_pylist(rows), run / "data/tiny-rl.parquet")
    printed = Training(run, HF_ROLLOUTS).finish(240, expect=None)
    assert "tiny-rl.parquet: row 5: reward_model.ground_truth is None" in printed
