"""Two faults in a training run, with the real trainer: it goes on or stops, it never hangs and never lies."""

from __future__ import annotations

import pytest
import verl  # noqa: F401  loads the plugin
from assets import make_index, make_tiny_model, teach_form, write_rl_files
from trainer import Training, logged, rollouts

from gream_verl import cpu

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not cpu.is_active(), reason="torch was built for an accelerator"),
]


@pytest.fixture
def run(tmp_path):
    index = make_index()
    make_tiny_model(tmp_path / "sft", index)
    teach_form(tmp_path / "sft", index)
    write_rl_files(tmp_path / "data", index, rows=20)  # no prompt twice: rollouts tell equal ones apart by arrival
    return tmp_path


def test_a_killed_run_goes_on_to_the_same_batches_and_the_same_curve(run):
    overrides = (
        *("trainer.val_before_train=false", "trainer.test_freq=-1", "trainer.total_training_steps=4"),
        "algorithm.filter_groups.max_num_gen_batches=1",  # 16 prompts in all
    )
    training = Training(run, *overrides, rollout="hf")
    training.wait_until(lambda: 3 in logged(run) and (run / "srpo/rollouts/3.jsonl").exists())
    training.kill()
    assert (run / "srpo/global_step_2").is_dir()
    assert not (run / "srpo/global_step_4").exists()
    before, answers = logged(run), rollouts(run, 3)
    assert len(answers) == 16
    (run / "srpo/rollouts/3.jsonl").unlink()

    Training(run, *overrides, rollout="hf").finish()
    after = logged(run)
    assert set(after) == {1, 2, 3, 4}
    assert len(list(run.glob("srpo/logs/*/gream/srpo.jsonl"))) == 2
    assert seen(rollouts(run, 3)) == seen(answers)
    for key in ("critic/score/mean", "actor/pg_loss", "actor/kl_loss", "actor/grad_norm", "actor/lr"):
        assert after[3][key] == pytest.approx(before[3][key], rel=1e-3, abs=1e-6), key
    assert after[3]["training/rollout_actor_probs_pearson_corr"] > 0.999  # the weights of the checkpoint were sent
    batches = [{row["input"] for row in rollouts(run, step)} for step in (1, 2, 3, 4)]
    assert sum(map(len, batches)) == len(set().union(*batches)) == 16  # in the middle of the first pass


def seen(rows: list[dict]) -> list[tuple[str, str, float]]:
    return sorted((row["input"], row["output"], row["score"]) for row in rows)
