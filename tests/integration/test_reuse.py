"""Another verl project that only installs the wheel: no recipe, dataset or sampler of ours, and no vLLM."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import venv
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from assets import make_index, make_tiny_model, rl_rows, teach_form
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from trainer import Training, rollouts
from wheel_build import build_wheel

from gream_verl import cpu

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not cpu.is_active(), reason="torch was built for an accelerator"),
]

CONFIG = """
defaults: [ppo_trainer, _self_]

data: {train_batch_size: 4, max_prompt_length: 160, max_response_length: 32, shuffle: false, dataloader_num_workers: 0}
reward:
  num_workers: 1
  reward_manager: {source: register, name: rsvr}
algorithm: {adv_estimator: bgae}
actor_rollout_ref:
  model: {use_remove_padding: false, enable_gradient_checkpointing: false, override_config: {attn_implementation: sdpa}}
  actor:
    strategy: fsdp2
    ppo_mini_batch_size: 4
    use_dynamic_bsz: true
    ppo_max_token_len_per_gpu: 2048
    use_torch_compile: false
    fsdp_config: {use_torch_compile: false, model_dtype: fp32, mixed_precision: {param_dtype: fp32, reduce_dtype: fp32}}
  rollout:
    name: hf
    tensor_model_parallel_size: 1
    n: 4
    temperature: 0.7
    dtype: float32
    free_cache_engine: false
    log_prob_use_dynamic_bsz: true
    agent: {num_workers: 1}
transfer_queue: {backend: {SimpleStorage: {num_data_storage_units: 1}}}
ray_kwargs: {ray_init: {num_cpus: 16, num_gpus: 1, include_dashboard: false, object_store_memory: 500000000}}
trainer:
  device: cpu
  logger: [console]
  n_gpus_per_node: 1
  total_training_steps: 1
  val_before_train: false
  test_freq: -1
  save_freq: -1
  resume_mode: disable
"""


def with_dependencies(names: Iterable[str]) -> set[str]:
    """Return the installed distributions that ``names`` need, themselves included."""
    found: set[str] = set()
    waiting = [Requirement(name) for name in names]
    while waiting:
        requirement = waiting.pop()
        try:
            needs = importlib.metadata.requires(requirement.name) or []
        except importlib.metadata.PackageNotFoundError:  # what the lock leaves out on purpose
            continue
        extras = {"", *requirement.extras}
        name = canonicalize_name(requirement.name)
        if {f"{name}[{extra}]" for extra in extras} <= found:
            continue
        found |= {f"{name}[{extra}]" for extra in extras}
        for need in map(Requirement, needs):
            if need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in extras):
                waiting.append(need)
    return {name.partition("[")[0] for name in found}


@pytest.fixture(scope="module")
def only_verl(tmp_path_factory) -> str:
    """Return the interpreter of an environment that has verl, what verl needs, and our wheel."""
    folder = tmp_path_factory.mktemp("only_verl")
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv/bin/python"
    site = next(folder.glob("venv/lib/python*/site-packages"))
    core = [need for need in importlib.metadata.requires("gream-verl") or [] if "extra ==" not in need]
    # `verl` alone requires less than its trainer imports
    for name in with_dependencies(["verl[verl-core]", *core]):
        installed = importlib.metadata.distribution(name)
        for part in {file.parts[0] for file in installed.files or []} - {"..", "/", "__pycache__"}:
            if not (site / part).exists():
                (site / part).symlink_to(str(installed.locate_file(part)))
    wheel = build_wheel(tmp_path_factory.mktemp("wheel"))
    install = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-deps", "--no-index", "--offline"]
    subprocess.run([*install, "--python", str(python), str(wheel)], check=True, timeout=100)
    return str(python)


def test_the_environment_has_verl_and_us_and_nothing_more(only_verl):
    script = (
        "import importlib.util as u, gream_verl; print(gream_verl.__file__);"
        "print(*[n for n in ('vllm', 'llamafactory', 'faiss', 'polars', 'hypothesis', 'recipes') if u.find_spec(n)])"
    )
    done = subprocess.run([only_verl, "-c", script], capture_output=True, text=True, timeout=100, check=True, cwd="/")
    examined = subprocess.run(
        [str(Path(only_verl).with_name("gream")), "doctor"], capture_output=True, text=True, timeout=100, check=False
    )
    assert examined.returncode == 0, examined.stderr
    where, others = done.stdout.split("\n")[:2]
    assert where.startswith(str(Path(only_verl).parents[1]))
    assert others == ""


def test_a_foreign_project_trains_with_our_reward_and_advantage_by_name(only_verl, tmp_path):
    index = make_index()
    make_tiny_model(tmp_path / "sft", index)
    teach_form(tmp_path / "sft", index)
    prompts = rl_rows(index, 8)
    prompts[1]["reward_model"]["ground_truth"] = None
    pq.write_table(pa.Table.from_pylist(prompts), tmp_path / "prompts.parquet")
    (tmp_path / "foreign.yaml").write_text(CONFIG)
    printed = Training(
        tmp_path,
        *(f"--config-dir={tmp_path}", "--config-name=foreign", f"actor_rollout_ref.model.path={tmp_path}/sft"),
        *(f"data.train_files={tmp_path}/prompts.parquet", f"data.val_files={tmp_path}/prompts.parquet"),
        f"trainer.rollout_data_dir={tmp_path}/srpo/rollouts",
        recipe=None,
        rollout="hf",
        python=only_verl,
    ).finish()
    assert "step:1 " in printed
    # The reward says which row has no ground truth; stock verl trains on the others of the batch, and on padding rows.
    assert "row 1: reward_model.ground_truth is None" in printed
    rows = rollouts(tmp_path, 1)
    assert len(rows) == 4 * 4
    assert sum(bool(row["output"]) for row in rows) == 3 * 4
    scores = {row["score"] for row in rows}
    assert {0.0} < scores
    assert all(0 <= score <= 1 for score in scores)
