"""The logits processor inside a real vLLM engine."""

from __future__ import annotations

import pytest
from assets import make_index, make_tiny_model, rl_rows, teach_form

from gream_verl.core.rsvr import score_response
from gream_verl.core.token_text import TokenText
from gream_verl.decoding.truth_scoring import decompress, scoring_parameters

pytestmark = [pytest.mark.integration, pytest.mark.timeout(400)]

TAUGHT, INDEX = make_index(), make_index(items=9)  # most items that the model knows have left the catalogue


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    pytest.importorskip("vllm", reason="vLLM is not installed")
    import os

    import torch

    from gream_verl.core.cpu_environment import set_defaults

    folder = tmp_path_factory.mktemp("constrained")
    INDEX.save(folder / "tiny.index.json")
    make_tiny_model(folder / "model", TAUGHT)
    teach_form(folder / "model", TAUGHT, steps=100)
    cpu = not torch.cuda.is_available()
    if cpu:
        set_defaults()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM

    engine = LLM(
        model=str(folder / "model"),
        dtype="float32" if cpu else "auto",
        max_model_len=256,
        max_num_seqs=5,  # fewer than requests, so that requests come, go and move
        gpu_memory_utilization=0.3,
        enforce_eager=True,
        logits_processors=[
            f"gream_verl.decoding.vllm_processor:{name}" for name in ("ConstrainedAnswer", "TruthScorer")
        ],
        logprobs_mode="processed_logprobs",
        additional_config={"gream": {"index_file": str(folder / "tiny.index.json"), "mode": "reasoning"}},
    )
    second = getattr(engine.llm_engine.vllm_config, "use_v2_model_runner", False)
    assert second == (os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1")
    return engine


def rewards(engine, mode: str | None, scored_as: str = "reasoning", temperature: float = 0.8, tokens: int = 64):
    from vllm import SamplingParams

    tokenizer = engine.get_tokenizer()
    prompts = [
        {
            "prompt_token_ids": tokenizer.apply_chat_template(
                row["prompt"], add_generation_prompt=True, return_dict=False
            )
        }
        for row in rl_rows(TAUGHT, 24)
    ]
    parameters = [
        SamplingParams(
            temperature=temperature,
            max_tokens=tokens,
            seed=number,
            extra_args={"gream": mode} if mode else None,
            stop_token_ids=[tokenizer.eos_token_id],
            detokenize=False,
        )
        for number in range(len(prompts))
    ]
    reader = TokenText(tokenizer)
    outputs = engine.generate(prompts, parameters, use_tqdm=False)
    found = []
    for output in outputs:
        response = list(output.outputs[0].token_ids)
        text = reader.read(response)
        opened = text.partition("<answer>")[2]
        if mode != "off" and opened and output.outputs[0].finish_reason != "stop":
            assert len(tokenizer.encode(opened, add_special_tokens=False)) < 4 + 8, (
                text
            )  # cut off, or it would have ended
        if mode == "direct" or ("<answer>" in text and output.outputs[0].finish_reason == "stop"):
            found.append((text, score_response(text, INDEX.sids["3"], mode=scored_as, index=INDEX)))
    return found


def test_every_answer_is_an_item_whatever_else_the_chain_says(engine):
    constrained = rewards(engine, None)
    assert len(constrained) >= 8
    for text, reward in constrained:
        assert text.endswith("</answer>"), text
        assert reward.valid_item == 1, text
    assert len({text.split("<answer>")[1] for text, _ in constrained}) > 1


def test_a_request_can_switch_it_off(engine):
    free = rewards(engine, "off")
    assert sum(reward.valid_item == 0 for _, reward in free) > len(free) / 4
    assert rewards(engine, "reasoning") == rewards(engine, None)


def test_a_request_can_ask_for_a_direct_answer(engine):
    direct = rewards(engine, "direct", scored_as="direct", tokens=6)
    assert len(direct) == 24
    assert all((reward.format, reward.valid_item) == (1, 1) for _, reward in direct)


def test_a_request_with_an_unknown_mode_is_refused(engine):
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(VLLMValidationError, match=r"extra_args\['gream'\] is 'loose'"):
        rewards(engine, "loose")


@pytest.mark.parametrize("constrained", [True, False])
def test_scoring_requests_return_the_probabilities_of_the_model(engine, constrained):
    import torch
    from transformers import AutoModelForCausalLM
    from vllm import SamplingParams

    tokenizer, temperature = engine.get_tokenizer(), 0.7
    model = AutoModelForCausalLM.from_pretrained(engine.llm_engine.model_config.model, dtype=torch.float32).eval()
    opening, closing = (tokenizer.encode(tag, add_special_tokens=False) for tag in ("<answer>", "</answer>"))
    truth = tokenizer.convert_tokens_to_ids(list(INDEX.sids["3"]))
    given, prompts = [*opening, *truth, *closing, tokenizer.eos_token_id], []
    for row in rl_rows(TAUGHT, 12):
        ids = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
        prompts.append(ids + tokenizer.encode("<think>likes it</think>", add_special_tokens=False))
    wanted = scoring_parameters(given, temperature)
    wanted["extra_args"] |= {} if constrained else {"gream": "off"}
    parameters = [SamplingParams(**wanted, logprobs=0, detokenize=False)] * len(prompts)
    # among requests that sample, so that both kinds share a batch
    sampling = SamplingParams(temperature=0.8, max_tokens=9, seed=1, detokenize=False)
    mixed = [one for prompt in prompts for one in (prompt, prompt)]
    asked = [one for scoring in parameters for one in (scoring, sampling)]
    outputs = engine.generate([{"prompt_token_ids": ids} for ids in mixed], asked, use_tqdm=False)[::2]

    children: dict[tuple[int, ...], set[int]] = {}
    for sid in INDEX.sids.values():
        ids = tokenizer.convert_tokens_to_ids(list(sid))
        for level, token in enumerate(ids):
            children.setdefault(tuple(ids[:level]), set()).add(token)
    for output, prompt in zip(outputs, prompts, strict=True):
        answer = output.outputs[0]
        assert list(answer.token_ids) == given
        found = decompress([step[token].logprob for step, token in zip(answer.logprobs, given, strict=True)])
        with torch.no_grad():
            logits = model(torch.tensor([prompt + given])).logits[0, len(prompt) - 1 : -1].double() / temperature
        for place in range(len(opening), len(given)):
            row, level = logits[place], place - len(opening)
            allowed = range(len(row))
            if constrained:  # after the SID only the tokens that close it
                allowed = sorted(children[tuple(truth[:level])]) if level < len(truth) else [given[place]]
            expected = float((row[given[place]] - row[list(allowed)].logsumexp(0)).exp())
            assert found[place] == pytest.approx(expected, rel=2e-3, abs=1e-6)
