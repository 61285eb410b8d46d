"""Log-probabilities of the distribution that constrained rollouts are drawn from, for the actor and the reference.

verl's trainer scores responses with the whole vocabulary. Under the mix-in ``constrained`` an answer is drawn from the
allowed tokens only, so a ratio of policies has to be of those distributions. This engine of verl's registry is chosen
by ``actor_rollout_ref.model.model_type``, and is verl's FSDP engine but for the logits of forbidden tokens. Its options
are in ``fused_kernel_options``: the one node of the model that takes any key and reaches both engines.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from verl.utils import tensordict_utils
from verl.workers.engine.base import EngineRegistry
from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead

from gream_verl.core.errors import InputError
from gream_verl.core.options import checked_options
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.decoding.answer_automaton import AnswerAutomaton, Constraint, ConstraintOptions

MODEL = "actor_rollout_ref.model"
OPTIONS = f"{MODEL}.fused_kernel_options.gream"
FORBIDDEN = -1e4
"""Logit of a forbidden token. Its probability is 0 in every format; minus infinity makes verl's entropy NaN."""


def restrict(
    logits: Tensor, responses: list[Tensor], rows: Tensor, ends: Tensor, automaton: AnswerAutomaton, mode: Constraint
) -> None:
    """Set the logits of the tokens that each response could not draw to ``FORBIDDEN``, in place.

    1. Follow the responses, to know the state in which each token was drawn.
    2. Find the tokens that are forbidden there.
    3. Leave a place alone whose own token is forbidden: it was drawn without the constraint, as a rollout is that goes
       on after an interruption.

    Args:
        logits: Shape [rows, positions, vocabulary]; position p predicts the token at p + 1.
        responses: The tokens of each response, int64 [length].
        rows: Row of each response in ``logits``, int64 [responses].
        ends: Position after each response's last token, int64 [responses].
        automaton: The allowed tokens.
        mode: The mode of all responses.
    """
    padded = pad_sequence(responses, batch_first=True, padding_value=-1, padding_side="left")
    tokens = padded.cpu().numpy()
    states = automaton.states_before(tokens, mode)
    ruled = (automaton.offsets[states + 1] > automaton.offsets[states]) & (tokens >= 0)
    response, column = (torch.from_numpy(place).to(logits.device) for place in ruled.nonzero())
    places = rows[response], ends[response] - padded.shape[1] + column - 1
    free = logits[places]
    forbidden = automaton.constrain(torch.zeros_like(free), states[ruled]) < 0
    forbidden &= ~forbidden.gather(1, padded[response, column][:, None])
    logits[places] = free.masked_fill(forbidden, FORBIDDEN)


@EngineRegistry.register("constrained_language_model", ["fsdp", "fsdp2", "megatron"], ["cuda", "npu"])
class ConstrainedEngine(FSDPEngineWithLMHead):
    """verl's FSDP engine with log-probabilities and entropy among the allowed tokens."""

    def __init__(self, model_config: Any, engine_config: Any, optimizer_config: Any, checkpoint_config: Any) -> None:
        sequence_parallel = engine_config.get("ulysses_sequence_parallel_size", 1)
        for setting, given, remedy in (
            ("actor_rollout_ref.actor.strategy", engine_config.strategy == "megatron", "fsdp2"),
            ("actor_rollout_ref.actor.ulysses_sequence_parallel_size", sequence_parallel > 1, "1"),
            (f"{MODEL}.use_fused_kernels", model_config.use_fused_kernels, "false"),
        ):
            if given:
                raise InputError(f"{setting}: the mix-in `constrained` cannot be trained with it; set it to {remedy}")
        model_config.model_type = "language_model"  # verl's builder of models knows no other name
        super().__init__(model_config, engine_config, optimizer_config, checkpoint_config)
        self.options = checked_options(ConstraintOptions, OPTIONS, model_config.fused_kernel_options.get("gream"))
        index = ItemIndex.load(self.options.index_file)
        self.automaton = AnswerAutomaton.build(index, model_config.tokenizer, model_config.path)

    def prepare_model_outputs(
        self, output: Any, output_args: Any, micro_batch: Any, logits_processor_func: Any
    ) -> dict[str, Tensor]:
        """Restrict the logits, and return what verl makes of them."""
        offsets = micro_batch["input_ids"].offsets()
        packed = tensordict_utils.get_non_tensor_data(micro_batch, "use_remove_padding", True)
        ends = offsets[1:] if packed else offsets.diff()
        rows = torch.zeros_like(ends) if packed else torch.arange(len(ends), device=ends.device)
        responses = list(micro_batch["responses"].unbind())
        restrict(output.logits, responses, rows, ends, self.automaton, self.options.mode)
        return super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
