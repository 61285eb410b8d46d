"""Processors of vLLM: answers that are real items, and the probabilities of given tokens.

``ConstrainedAnswer`` lets chains run free and allows only real items as answers.

The engine takes it by name, and the item index by vLLM's ``additional_config``:

    logits_processors=["gream_verl.decoding.vllm_processor:ConstrainedAnswer"]
    additional_config={"gream": {"index_file": "data/beauty.index.json", "mode": "reasoning"}}

A single request switches it by ``SamplingParams(extra_args={"gream": "off"})``. It is no entry point, because vLLM
keeps the tokens sampled so far only for processors that the engine argument names
(vllm/v1/worker/gpu_model_runner.py:726).

``TruthScorer`` answers the requests of ``truth_scoring``. It comes last in ``logits_processors``.

Both work with the first and the second model runner of vLLM, whose interfaces for processors differ. The first tells
which requests are where in the batch, and each has a growing list of its tokens. The second gives every request a slot
for all its life, and tells at each step which slots are computed, and their latest tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.v1.sample.logits_processor import BatchUpdate, LogitsProcessor, MoveDirectionality
from vllm.v1.sample.logits_processor.builtin import process_dict_updates

try:
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as SecondLogitsProcessor
except ImportError:  # a vLLM whose second model runner takes no processors, or that has none
    SecondLogitsProcessor = object

from gream_verl.core.errors import InputError
from gream_verl.core.options import checked_options
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.decoding.answer_automaton import FREE, ROOT, AnswerAutomaton, Constraint, ConstraintOptions
from gream_verl.decoding.truth_scoring import force

OPTIONS = "additional_config.gream"


class ConstrainedAnswer(LogitsProcessor, SecondLogitsProcessor):
    """Allows only real items in the answers of a batch."""

    def __init__(self, vllm_config: VllmConfig, *runner: Any) -> None:
        self.requests = _second_requests(vllm_config, runner)
        given = vllm_config.additional_config
        options = checked_options(ConstraintOptions, OPTIONS, given.get("gream") if isinstance(given, dict) else None)
        from transformers import AutoTokenizer

        name = vllm_config.model_config.tokenizer
        self.mode: Constraint = options.mode
        index, tokenizer = ItemIndex.load(options.index_file), AutoTokenizer.from_pretrained(name)
        self.automaton = AnswerAutomaton.build(index, tokenizer, name)
        self.slots = Slots(self.automaton, vllm_config.scheduler_config.max_num_seqs)

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ``ValueError`` for a request with an unknown mode."""
        mode = (sampling_params.extra_args or {}).get("gream")
        if mode is not None and mode not in get_args(Constraint):
            raise ValueError(f"extra_args['gream'] is {mode!r}; expected one of {', '.join(get_args(Constraint))}")

    def is_argmax_invariant(self) -> bool:
        """Greedy sampling is constrained, too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """First runner: follow the requests that vLLM adds to the batch, removes from it and moves within it."""
        if batch_update is None:
            return
        for slot in batch_update.removed:
            self.slots.clear(slot)
        for slot, parameters, _, output in batch_update.added:
            self._begin(slot, parameters, output)
        for source, target, direction in batch_update.moved:
            self.slots.move(source, target, swap=direction == MoveDirectionality.SWAP)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Second runner: begin a request, new or interrupted; True if its answer is constrained."""
        self._begin(req_idx, sampling_params, [])
        return req_idx in self.slots.outputs

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Constrain ``logits`` [requests, vocabulary], in place.

        The sampled tokens are read here, because with asynchronous scheduling ``update_state`` does not know them yet.
        """
        if not self.slots.outputs:
            return logits
        slots = np.arange(len(logits))
        if ctx is not None:
            slots = ctx.idx_mapping_np
            receive(self.requests, ctx, self.slots.outputs)
        self.slots.read()
        return self.automaton.constrain(logits, self.slots.states[slots])

    def _begin(self, slot: int, parameters: SamplingParams, output: list[int]) -> None:
        mode = (parameters.extra_args or {}).get("gream") or self.mode
        self.slots.clear(slot) if mode == "off" else self.slots.fill(slot, output, direct=mode == "direct")


class Slots:
    """The state of the request in each slot of the batch."""

    def __init__(self, automaton: AnswerAutomaton, size: int) -> None:
        self.automaton = automaton
        self.outputs: dict[int, list[int]] = {}  # tokens of each constrained request: vLLM's own, growing lists
        self.states = np.full(size, automaton.off, dtype=np.int64)  # `off` without a constrained request
        self.seen = np.zeros(size, dtype=np.int64)  # number of tokens that the state has followed
        self.direct = np.zeros(size, dtype=bool)  # True for a request in direct mode

    def clear(self, slot: int) -> None:
        """Forget the request in a slot."""
        self.outputs.pop(slot, None)
        self.states[slot], self.seen[slot], self.direct[slot] = self.automaton.off, 0, False

    def fill(self, slot: int, output: list[int], *, direct: bool) -> None:
        """Begin a request."""
        self.outputs[slot] = output
        self.states[slot], self.seen[slot], self.direct[slot] = ROOT if direct else FREE, 0, direct

    def move(self, source: int, target: int, *, swap: bool) -> None:
        """Move a request to another slot, or exchange two."""
        pair = [target, source]
        moved: list[Any] = [self.outputs.pop(slot, None) for slot in pair]
        for array in (self.states, self.seen, self.direct):
            array[pair] = array[pair[::-1]]
        for slot, output in zip(pair[::-1], moved, strict=True):
            if output is not None:
                self.outputs[slot] = output
        if not swap:
            self.clear(source)

    def read(self) -> None:
        """Advance every request by its new tokens: one each, or all after a preemption. -1 is a token not known yet."""
        while True:
            new = [
                (slot, output[seen])
                for slot, output in self.outputs.items()
                if len(output) > (seen := self.seen[slot]) and output[seen] >= 0
            ]
            if not new:
                return
            slots, tokens = np.array(new).T
            self.states[slots] = self.automaton.advance(self.states[slots], tokens, self.direct[slots])
            self.seen[slots] += 1


class TruthScorer(LogitsProcessor, SecondLogitsProcessor):
    """Forces the tokens of the scoring requests of a batch."""

    def __init__(self, vllm_config: VllmConfig, *runner: Any) -> None:
        self.requests = _second_requests(vllm_config, runner)
        # the given tokens, the temperature, and the tokens so far: vLLM's own, growing list
        self.slots: dict[int, tuple[list[int], float, list[int]]] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Raise ``ValueError`` for a scoring request of more tokens than it gives."""
        given = (sampling_params.extra_args or {}).get("gream_truth")
        if given is not None and not 0 < (sampling_params.max_tokens or 0) <= len(given):
            raise ValueError(
                f"max_tokens is {sampling_params.max_tokens}; expected 1 to {len(given)}, as gream_truth has"
            )

    def is_argmax_invariant(self) -> bool:
        """Greedy sampling is forced, too."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """First runner: follow the requests that vLLM adds to the batch, removes from it and moves within it."""
        process_dict_updates(self.slots, batch_update, _scoring_request)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Second runner: begin a request, new or interrupted; True if it is a scoring request."""
        self.slots.pop(req_idx, None)
        if request := _scoring_request(sampling_params, None, []):
            self.slots[req_idx] = request
        return request is not None

    def apply(self, logits: torch.Tensor, ctx: Any = None) -> torch.Tensor:
        """Force the next token of every scoring request; ``logits`` are [requests, vocabulary]."""
        if not self.slots:
            return logits
        rows = {slot: slot for slot in self.slots}
        if ctx is not None:
            rows = {slot: row for row, slot in enumerate(ctx.idx_mapping_np.tolist())}
            receive(self.requests, ctx, {slot: output for slot, (*_, output) in self.slots.items()})
        due = [
            (rows[slot], given[len(output)], temperature)
            for slot, (given, temperature, output) in self.slots.items()
            if slot in rows and len(output) < len(given)
        ]
        if due:
            slots, tokens, temperatures = (
                torch.tensor(column, device=logits.device) for column in zip(*due, strict=True)
            )
            logits[slots] = force(logits[slots], tokens, temperatures)
        return logits


def receive(requests: Any, ctx: Any, outputs: Mapping[int, list[int]]) -> None:
    """Second runner: add the tokens that are known by now to the output of each request, found by its slot.

    Args:
        requests: vLLM's ``LogitsProcRequestState``.
        ctx: vLLM's ``LogitsContext`` of a step. Without speculative decoding it has one row per request.
        outputs: Tokens of each request after its prompt.
    """
    prompts = requests.prompt_len.np
    steps = zip(ctx.idx_mapping_np.tolist(), ctx.pos.tolist(), ctx.input_ids.tolist(), strict=True)
    for slot, position, token in steps:
        output = outputs.get(slot)
        if output is None or position < (known := int(prompts[slot]) + len(output)):
            continue
        if position > known:  # it was interrupted, and comes again with all that it had written
            output += requests.all_token_ids.gpu[slot, known:position].tolist()
        output.append(token)


def _second_requests(vllm_config: VllmConfig, runner: Sequence[Any]) -> Any:
    """Return the second runner's table of requests, None for the first, which gives a device and a flag."""
    if len(runner) > 1:
        return None
    if vllm_config.speculative_config is not None:
        raise InputError("gream-verl's logits processors do not work with speculative decoding; leave it out")
    return runner[0]


def _scoring_request(
    parameters: SamplingParams, _: list[int] | None, output: list[int]
) -> tuple[list[int], float, list[int]] | None:
    """Return the given tokens, the temperature and the tokens so far of a scoring request, None for another one."""
    extra = parameters.extra_args or {}
    if "gream_truth" not in extra:
        return None
    # a request that was interrupted comes again with the rest of max_tokens
    return extra["gream_truth"][-(parameters.max_tokens or 0) :], extra.get("gream_temperature", 1.0), output
