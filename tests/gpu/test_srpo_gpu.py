import subprocess
import sys

import pytest
import torch
from assets import make_index, make_tiny_model, write_rl_files

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def test_the_gpu_recipe_trains_two_steps_on_one_gpu(tmp_path):
    index = make_index()
    make_tiny_model(tmp_path / "sft", index)
    write_rl_files(tmp_path / "data", index)
    overrides = [
        *("gream.dataset=tiny", f"gream.run={tmp_path}", "trainer.n_gpus_per_node=1", "trainer.total_training_steps=2"),
        *("trainer.save_freq=2", "trainer.test_freq=2", "data.train_batch_size=8", "data.max_prompt_length=128"),
        *("data.max_response_length=64", "actor_rollout_ref.actor.ppo_mini_batch_size=8"),
        *("actor_rollout_ref.rollout.max_model_len=256", "actor_rollout_ref.rollout.gpu_memory_utilization=0.3"),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "verl.trainer.main_ppo", "+recipe=gream_srpo", *overrides],
        cwd=tmp_path, capture_output=True, text=True, timeout=840, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    assert list((tmp_path / "srpo/global_step_2/actor/huggingface").glob("*.safetensors"))
