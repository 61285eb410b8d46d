from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import verl  # noqa: F401  loads the plugin
from assets import make_index, make_tiny_model, teach, teach_form, write_rl_files
from trainer import Training, logged, rollouts
from typer.testing import CliRunner

from gream_verl import cpu

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not cpu.is_active(), reason="torch was built for an accelerator"),
]

HF_ROLLOUTS = "actor_rollout_ref.rollout.name=hf_cpu"


@pytest.fixture
def run(tmp_path):
    index = make_index()
    make_tiny_model(tmp_path / "sft", index)
    write_rl_files(tmp_path / "data", index)
    return tmp_path


@pytest.fixture
def usual_ports_in_use():
    """Hold the ports that Ray, its dashboard and torch take by default, as another program would."""
    sockets = []
    for port in (6379, 8265, 10001, 29500):
        holder = socket.socket()
        try:
            holder.bind(("127.0.0.1", port))
            holder.listen()
        except OSError:  # somebody else holds it: just as well
            holder.close()
            continue
        sockets.append(holder)
    yield
    for holder in sockets:
        holder.close()


def check_results(run: Path, steps: dict[int, dict[str, float]]) -> None:
    from transformers import AutoTokenizer

    assert set(steps) == {0, 1, 2}
    for key in ("acc", "format", "match", "depth", "valid_item"):
        assert any(f"/tiny/{key}/" in name for name in steps[0]), key
    for step in (1, 2):
        # in step 2 the rollouts come from weights sent after the update of step 1
        assert steps[step]["training/rollout_actor_probs_pearson_corr"] > 0.999
        assert "actor/kl_loss" in steps[step]
    assert len(AutoTokenizer.from_pretrained(exported(run)).encode("<|a_1|>")) == 1


def exported(run: Path) -> Path:
    return run / "srpo/global_step_2/actor/huggingface"


def weights(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).model.embed_tokens.weight.detach()


def test_stock_verl_trains_with_vllm_rollouts_on_a_cpu(run):
    teach_form(run / "sft", make_index())
    before = weights(run / "sft")
    Training(run).finish()
    steps = logged(run)
    check_results(run, steps)
    assert steps[0]["val-aux/tiny/format/mean@1"] > 0.3
    for step in (1, 2):
        assert steps[step]["critic/advantages/max"] > 0 > steps[step]["critic/advantages/min"]
        assert steps[step]["actor/grad_norm"] > 0
        assert steps[step]["critic/score/max"] <= 1
    assert not torch.equal(before, weights(exported(run)))


def test_constrained_rollouts_answer_with_real_items_only(run):
    taught, left = make_index(), make_index(items=9)  # most items that the model knows have left the catalogue
    teach_form(run / "sft", taught)
    write_rl_files(run / "data", left)
    Training(run, recipe="[gream_srpo_cpu,constrained]").finish()
    steps = logged(run)
    assert steps[0]["val-aux/tiny/format/mean@1"] > 0.3
    assert steps[0]["val-aux/tiny/valid_item/mean@1"] >= steps[0]["val-aux/tiny/format/mean@1"]


@pytest.mark.usefixtures("usual_ports_in_use")
def test_training_ends_although_no_response_says_anything(run):
    # half of the responses are an end of sequence and nothing else, the others are padding to the limit
    index = make_index()
    teach(run / "sft", index, lambda row: "" if row % 2 else "<|endoftext|>" * 40, steps=120)
    Training(run, HF_ROLLOUTS).finish()
    steps = logged(run)
    check_results(run, steps)
    said = [row["output"] for step in (1, 2) for row in rollouts(run, step)]
    assert said.count("") > 0.9 * len(said)
    for step in (1, 2):
        assert steps[step]["training/filter_groups/uniform_kept"] == 4
        assert steps[step]["training/filter_groups/evicted_samples"] == 4
        assert steps[step]["critic/advantages/max"] == steps[step]["critic/score/max"] == 0
    lengths = {steps[step][f"response_length/{name}"] for step in (1, 2) for name in ("min", "max")}
    assert {1, 32} <= lengths
    assert torch.isfinite(weights(exported(run))).all()


def test_training_stops_in_one_sentence_when_asked_to_raise(run):
    printed = Training(
        run, HF_ROLLOUTS, "trainer.v1.sampler.sampler_kwargs.when_exhausted=raise", "trainer.val_before_train=false"
    ).finish(240, expect=None)
    assert "algorithm.filter_groups: only 0 of 4 groups differ in 'match' after 2 generation batches" in printed
    assert not logged(run)


def test_two_ranks_train_and_every_tracker_is_told(run):
    from gream_verl.cli.main import app

    index = make_index()
    teach_form(run / "sft", index)
    (run / "data/tiny.item.json").write_text("{}")
    Training(
        run,
        HF_ROLLOUTS,
        "trainer.n_gpus_per_node=2",
        "trainer.logger=[console,file,tensorboard,wandb]",
        "+ray_kwargs.ray_init.runtime_env.env_vars.WANDB_MODE=offline",
        "+ray_kwargs.ray_init.runtime_env.env_vars.WANDB_DIR=" + str(run),
    ).finish()
    steps = logged(run)
    check_results(run, steps)
    assert (run / "srpo/global_step_2/actor/model_world_size_2_rank_1.pt").is_file()
    for step in (1, 2):
        assert steps[step]["actor/grad_norm"] > 0
        assert len(rollouts(run, step)) == 16
    assert list(run.rglob("events.out.tfevents.*"))
    assert list(run.rglob("offline-run-*/*.wandb"))
    shown = CliRunner().invoke(
        app, ["inspect", "--rollouts", str(run / "srpo/rollouts"), "--data", str(run / "data"), "--dataset", "tiny"]
    )
    assert shown.exit_code == 0, shown.output
    assert "16 rollouts of step 2" in shown.output
