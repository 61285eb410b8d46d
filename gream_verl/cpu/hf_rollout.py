"""Rollouts by Hugging Face ``transformers`` for machines without vLLM (``actor_rollout_ref.rollout.name=hf_cpu``).

One Ray actor per replica batches the requests that arrive together and decodes them with a key-value cache. It is
lighter than vLLM, and reproducible: what a request draws depends on the seed, the step and the prompt, not on what else
is in its batch, so that a run which was killed and goes on takes the way of one that was not. That holds for one
replica and prompts that differ: verl spreads requests over replicas by chance, and equal prompts are told apart by
their arrival. It offers token ids in, token ids out; there is no HTTP endpoint, no tool use.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import torch
from torch import Tensor
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import HFModelConfig
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

GATHER_SECONDS = 0.02


@dataclass
class Request:
    """One prompt to continue.

    Attributes:
        prompt: Token ids.
        sampling: verl's sampling parameters.
        seed: What to draw its tokens with.
        result: Where the answer goes.
    """

    prompt: list[int]
    sampling: dict[str, Any]
    seed: int
    result: asyncio.Future


def next_token_log_probs(
    logits: Tensor, temperatures: Tensor, top_ps: Sequence[float], top_ks: Sequence[int]
) -> Tensor:
    """Return the log-probabilities that tokens are sampled with.

    Args:
        logits: Shape [rows, vocabulary].
        temperatures: Shape [rows]; 0 stands for greedy decoding and leaves the logits as they are.
        top_ps: Share of probability to sample from, per row.
        top_ks: Number of tokens to sample from, per row; 0 or less for all.

    Returns:
        Log-probabilities, -inf for tokens that cannot be sampled, shape [rows, vocabulary].
    """
    logits = logits / torch.where(temperatures > 0, temperatures, 1.0).unsqueeze(-1)
    if any(top_p < 1 for top_p in top_ps) or any(top_k > 0 for top_k in top_ks):
        sorted_logits, order = logits.sort(dim=-1, descending=True)
        probabilities = sorted_logits.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        rank = torch.arange(logits.shape[-1])
        limits = torch.tensor([top_k if top_k > 0 else logits.shape[-1] for top_k in top_ks])
        drop = (before >= torch.tensor(top_ps).unsqueeze(-1)) | (rank >= limits.unsqueeze(-1))
        drop[:, 0] = False
        logits = logits.scatter(-1, order, sorted_logits.masked_fill(drop, -torch.inf))
    return logits.log_softmax(dim=-1)


def draw(log_probs: Tensor, uniform: Tensor) -> Tensor:
    """Return a token for every row, by the inverse of its cumulative distribution.

    Args:
        log_probs: Log-probabilities, shape [rows, vocabulary].
        uniform: A number from 0 to 1, exclusive, for every row, float64, shape [rows].
    """
    cumulative = log_probs.double().exp().cumsum(dim=-1)
    wanted = uniform.unsqueeze(-1) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, wanted, right=True).squeeze(-1)


def _uniform(seed: int, count: int) -> Tensor:
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class HFServer:
    """The Ray actor that holds a copy of the model and generates."""

    def __init__(self, config: Any, model_config: Any, replica_rank: int) -> None:
        from transformers import AutoModelForCausalLM

        self.config = omega_conf_to_dataclass(config)
        self.model_config: HFModelConfig = omega_conf_to_dataclass(model_config, dataclass_type=HFModelConfig)
        self.model = AutoModelForCausalLM.from_pretrained(
            self.model_config.local_path, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        tokenizer = self.model_config.tokenizer
        end = self.model.generation_config.eos_token_id
        ends = tokenizer.eos_token_id if end is None else end
        self.end_tokens = torch.tensor([ends] if isinstance(ends, int) else ends)
        self.pad_token = tokenizer.pad_token_id
        self.vocabulary = len(tokenizer)
        self.global_steps: int | None = None
        self.seed = (self.config.seed, replica_rank)
        self.seen: Counter[str] = Counter()
        self.waiting: list[Request] = []
        self.working: asyncio.Task | None = None

    async def load_weights(self, state: dict[str, Tensor], global_steps: int | None) -> None:
        """Take the weights of the actor."""
        unexpected = self.model.load_state_dict(state, strict=False).unexpected_keys
        if unexpected:
            raise RuntimeError(f"hf_cpu: the actor sent weights that the model does not have: {unexpected[:5]}")
        self.global_steps = global_steps
        self.seen.clear()

    def _seed(self, prompt: Sequence[int], sampling: dict[str, Any]) -> int:
        """Return the seed of a request: the n-th with this prompt under these weights always gets the same one."""
        key = repr((self.seed, self.global_steps, list(prompt), sorted(sampling.items())))
        self.seen[key] += 1
        digest = hashlib.blake2b(f"{key} {self.seen[key]}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    async def generate(
        self, prompt_ids: Sequence[int], sampling_params: dict[str, Any], request_id: str, **_: Any
    ) -> TokenOutput:
        """Return a continuation of ``prompt_ids``."""
        request = Request(
            list(prompt_ids),
            dict(sampling_params),
            self._seed(prompt_ids, sampling_params),
            asyncio.get_running_loop().create_future(),
        )
        self.waiting.append(request)
        if self.working is None or self.working.done():
            self.working = asyncio.create_task(self._work())
        return await request.result

    async def _work(self) -> None:
        await asyncio.sleep(GATHER_SECONDS)  # let the rest of the batch arrive
        size = max(1, self.config.max_num_seqs)
        while self.waiting:
            batch, self.waiting = self.waiting[:size], self.waiting[size:]
            try:
                outputs = await asyncio.to_thread(self._generate_batch, batch)
            except Exception as error:
                for request in batch:
                    request.result.set_exception(error)
                continue
            for request, output in zip(batch, outputs, strict=True):
                request.result.set_result(output)

    def _budget(self, request: Request) -> int:
        asked = request.sampling.get("max_tokens", request.sampling.get("max_new_tokens"))
        room = self.config.prompt_length + self.config.response_length - len(request.prompt)
        return max(1, asked or min(self.config.response_length, room))

    @torch.no_grad()
    def _generate_batch(self, batch: Sequence[Request]) -> list[TokenOutput]:
        width = max(len(request.prompt) for request in batch)
        tokens = torch.full((len(batch), width), self.pad_token)
        mask = torch.zeros_like(tokens)
        for row, request in enumerate(batch):
            tokens[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
            mask[row, width - len(request.prompt) :] = 1
        temperatures = torch.tensor([float(request.sampling.get("temperature", 1.0)) for request in batch])
        top_ps = [float(request.sampling.get("top_p", 1.0)) for request in batch]
        top_ks = [int(request.sampling.get("top_k", -1)) for request in batch]
        budgets = torch.tensor([self._budget(request) for request in batch])

        uniform = torch.stack([_uniform(request.seed, int(budgets.max())) for request in batch])

        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        lengths = torch.zeros_like(budgets)
        alive = torch.ones_like(budgets, dtype=torch.bool)
        responses: list[Tensor] = []
        cache, log_probs = None, []
        while alive.any():
            output = self.model(
                input_ids=tokens,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            logits = output.logits[:, -1].float()
            logits[:, self.vocabulary :] = -torch.inf  # rows that only fill the embedding up
            distribution = next_token_log_probs(logits, temperatures, top_ps, top_ks)
            sampled = draw(distribution, uniform[:, len(responses)])
            chosen = torch.where(temperatures > 0, sampled, distribution.argmax(dim=-1))
            responses.append(chosen)
            log_probs.append(distribution.gather(-1, chosen.unsqueeze(-1)).squeeze(-1))
            lengths += alive
            alive &= ~torch.isin(chosen, self.end_tokens) & (lengths < budgets)
            tokens, positions = chosen.unsqueeze(-1), positions[:, -1:] + 1
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

    # What verl asks of a server and what means nothing here: there is no memory to give back.

    async def wake_up(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    async def abort_all_requests(self, **_: Any) -> dict[str, Any]:
        """Abort nothing."""
        return {"aborted_count": 0, "request_ids": []}

    sleep = clear_kv_cache = release_kv_cache = resume_kv_cache = resume_generation = wake_up
    start_profile = stop_profile = wake_up


class HFReplica(RolloutReplica):
    """Starts the server of one replica."""

    async def launch_servers(self) -> None:
        """Start the actor and wait until it has loaded the model."""
        name = f"hf_cpu_server_{self.replica_rank}_0{self.name_suffix}"
        server = (
            ray.remote(HFServer)
            .options(name=name, max_concurrency=self.max_concurrency, num_cpus=0)
            .remote(self.config, self.model_config, self.replica_rank)
        )
        self.servers = [server]
        await server.wake_up.remote()
        self._server_handle = server
        self._server_address = name


class HFServerAdapter(BaseRollout):
    """The actor's side: sends its weights to the server."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        world_size = self.config.tensor_model_parallel_size * self.config.data_parallel_size
        rank = int(os.environ["RANK"])
        self.replica_rank = rank // world_size if replica_rank == -1 else replica_rank
        self.is_leader = rank % world_size == 0

    async def resume(self, tags: list[str]) -> None:
        """Do nothing: the server never sleeps."""

    async def release(self) -> None:
        """Do nothing: the server never sleeps."""

    @torch.no_grad()
    async def update_weights(
        self, weights: Any, global_steps: int | None = None, wire_format: str = "named_tensors", **_: Any
    ) -> None:
        """Send all weights.

        Raises:
            ValueError: When verl asks for a form other than named tensors.
        """
        from verl.workers.rollout.utils import ensure_async_iterator

        if wire_format != "named_tensors":
            raise ValueError(f"hf_cpu takes weights as named_tensors only, got {wire_format}")
        state = {}
        async for name, tensor in ensure_async_iterator(weights):  # every rank must take all: collectives inside
            state[name] = tensor.detach().to("cpu", torch.float32).clone()
        if self.is_leader:
            server = ray.get_actor(f"hf_cpu_server_{self.replica_rank}_0")
            await server.load_weights.remote(state, global_steps)
