from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import verl  # noqa: F401  loads the plugin
from assets import make_index, make_tiny_model, teach_form, write_rl_files

from gream_verl import cpu
from gream_verl.steps import ProcessTree

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not cpu.is_active(), reason="torch was built for an accelerator"),
]


def main_ppo(run: Path, *overrides: str, recipe: str = "gream_srpo_cpu") -> str:
    """Run verl's own trainer on the recipe, with no environment variable set by hand; return what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "VLLM_", "VERL_"))}
    environment.pop("OMP_NUM_THREADS", None)
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "verl.trainer.main_ppo", f"+recipe={recipe}"),
            *(f"gream.run={run}", "gream.dataset=tiny", "trainer.total_training_steps=2"),
            *("trainer.save_freq=2", "trainer.test_freq=2", "data.max_response_length=32"),
            *("data.train_batch_size=4", "actor_rollout_ref.actor.ppo_mini_batch_size=4"),
            *("actor_rollout_ref.rollout.n=4", *overrides),
        ],
        cwd=run,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=540)
    except subprocess.TimeoutExpired:
        ProcessTree(process.pid).stop()  # Ray's daemons too
        output, _ = process.communicate(timeout=30)
        pytest.fail(f"main_ppo hangs:\n{output[-5000:]}")
    assert process.returncode == 0, output[-5000:]
    return output


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


def steps(run: Path) -> dict[int, dict[str, float]]:
    logs = sorted(run.glob("srpo/logs/*/gream/srpo.jsonl"))
    records = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    return {record["step"]: record["data"] for record in records}


def check_results(run: Path, logged: dict[int, dict[str, float]]) -> None:
    from transformers import AutoTokenizer

    assert set(logged) == {0, 1, 2}
    for key in ("acc", "format", "match", "depth", "valid_item"):
        assert any(f"/tiny/{key}/" in name for name in logged[0]), key
    for step in (1, 2):
        # in step 2 the rollouts come from weights sent after the update of step 1
        assert logged[step]["training/rollout_actor_probs_pearson_corr"] > 0.999
        assert "actor/kl_loss" in logged[step]
    assert len(AutoTokenizer.from_pretrained(exported(run)).encode("<|a_1|>")) == 1


def exported(run: Path) -> Path:
    return run / "srpo/global_step_2/actor/huggingface"


def weights(folder: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).model.embed_tokens.weight.detach()


def test_stock_verl_trains_with_vllm_rollouts_on_a_cpu(run):
    teach_form(run / "sft", make_index())
    before = weights(run / "sft")
    main_ppo(run)
    logged = steps(run)
    check_results(run, logged)
    assert logged[0]["val-aux/tiny/format/mean@1"] > 0.3
    for step in (1, 2):
        assert logged[step]["critic/advantages/max"] > 0 > logged[step]["critic/advantages/min"]
        assert logged[step]["actor/grad_norm"] > 0
        assert logged[step]["critic/score/max"] <= 1
    assert not torch.equal(before, weights(exported(run)))


def test_constrained_rollouts_answer_with_real_items_only(run):
    taught, left = make_index(), make_index(items=9)  # most items that the model knows have left the catalogue
    teach_form(run / "sft", taught)
    write_rl_files(run / "data", left)
    main_ppo(run, recipe="[gream_srpo_cpu,constrained]")
    logged = steps(run)
    assert logged[0]["val-aux/tiny/format/mean@1"] > 0.3
    assert logged[0]["val-aux/tiny/valid_item/mean@1"] >= logged[0]["val-aux/tiny/format/mean@1"]


@pytest.mark.usefixtures("usual_ports_in_use")
def test_stock_verl_ends_with_hugging_face_rollouts_although_no_group_teaches_anything(run):
    main_ppo(run, "actor_rollout_ref.rollout.name=hf_cpu")
    logged = steps(run)
    check_results(run, logged)
    for step in (1, 2):
        # a random model finds no answer
        assert logged[step]["training/filter_groups/uniform_kept"] == 4
        assert logged[step]["training/filter_groups/evicted_samples"] == 4
        assert logged[step]["critic/advantages/max"] == 0
