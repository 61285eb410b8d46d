"""Deterministic rollouts by ``transformers``, for tests that run verl without vLLM or compare two runs.

A request draws by the seed, the step and its prompt, not by the rest of its batch: a run that was killed and goes on
takes the way of one that was not. That holds for one replica and prompts that differ.
"""

from __future__ import annotations

import asyncio
import os
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import ray
import torch
from torch import Tensor
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput


class Request(NamedTuple):
    prompt: list[int]
    sampling: dict[str, Any]
    seed: int
    result: asyncio.Future


class HFServer:
    """The Ray actor that holds a copy of the model and generates."""

    def __init__(self, config: Any, model_config: Any, replica_rank: int) -> None:
        from transformers import AutoModelForCausalLM

        self.config = omega_conf_to_dataclass(config)
        model_config = omega_conf_to_dataclass(model_config, dataclass_type=HFModelConfig)
        self.model = AutoModelForCausalLM.from_pretrained(model_config.local_path, dtype=torch.float32).eval()
        self.tokenizer = model_config.tokenizer
        self.global_steps: int | None = None
        self.seed = (self.config.seed, replica_rank)
        self.seen: Counter[str] = Counter()
        self.waiting: list[Request] = []
        self.working: asyncio.Task | None = None

    async def load_weights(self, state: dict[str, Tensor], global_steps: int | None) -> None:
        assert not self.model.load_state_dict(state, strict=False).unexpected_keys
        self.global_steps = global_steps
        self.seen.clear()

    async def generate(self, prompt_ids: Sequence[int], sampling_params: dict[str, Any], **_: Any) -> TokenOutput:
        # The n-th request with this prompt under these weights always gets the same seed.
        key = repr((self.seed, self.global_steps, list(prompt_ids), sorted(sampling_params.items())))
        self.seen[key] += 1
        seed = zlib.crc32(f"{key} {self.seen[key]}".encode())
        request = Request(list(prompt_ids), dict(sampling_params), seed, asyncio.get_running_loop().create_future())
        self.waiting.append(request)
        if self.working is None or self.working.done():
            self.working = asyncio.create_task(self._work())
        return await request.result

    async def _work(self) -> None:
        await asyncio.sleep(0.02)  # let the rest of the batch arrive
        while self.waiting:
            batch, self.waiting = self.waiting[:64], self.waiting[64:]
            try:
                outputs = await asyncio.to_thread(self._generate_batch, batch)
            except Exception as error:
                for request in batch:
                    request.result.set_exception(error)
                continue
            for request, output in zip(batch, outputs, strict=True):
                request.result.set_result(output)

    @torch.no_grad()
    def _generate_batch(self, batch: Sequence[Request]) -> list[TokenOutput]:
        """Sample at each request's temperature; top-p and top-k are not implemented."""
        longest = self.config.response_length
        tokens, mask = self.tokenizer.pad(
            {"input_ids": [request.prompt for request in batch]}, padding_side="left", return_tensors="pt"
        ).values()
        temperatures = torch.tensor([[float(request.sampling.get("temperature", 1))] for request in batch])
        draws = torch.stack(
            [torch.rand(longest, generator=torch.Generator().manual_seed(request.seed)) for request in batch]
        ).double()
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        alive, cache = torch.ones(len(batch), dtype=torch.bool), None
        responses: list[Tensor] = []
        log_probs: list[Tensor] = []
        lengths = torch.zeros(len(batch), dtype=torch.long)
        while alive.any() and len(responses) < longest:
            output = self.model(
                tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, logits_to_keep=1
            )
            cache = output.past_key_values
            logits = output.logits[:, -1, : len(self.tokenizer)].float() / temperatures.clamp(min=1e-4)
            distribution = logits.log_softmax(dim=-1)
            cumulative = distribution.double().exp().cumsum(dim=-1)
            wanted = draws[:, len(responses), None] * cumulative[:, -1:]
            tokens = torch.searchsorted(cumulative, wanted, right=True)
            responses.append(tokens[:, 0])
            log_probs.append(distribution.gather(-1, tokens)[:, 0])
            lengths += alive
            alive &= tokens[:, 0] != self.tokenizer.eos_token_id
            positions = positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(tokens)], dim=-1)
        return [
            TokenOutput(
                token_ids=torch.stack(responses)[:length, row].tolist(),
                log_probs=torch.stack(log_probs)[:length, row].tolist() if request.sampling.get("logprobs") else None,
                stop_reason="completed",
                extra_fields={"global_steps": self.global_steps},
            )
            for row, (request, length) in enumerate(zip(batch, lengths.tolist(), strict=True))
        ]

    async def wake_up(self, *_: Any, **__: Any) -> None:
        """Do nothing: the server never sleeps and holds no memory to give back."""

    async def abort_all_requests(self, **_: Any) -> dict[str, Any]:
        return {"aborted_count": 0, "request_ids": []}

    sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = resume_generation = wake_up
    start_profile = stop_profile = wake_up


class HFReplica(RolloutReplica):
    """Starts the server of one replica."""

    async def launch_servers(self) -> None:
        name = f"hf_server_{self.replica_rank}_0{self.name_suffix}"
        server = (
            ray.remote(HFServer)
            .options(name=name, max_concurrency=self.max_concurrency, num_cpus=0)
            .remote(self.config, self.model_config, self.replica_rank)
        )
        self.servers = [server]
        await server.wake_up.remote()  # the model is loaded
        self._server_handle, self._server_address = server, name


class HFServerAdapter(BaseRollout):
    """The actor's side: sends its weights to the server."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        world_size = self.config.tensor_model_parallel_size * self.config.data_parallel_size
        rank = int(os.environ["RANK"])
        self.replica_rank = rank // world_size if replica_rank == -1 else replica_rank
        self.is_leader = rank % world_size == 0

    async def resume(self, tags: list[str]) -> None:
        """Do nothing."""

    async def release(self) -> None:
        """Do nothing."""

    @torch.no_grad()
    async def update_weights(self, weights: Any, global_steps: int | None = None, **_: Any) -> None:
        from verl.workers.rollout.utils import ensure_async_iterator

        state = {}
        async for name, tensor in ensure_async_iterator(weights):  # every rank must take all: collectives inside
            state[name] = tensor.detach().to("cpu", torch.float32).clone()
        if self.is_leader:
            await ray.get_actor(f"hf_server_{self.replica_rank}_0").load_weights.remote(state, global_steps)
