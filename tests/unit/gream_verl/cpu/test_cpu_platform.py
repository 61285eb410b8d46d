from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import verl  # noqa: F401  loads the plugin
from hypothesis import given, settings
from hypothesis import strategies as st

from gream_verl import cpu
from gream_verl.core import cpu_environment
from gream_verl.cpu import fsdp, log_probs, platform, process_group, vllm_distribution, vllm_weights

cpu_only = pytest.mark.skipif(not cpu.is_active(), reason="torch was built for an accelerator")


@cpu_only
def test_verl_chooses_the_cpu_platform():
    from verl.plugin.platform import get_platform
    from verl.utils.device import get_device_name, get_nccl_backend, get_resource_name, get_torch_device

    assert get_platform().device_name == get_device_name() == "cpu"
    assert get_nccl_backend() == "gloo"
    assert get_resource_name() == "GPU"
    assert not get_platform().is_ipc_supported()
    device = get_torch_device()
    device.empty_cache()
    device.manual_seed(1)
    free, total = device.mem_get_info()
    assert 0 < free <= total
    assert device.memory_allocated() > 0


@cpu_only
def test_an_accelerator_build_is_left_alone(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    for part in (cpu_environment, platform, process_group, fsdp, log_probs, vllm_distribution):
        name = "set_defaults" if part is cpu_environment else "register"
        monkeypatch.setattr(part, name, lambda: pytest.fail("this part is not inert"))
    assert not cpu.is_active()
    cpu.activate()


def test_environment_defaults_give_way_to_the_user():
    variables = {"OMP_NUM_THREADS": "7", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
    cpu_environment.set_defaults(variables)
    assert variables["OMP_NUM_THREADS"] == "7"
    assert variables["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "1"
    assert variables["VERL_ENGINE_DEVICE"] == "cuda"


@cpu_only
def test_ray_finds_the_loopback_address_only():
    from ray._private import services

    assert services.get_node_ip_address() == "127.0.0.1"


def test_the_process_group_is_started_once_for_the_cpu():
    asked = []
    module = ModuleType("distributed")
    module.initialize_global_process_group_ray = lambda **kwargs: asked.append(kwargs)
    process_group._patch(module)
    module.initialize_global_process_group_ray()
    module.initialize_global_process_group_ray(timeout_second=3, backend="gloo")
    assert asked == [
        {"timeout_second": None, "backend": "cpu:gloo"},
        {"timeout_second": 3, "backend": "gloo"},
    ]


def test_offloading_never_pins_memory():
    from torch.distributed.fsdp import CPUOffloadPolicy

    module = ModuleType("transformer_impl")
    module.CPUOffloadPolicy = CPUOffloadPolicy
    fsdp._patch(module)
    policy = module.CPUOffloadPolicy(pin_memory=True)
    assert isinstance(policy, CPUOffloadPolicy)
    assert policy.pin_memory is False


@settings(max_examples=10)
@given(st.integers(1, 40), st.integers(2, 30), st.integers(0, 2**32))
def test_log_probs_and_their_gradients_agree_with_log_softmax(rows, vocabulary, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * 5
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    fast, slow = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    computed = log_probs.log_probs_from_logits(fast, labels)
    expected = slow.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(computed, expected)
    (computed * torch.arange(rows)).sum().backward()
    (expected * torch.arange(rows)).sum().backward()
    torch.testing.assert_close(fast.grad, slow.grad)


@cpu_only
def test_verl_uses_the_vectorised_log_probs():
    from verl.utils import torch_functional

    assert torch_functional.logprobs_from_logits_v2 is log_probs.log_probs_from_logits


@cpu_only
def test_the_cpu_wheel_of_vllm_goes_by_its_usual_name():
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed")
    assert importlib.metadata.version("vllm").endswith("+cpu")


def test_vllm_on_a_cpu_keeps_the_weights_of_linear_layers(monkeypatch):
    # The real vLLM takes half a minute to import; the integration test runs it.
    calls = []
    names = ("vllm", "vllm.platforms", "vllm.model_executor", "vllm.model_executor.layers")
    stubs = {name: ModuleType(name) for name in (*names, "vllm.model_executor.layers.utils")}
    for name, stub in stubs.items():
        monkeypatch.setitem(sys.modules, name, stub)
    utils = stubs["vllm.model_executor.layers.utils"]
    stubs["vllm.model_executor.layers"].utils = utils
    utils.dispatch_cpu_unquantized_gemm = lambda layer, remove_weight: calls.append((layer, remove_weight))

    stubs["vllm.platforms"].current_platform = SimpleNamespace(is_cpu=lambda: False)
    vllm_weights.register()
    utils.dispatch_cpu_unquantized_gemm("on a GPU", remove_weight=True)

    stubs["vllm.platforms"].current_platform = SimpleNamespace(is_cpu=lambda: True)
    vllm_weights.register()
    vllm_weights.register()
    utils.dispatch_cpu_unquantized_gemm("on a CPU", remove_weight=True)
    assert calls == [("on a GPU", True), ("on a CPU", False)]
