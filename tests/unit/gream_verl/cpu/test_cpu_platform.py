from __future__ import annotations

import asyncio
import importlib.metadata
import os
import sys
from collections import Counter
from types import ModuleType, SimpleNamespace

import pytest
import torch
import verl  # noqa: F401  loads the plugin
from assets import make_index, make_tiny_model
from hypothesis import given
from hypothesis import strategies as st

from gream_verl import cpu
from gream_verl.cpu import environment, fsdp, log_probs, process_group, vllm_weights

cpu_only = pytest.mark.skipif(not cpu.is_active(), reason="torch was built for an accelerator")


@cpu_only
def test_verl_settles_for_the_cpu_platform():
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
    variables = dict(os.environ)
    assert not cpu.is_active()
    cpu.activate()
    assert dict(os.environ) == variables


def test_environment_defaults_give_way_to_the_user():
    variables = {"OMP_NUM_THREADS": "7", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
    environment.set_defaults(variables)
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
    pytest.importorskip("vllm")
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


@cpu_only
def test_both_registries_know_the_hugging_face_rollout():
    from gream_verl.cpu.hf_rollout import HFReplica, HFServerAdapter
    from verl.workers.rollout.base import get_rollout_class
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    assert get_rollout_class("hf_cpu", "async") is HFServerAdapter
    assert RolloutReplicaRegistry.get("hf_cpu") is HFReplica


@cpu_only
def test_sampling_keeps_the_smallest_set_that_reaches_top_p():
    from gream_verl.cpu.hf_rollout import next_token_log_probs

    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4, 1)
    found = next_token_log_probs(logits, torch.ones(4), [1.0, 0.7, 1.0, 0.4], [-1, -1, 3, -1]).exp()
    expected = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.625, 0.375, 0, 0], [0.5263, 0.3158, 0.1579, 0], [1, 0, 0, 0]])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def make_server(folder):
    from gream_verl.cpu.hf_rollout import HFServer
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make_tiny_model(folder, make_index())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    server = HFServer.__new__(HFServer)
    server.config = SimpleNamespace(max_num_seqs=8, prompt_length=32, response_length=12)
    server.model = AutoModelForCausalLM.from_pretrained(folder).eval()
    server.global_steps, server.waiting, server.working = 5, [], None
    server.end_tokens, server.pad_token = torch.tensor([tokenizer.eos_token_id]), tokenizer.pad_token_id
    server.vocabulary, server.seed, server.seen = len(tokenizer), (0, 0), Counter()
    return server, tokenizer


def generate_together(server, prompts, sampling):
    async def generate_all() -> list:
        requests = zip(prompts, sampling, strict=True)
        return await asyncio.gather(*(server.generate(prompt, chosen, "id") for prompt, chosen in requests))

    return asyncio.run(generate_all())


@cpu_only
def test_what_a_request_draws_does_not_depend_on_its_batch(tmp_path):
    server, tokenizer = make_server(tmp_path)
    first, second = tokenizer.encode("Alien"), tokenizer.encode("Toy Story and Fargo")
    hot = {"temperature": 1.0, "top_p": 1.0}

    def texts(prompts, step=5):
        asyncio.run(server.load_weights({}, step))
        return [output.token_ids for output in generate_together(server, prompts, [hot] * len(prompts))]

    together = texts([first, second, first])
    assert together[0] != together[2]
    assert texts([first]) == together[:1]
    assert texts([second, first, first]) == [together[1], together[0], together[2]]
    assert texts([first], step=6) != together[:1]


@cpu_only
@given(st.floats(0, 0.99))
def test_tokens_are_drawn_as_often_as_they_are_likely(offset):
    from gream_verl.cpu.hf_rollout import draw

    log_probs = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3]).log()
    uniform = (torch.arange(1000, dtype=torch.float64) + offset) / 1000
    counts = torch.bincount(draw(log_probs.expand(1000, -1), uniform), minlength=5)
    assert (counts - torch.tensor([0, 500, 200, 0, 300])).abs().max() <= 1


@cpu_only
def test_hugging_face_rollouts_of_a_mixed_batch_equal_generate_one_by_one(tmp_path):
    server, tokenizer = make_server(tmp_path)
    model = server.model
    prompts = [tokenizer.encode(text) for text in ("Alien", "Toy Story and Fargo", "<|a_1|><|b_1|><|c_1|> Heat")]

    outputs = generate_together(
        server,
        prompts,
        [
            {"temperature": 0.0, "logprobs": True},
            {"temperature": 0.0, "max_tokens": 4},
            {"temperature": 0.0, "logprobs": True},
        ],
    )
    for prompt, output, budget in zip(prompts, outputs, [12, 4, 12], strict=True):
        expected = model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=budget)[0, len(prompt) :]
        assert output.token_ids == expected.tolist()
    logits = model(torch.tensor([prompts[2] + outputs[2].token_ids])).logits[0, :, : len(tokenizer)]
    log_probs_of_all = logits.log_softmax(-1)[len(prompts[2]) - 1 : -1]
    chosen = log_probs_of_all.gather(-1, torch.tensor(outputs[2].token_ids).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(torch.tensor(outputs[2].log_probs), chosen.detach(), atol=1e-4, rtol=1e-4)
    assert outputs[1].log_probs is None
