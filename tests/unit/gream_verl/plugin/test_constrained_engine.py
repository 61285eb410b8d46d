from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import verl
from assets import make_index, make_tokenizer
from transformers import Qwen3Config, Qwen3ForCausalLM
from verl.utils import tensordict_utils
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

from gream_verl.core.errors import InputError
from gream_verl.decoding.answer_automaton import CLOSE, FREE, OPEN, ROOT, AnswerAutomaton, ConstraintOptions
from gream_verl.plugin.constrained_engine import ConstrainedEngine

INDEX = make_index()
TOKENIZER = make_tokenizer(["likes Alien.<answer>", "<answer> </answer>"], INDEX)
TOKENIZER.add_tokens(["<answer><"])  # free text has forbidden tokens, too
AUTOMATON = AnswerAutomaton.build(INDEX, TOKENIZER)
VOCABULARY = len(TOKENIZER) + 5
EOS = TOKENIZER.eos_token_id
PROMPTS = ["likes Alien. What is next?", "", f"Answer {OPEN}", f"{OPEN}x", "x"]


def ids(*texts: str) -> list[int]:
    return [token for text in texts for token in TOKENIZER.encode(text, add_special_tokens=False)]


RESPONSES = {
    "reasoning": [
        [*ids("<think>likes</think>", INDEX.text("9"), OPEN, INDEX.text("3"), CLOSE), EOS],
        ids("<think>", OPEN, INDEX.text("23"), CLOSE)[:-1],  # cut off
        ids("<think>likes</think>"),  # no answer, and its prompt opens one
        ids("<think></think>", OPEN, "Alien.", INDEX.sids["3"][0], CLOSE),  # drawn without the constraint
        ids("<answer><", INDEX.text("3")),  # likewise
    ],
    "direct": [[*ids(INDEX.text(item)), EOS] for item in ("3", "22", "23", "0")] + [ids(INDEX.text("3"))[:2]],
}
RESPONSES["off"] = RESPONSES["reasoning"]


def engine(kind: type = ConstrainedEngine, mode: str = "reasoning"):
    made = kind.__new__(kind)  # without a model of its own
    made.automaton, made.options = AUTOMATON, ConstraintOptions(index_file="", mode=mode)
    made.use_ulysses_sp = False
    made.engine_config = SimpleNamespace(entropy_checkpointing=False, entropy_from_logits_with_chunking=False)
    made.compute_entropy_from_logits = verl.utils.torch_functional.entropy_from_logits
    return made


def outputs(made, logits: list[torch.Tensor], responses: list[list[int]], temperature: float, packed: bool):
    """Return log-probabilities and entropies of each sequence, from logits [length, vocabulary] of each."""
    prompts = [[EOS, *ids(text)] for text in PROMPTS]
    whole = [torch.tensor(one + other) for one, other in zip(prompts, responses, strict=True)]
    jagged = {
        "input_ids": whole,
        "position_ids": [torch.arange(len(row)) for row in whole],
        "responses": [torch.tensor(row) for row in responses],
    }
    batch = tensordict_utils.get_tensordict(
        {key: torch.nested.as_nested_tensor(rows, layout=torch.jagged) for key, rows in jagged.items()},
        {"use_remove_padding": packed, "calculate_entropy": True, "temperature": temperature},
    )
    made.pad_to_length, made.pad_to_length_bucket = packed, 16
    _, arguments = made.prepare_model_inputs(batch)
    if packed:
        given = torch.cat([*logits, logits[0][: arguments["pad_size"]]])[None]
    else:
        given = torch.nn.utils.rnn.pad_sequence(logits, batch_first=True, padding_value=3.0)
    result = made.prepare_model_outputs(SimpleNamespace(logits=given), arguments, batch, None)
    return [result[key].unbind() for key in ("log_probs", "entropy")]


def allowed_log_probs(rows: torch.Tensor, response: list[int], mode: str, temperature: float) -> torch.Tensor:
    """Return the log-probabilities [length, vocabulary] of a response's tokens, one token at a time."""
    state = np.array([{"reasoning": FREE, "direct": ROOT, "off": AUTOMATON.off}[mode]])
    found = []
    for row, token in zip(rows, response, strict=True):
        allowed = AUTOMATON.constrain(torch.zeros(1, VOCABULARY), state)[0].isfinite()
        allowed |= not allowed[token]
        found.append((row / temperature).masked_fill(~allowed, -torch.inf).log_softmax(-1))
        state = AUTOMATON.advance(state, np.array([token]), np.array([mode == "direct"]))
    return torch.stack(found)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("mode", ["reasoning", "direct", "off"])
def test_log_probs_entropies_and_gradients_are_those_of_the_allowed_tokens(mode, packed, temperature):
    torch.manual_seed(0)
    responses = RESPONSES[mode]
    lengths = [1 + len(ids(text)) + len(row) for text, row in zip(PROMPTS, responses, strict=True)]
    fast = [(torch.randn(length, VOCABULARY) * 3).requires_grad_() for length in lengths]
    slow = [row.detach().clone().requires_grad_() for row in fast]
    log_probs, entropies = outputs(engine(mode=mode), [row * 1 for row in fast], responses, temperature, packed)
    for number, response in enumerate(responses):
        places = slice(-len(response) - 1, -1)
        expected = allowed_log_probs(slow[number][places], response, mode, temperature)
        chosen = expected[range(len(response)), response]
        torch.testing.assert_close(log_probs[number][places], chosen)
        torch.testing.assert_close(entropies[number][places], -(expected.exp() * expected.clamp(min=-1e9)).sum(-1))
        weights = torch.arange(1.0, len(response) + 1)
        (log_probs[number][places] * weights).sum().backward(retain_graph=True)
        (chosen * weights).sum().backward()
        assert fast[number].grad.isfinite().all()
        torch.testing.assert_close(fast[number].grad, slow[number].grad)


def test_the_first_update_has_the_ratio_1_and_no_divergence_from_the_rollout():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=VOCABULARY, initializer_range=0.4, **sizes, **heads)).eval()
    drawn, responses, logits = [], [], []
    for text in PROMPTS:
        prompt, response = [EOS, *ids(text)], ids("<think></think>", OPEN)
        state, log_probs = np.array([ROOT]), []
        while not response or response[-1] != EOS:  # as vLLM does it: the processor, the temperature, the draw
            with torch.no_grad():
                row = model(torch.tensor([prompt + response])).logits[:, -1]
            row = (AUTOMATON.constrain(row, state) / 0.7).log_softmax(-1)[0]
            response.append(int(torch.multinomial(row.exp(), 1)))
            log_probs.append(row[response[-1]])
            state = AUTOMATON.advance(state, np.array(response[-1:]), np.array([False]))
        drawn.append(torch.stack(log_probs))
        responses.append(response)
        with torch.no_grad():
            logits.append(model(torch.tensor([prompt + response])).logits[0])
    differences = {}
    for kind in (FSDPEngineWithLMHead, ConstrainedEngine):
        log_probs, _ = outputs(engine(kind), [row.clone() for row in logits], responses, 0.7, packed=True)
        ends = [new[-len(old) - 1 : -1] - old for new, old in zip(log_probs, drawn, strict=True)]
        differences[kind] = torch.cat(ends)
    assert differences[FSDPEngineWithLMHead].exp().mean() < 0.5
    assert differences[FSDPEngineWithLMHead].mean() < -1
    torch.testing.assert_close(differences[ConstrainedEngine].exp(), torch.ones(len(torch.cat(drawn))))
    torch.testing.assert_close(differences[ConstrainedEngine].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("backend", "changes", "message"),
    [
        ("megatron", {}, r"actor\.strategy: .* set it to fsdp2"),
        ("fsdp2", {"ulysses_sequence_parallel_size": 2}, r"actor\.ulysses_sequence_parallel_size: .* set it to 1"),
        ("fsdp", {"use_fused_kernels": True}, r"model\.use_fused_kernels: .* set it to false"),
    ],
)
def test_a_setting_that_hides_the_logits_is_refused(monkeypatch, backend, changes, message):
    monkeypatch.setenv("VERL_ENGINE_DEVICE", "cuda")
    model = SimpleNamespace(use_fused_kernels=changes.pop("use_fused_kernels", False))
    config = {"strategy": backend} | changes

    class Config(dict):
        __getattr__ = dict.__getitem__

    with pytest.raises(InputError, match=message):
        EngineRegistry.new("constrained_language_model", backend, model, Config(config), None, None)
