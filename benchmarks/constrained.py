"""Cost of constrained rollouts: tokens per second of a vLLM engine with and without the logits processor, in one run.

One engine has the processor and answers the same prompts with and without the constraint in turn: the cost is a median
of ratios. Another engine has no processor. A small Qwen3 is first taught to reason and answer with items of a
catalogue, and a part of it is then taken away. The run fails unless all constrained answers are items.

    python benchmarks/constrained.py
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WITHOUT, WITH = "no processor", "processor"
OFF, REASONING = "off", "reasoning"
PROCESSOR = "gream_verl.decoding.vllm_processor:ConstrainedAnswer"
WORDS = "likes old new quiet loud films songs because the last ones were and so"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all configurations and print tokens per second, and the cost of the processor."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=12_000)
    parser.add_argument("--requests", type=int, default=64, help="requests at the same time")
    parser.add_argument("--words", type=int, default=60, help="words of a chain of thought")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--teach", type=int, default=150, help="training steps")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=[WITHOUT, WITH], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.engine:
        print(json.dumps(measure(options)))
        return
    speeds: dict[str, list[float]] = {WITHOUT: [], OFF: [], REASONING: []}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), options)
        for _ in range(options.turns):
            for engine in (WITHOUT, WITH):
                command = [sys.executable, __file__, *(arguments or sys.argv[1:]), "--engine", engine]
                done = subprocess.run(
                    [*command, "--folder", folder], capture_output=True, text=True, timeout=900, check=False
                )
                if done.returncode:
                    raise SystemExit(done.stderr[-3000:])
                for name, values in json.loads(done.stdout.splitlines()[-1]).items():
                    speeds[name] += values
    median = {name: statistics.median(values) for name, values in speeds.items()}
    for name, values in speeds.items():
        print(f"{name:13} {median[name]:7.0f} tokens/s, {min(values):.0f} to {max(values):.0f} in {len(values)} rounds")
    ratios = [on / off for on, off in zip(speeds[REASONING], speeds[OFF], strict=True)]
    print(f"cost of the constraint, rounds in turn in one engine     {1 - statistics.median(ratios):+.1%}")
    print(f"cost of a processor that is off, other processes (noisy) {1 - median[OFF] / median[WITHOUT]:+.1%}")


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """Teach a model and save it, its prompts, and an index that lacks a third of the items."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from gream_verl.core.prompts import messages
    from gream_verl.core.semantic_ids import ItemIndex
    from gream_verl.model.tiny_model import make_tiny_model

    draw = random.Random(options.seed)
    codes = [(item // 4096, item // 64 % 64, item % 64) for item in range(options.items)]
    index = ItemIndex.from_codes([str(item) for item in range(options.items)], codes)
    left = ItemIndex({item: sid for item, sid in index.sids.items() if int(item) % 3})
    left.save(folder / "index.json")
    make_tiny_model(
        [WORDS, "system user assistant <answer> </answer>"], index, folder / "model",
        vocabulary_size=512, hidden_size=options.hidden, layers=options.layers, seed=options.seed,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    items = list(index.sids)

    def prompt() -> list[dict[str, str]]:
        return messages("".join(index.texts(draw.choices(items, k=10))), "reasoning")

    def response() -> str:
        chain = " ".join(draw.choices(WORDS.split(), k=options.words))
        return f"<think>{chain}</think><answer>{index.text(draw.choice(items))}</answer>"

    torch.manual_seed(options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(options.teach):
        texts = [
            tokenizer.apply_chat_template([*prompt(), {"role": "assistant", "content": response()}], tokenize=False)
            for _ in range(16)
        ]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        model(**batch, labels=batch.input_ids.masked_fill(batch.attention_mask == 0, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "model")
    prompts = [
        tokenizer.apply_chat_template(prompt(), add_generation_prompt=True, return_dict=False)
        for _ in range(options.requests)
    ]
    (folder / "prompts.json").write_text(json.dumps(prompts))


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Return tokens per second of every round of one engine, by the mode of its requests."""
    import torch

    from gream_verl.core.cpu_environment import set_defaults
    from gream_verl.core.rsvr import score_response
    from gream_verl.core.semantic_ids import ItemIndex
    from gream_verl.core.token_text import TokenText
    from gream_verl.cpu import is_active

    if is_active():
        set_defaults()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    extra: dict[str, Any] = {}
    modes = [None] if options.engine == WITHOUT else [OFF, REASONING]
    if options.engine == WITH:
        gream = {"index_file": str(options.folder / "index.json"), "mode": "off"}
        extra = {"logits_processors": [PROCESSOR], "additional_config": {"gream": gream}}
    engine = LLM(
        model=str(options.folder / "model"), dtype="auto" if torch.cuda.is_available() else "float32",
        max_model_len=1024, max_num_seqs=options.requests, enforce_eager=True, gpu_memory_utilization=0.5,
        enable_prefix_caching=False, disable_log_stats=True, **extra,
    )  # fmt: skip
    prompts: Any = [{"prompt_token_ids": ids} for ids in json.loads((options.folder / "prompts.json").read_text())]
    tokenizer = engine.get_tokenizer()
    text, index = TokenText(tokenizer), ItemIndex.load(options.folder / "index.json")
    truth = next(iter(index.sids.values()))
    speeds: dict[str, list[float]] = {mode or WITHOUT: [] for mode in modes}
    for number in range(options.rounds + 1):
        for mode in modes:
            sampling = SamplingParams(
                temperature=0.7,
                max_tokens=256,
                stop_token_ids=[tokenizer.eos_token_id],
                detokenize=False,
                extra_args={"gream": mode} if mode else None,
            )
            start = time.perf_counter()
            outputs = engine.generate(prompts, sampling, use_tqdm=False)
            seconds = time.perf_counter() - start
            if number:  # the first round warms up
                speeds[mode or WITHOUT].append(sum(len(output.outputs[0].token_ids) for output in outputs) / seconds)
            scores = [
                score_response(text.read(output.outputs[0].token_ids), truth, index=index, format="reference")
                for output in outputs
            ]
            answered = [score for score in scores if score.format]
            if len(answered) < len(scores) / 2:
                raise SystemExit(
                    f"only {len(answered)} of {len(scores)} responses have an answer: teach the model longer"
                )
            if mode == REASONING and not all(score.valid_item for score in answered):
                raise SystemExit("a constrained answer is no item")
    return speeds


if __name__ == "__main__":
    main()
