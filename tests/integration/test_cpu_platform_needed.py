"""Proof that the frameworks still need the parts of ``gream_verl.cpu``: a test that fails names a file that can go.

The facts come from a process with verl and without any plugin.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gream_verl import cpu

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not cpu.is_active(), reason="torch was built for an accelerator"),
]

FACTS = """
import importlib.metadata, inspect, json, os

import verl
import torch.distributed
try:
    torch.empty(1).pin_memory()
    pin_error = ""
except RuntimeError as error:
    pin_error = str(error)

from verl.plugin.platform import PlatformRegistry, get_platform

facts = {"platform": get_platform().device_name, "pin_error": pin_error}

from verl.utils import torch_functional
facts["log_probs"] = inspect.getsource(torch_functional.logprobs_from_logits_v2)

from verl.workers.engine.fsdp import transformer_impl
facts["pins"] = "CPUOffloadPolicy(pin_memory=True)" in inspect.getsource(transformer_impl)

from verl.workers.engine.base import EngineRegistry
facts["engine_devices"] = sorted(map(str, EngineRegistry._engines["language_model"]["fsdp2"]))

from verl.utils import distributed
distributed.get_device_name, distributed.get_nccl_backend = lambda: "cpu", lambda: "gloo"
os.environ["DIST_INIT_METHOD"] = "tcp://127.0.0.1:0"
try:
    distributed.initialize_global_process_group_ray(timeout_second=10)
    facts["process_group_error"] = ""
except Exception as error:
    facts["process_group_error"] = str(error)

try:
    facts["vllm"] = importlib.metadata.version("vllm")
except importlib.metadata.PackageNotFoundError:
    facts["vllm"] = None
print(json.dumps(facts))
"""


@pytest.fixture(scope="module")
def stock() -> dict:
    names = ("RAY_", "VLLM_", "VERL_", "TQ_", "OMP_", "TOKENIZERS_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(names)}
    done = subprocess.run(
        [sys.executable, "-c", FACTS],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        env={**environment, "VERL_USE_EXTERNAL_PLUGINS": "none"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_platform_verl_has_none_for_a_cpu(stock):
    assert stock["platform"] != "cpu"


def test_environment_verl_has_no_fsdp_engine_for_a_cpu(stock):
    assert stock["engine_devices"]
    assert not [device for device in stock["engine_devices"] if "cpu" in device]


def test_process_group_verl_asks_for_gloo_twice(stock):
    assert "cpu" in stock["process_group_error"]


def test_fsdp_verl_pins_memory_and_torch_cannot_without_an_accelerator(stock):
    assert stock["pins"]
    assert "accelerator" in stock["pin_error"]


def test_log_probs_verl_loops_over_rows(stock):
    assert "for " in stock["log_probs"]


def test_vllm_distribution_the_cpu_wheel_has_another_name(stock):
    assert stock["vllm"] is None


def source(package: str, file: str) -> str:
    """Return the text of a module; skip the test where its package is not installed."""
    found = importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"{package} is not installed")
    return Path(found.submodule_search_locations[0], file).read_text()


def test_vllm_weights_vllm_drops_the_weights_it_packs():
    layers = source("vllm", "model_executor/layers/linear.py")
    assert "dispatch_cpu_unquantized_gemm(layer, remove_weight=True)" in layers


def test_llamafactory_muon_multiplies_in_bfloat16():
    assert "X = G.bfloat16()" in source("llamafactory", "third_party/muon/muon.py")
