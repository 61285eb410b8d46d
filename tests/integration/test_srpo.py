"""One run of stock verl with vLLM rollouts and the constrained recipe, the death of its engine, and a second start."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import verl  # noqa: F401  loads the plugin
from assets import make_index, make_tiny_model, teach_form, write_rl_files
from trainer import Training, logged, rollouts

from gream_verl import cpu
from gream_verl.core.rsvr import score_response
from gream_verl.core.semantic_ids import parse_sid

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not cpu.is_active(), reason="torch was built for an accelerator"),
]

REWARD = """
def compute_score(data_source, solution_str, ground_truth, extra_info, scale):
    return scale * extra_info["rsvr"]["match"]
"""


OPTIONS = (
    "algorithm.filter_groups.max_num_gen_batches=1",  # so that every step takes the next four prompts
    "actor_rollout_ref.actor.optim.lr=0.01",  # so that one update changes the probabilities
    "actor_rollout_ref.actor.optim.lr_scheduler_type=constant",
    # the passes that the recipe leaves out
    "algorithm.rollout_correction.bypass_mode=false",
    "actor_rollout_ref.actor.use_kl_loss=true",
)
DIFFERENCE = "training/rollout_probs_diff_mean"


def hold_usual_ports() -> list[socket.socket]:
    """Hold the ports that Ray, its dashboard and torch take by default, as another program would."""
    sockets = []
    for port in (6379, 8265, 10001, 29500):
        holder = socket.socket()
        try:
            holder.bind(("127.0.0.1", port))
            holder.listen()
            sockets.append(holder)
        except OSError:  # somebody else holds it: just as well
            holder.close()
    return sockets


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder, taught = tmp_path_factory.mktemp("run"), make_index()
    make_tiny_model(folder / "sft", taught)
    teach_form(folder / "sft", taught)
    # Half of the items that the model knows have left the catalogue. Three steps take each prompt once.
    write_rl_files(folder / "data", make_index(items=12), rows=12)
    (folder / "reward.py").write_text(REWARD)
    return folder


@pytest.fixture(scope="module")
def printed(run) -> str:
    """Train until step 3, kill the rollout engine, and return what the run printed."""
    held = hold_usual_ports()
    training = Training(
        run,
        *OPTIONS,
        "trainer.total_training_steps=99",
        "trainer.logger=[console,file,tensorboard]",
        "trainer.v1.sampler.sampler_kwargs.step_timeout=20",
        recipe="[gream_srpo_cpu,constrained]",
    )
    try:
        training.wait_until(lambda: {0, 1, 2, 3} <= set(logged(run)))
        for process in training.children("EngineCore"):
            process.kill()
        return training.finish(240, expect=None)
    finally:
        training.stop()
        for holder in held:
            holder.close()


@pytest.fixture(scope="module")
def steps(run, printed) -> dict[int, dict[str, float]]:
    return logged(run)


def test_every_part_of_the_reward_is_logged(steps):
    for key in ("acc", "format", "match", "depth", "valid_item", "expected", "expected_hit"):
        assert any(f"/tiny/{key}/" in name for name in steps[0]), key


def test_the_weights_move_and_reach_the_rollout_engine(run, steps):
    assert any(steps[step]["critic/advantages/max"] > 0 > steps[step]["critic/advantages/min"] for step in (1, 2))
    for step in (1, 2, 3):
        assert steps[step]["actor/grad_norm"] > 0
        assert "actor/kl_loss" in steps[step]
    # verl's warm-up of two steps: step 1 has learning rate 0, step 2 half of it, and all of it from step 3 on (the log
    # has the rate of the next step). So the responses of step 3 are the first from weights that differ from SFT's.
    assert [steps[step]["actor/lr"] for step in (1, 2)] == [0.005, 0.01]
    # Engine and actor restrict the same tokens, so that they agree as long as they have the same weights.
    assert max(steps[step][DIFFERENCE] for step in (1, 2, 3)) < difference_of_updates(run) / 20


def test_the_true_answer_stands_after_every_chain_and_is_paid_by_its_probability(run, steps):
    rows = [row for step in (1, 2) for row in rollouts(run, step)]
    rewards = [score_response(row["output"], parse_sid(row["gts"]), base_levels=3) for row in rows]
    assert any(row["score"] > 0 for row in rows)
    for row, reward in zip(rows, rewards, strict=True):
        assert (row["score"] > 0) == reward.acc
        assert row["score"] < 1.3


def test_the_expected_reward_is_the_mean_of_the_sampled_one(run, steps):
    rows = [row for step in (0, 2) for row in rollouts(run, step, "validation")]
    sampled, expected = (np.array([row[key] for row in rows]) for key in ("match", "expected"))
    assert 0 < expected.mean() < 1
    difference = sampled * [row["format"] for row in rows] - expected
    assert abs(difference.mean()) < 4 * difference.std() / len(rows) ** 0.5 + 0.02


def test_constrained_rollouts_answer_with_real_items_only(run, steps):
    assert steps[0]["val-aux/tiny/format/mean@1"] > 0.3
    answered = [row for step in (0, 2) for row in rollouts(run, step, "validation") if row["format"]]
    assert any(row["acc"] == 0 for row in answered)
    assert all(row["valid_item"] == 1 for row in answered)


def test_the_export_is_a_model_folder_and_the_tracker_has_its_file(run, steps):
    from transformers import AutoTokenizer

    assert len(AutoTokenizer.from_pretrained(exported(run)).encode("<|a_1|>")) == 1
    assert list(run.rglob("events.out.tfevents.*"))


def test_a_dead_rollout_engine_ends_the_run_with_what_to_do(printed):
    # The engine may die while it generates, and its requests fail, or later, and the weight update waits forever.
    assert "groups of step" in printed or "no new batch for" in printed
    assert "Start the run again: it goes on from its last checkpoint" in printed


def test_a_second_start_goes_on_from_the_checkpoint_with_the_same_batch(run, steps):
    before = inputs(run, 3)
    # Step 4 may have been saved before the engine was missed.
    (run / "srpo/latest_checkpointed_iteration.txt").write_text("2")
    (run / "srpo/rollouts/3.jsonl").unlink()
    end = ("trainer.total_training_steps=3", "trainer.test_freq=-1", "trainer.val_before_train=false")
    custom = f"reward.custom_reward_function.path={run}/reward.py"
    scale = "+reward.custom_reward_function.reward_kwargs.scale=0.5"
    Training(run, *OPTIONS, *end, custom, scale, rollout="hf", recipe="[gream_srpo_cpu,sampled_reward]").finish()
    for row in rollouts(run, 3):  # the custom function is the reward
        rsvr = score_response(row["output"], parse_sid(row["gts"]), base_levels=3)
        assert row["score"] == pytest.approx(rsvr.match / 2, abs=1e-6)
    _, second = sorted(run.glob("srpo/logs/*/gream/srpo.jsonl"))
    assert [json.loads(line)["step"] for line in second.read_text().splitlines()] == [3]
    assert inputs(run, 3) == before
    assert len(inputs(run, 1) | inputs(run, 2) | before) == 12  # no prompt twice
    again = logged(run)[3]
    assert again["actor/lr"] == steps[3]["actor/lr"]
    assert again["actor/kl_loss"] > 0  # of the trained weights; 0 for those of SFT
    assert again[DIFFERENCE] < difference_of_updates(run) / 20  # they were sent to the rollout engine


def inputs(run: Path, step: int) -> set[str]:
    return {row["input"] for row in rollouts(run, step)}


def exported(run: Path) -> Path:
    return run / "srpo/global_step_2/actor/huggingface"


@torch.no_grad()
def difference_of_updates(run: Path) -> float:
    """Return the mean difference of the probabilities of step 3's tokens between the weights of SFT and of step 2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run / "sft")
    models = [AutoModelForCausalLM.from_pretrained(folder).float() for folder in (run / "sft", exported(run))]
    assert all(torch.isfinite(weight).all() for weight in models[1].parameters())
    differences = []
    for row in rollouts(run, 3):
        question = row["input"].removeprefix("user\n").removesuffix("\nassistant\n")
        chat = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
        answer = tokenizer.encode(row["output"])
        ids = torch.tensor([prompt + answer])
        logits = (model(ids).logits[0, len(prompt) - 1 : -1] / 0.7 for model in models)  # at the recipe's temperature
        before, after = (values.softmax(-1).gather(-1, ids[0, len(prompt) :, None]) for values in logits)
        differences.append((before - after).abs().flatten())
    difference = float(torch.cat(differences).mean())
    assert difference > 0.01  # else the comparison says nothing
    return difference
