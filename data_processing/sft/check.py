"""What goes wrong in SFT by LLaMA-Factory without a word, or hours later: looked for before the training.

No weights are loaded, and nothing is written.
"""

from __future__ import annotations

import itertools
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from rich.filesize import decimal

from data_processing.sft.config import SftConfig
from data_processing.sft.model import Model, tensor_shapes
from data_processing.sft.row_lengths import render_prompts, turn_counter
from data_processing.sft.rows import Row
from gream_verl.core.checkpoints import is_whole, newest_checkpoint
from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json
from gream_verl.core.semantic_ids import SID_TOKEN
from gream_verl.model.vocabulary import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TORCHRUN_ONLY = ("deepspeed", "tf32", "pure_bf16")
"""Keys that LLaMA-Factory's parser takes only under torchrun or on a GPU."""
CHECKPOINT_BYTES = {None: 12, 3: 14}
SHARDED_BYTES = 16
"""Bytes of a checkpoint for each trained parameter, by ZeRO stage, None without DeepSpeed: float32 weights and both
moments, or bf16 weights (once, below stage 3 twice) with float32 weights and moments."""
ORDER_KEYS = {
    "packing": "packing puts rows together that do not follow one another; leave it out",
    "neat_packing": "packing puts rows together that do not follow one another; leave it out",
    "val_size": "it takes rows out at random; give held-out rows as `eval_dataset`",
    "dataloader_drop_last": "it leaves out the last rows of every epoch; leave it out",
    "auto_find_batch_size": "batches may become smaller than the blocks of `gream data mix --block`; leave it out",
    "ignore_data_skip": "after a stop it trains from the first row again; leave it out",
    "tokenized_path": "rows from there take the place of those of `dataset`, also when those are new; leave it out",
}
VOCABULARY_KEYS = ("resize_vocab", "add_tokens", "add_special_tokens", "new_special_tokens_config")


@dataclass
class Findings:
    """What a check has found.

    Attributes:
        tasks: Task to its ``rows``, ``tokens``, tokens of the ``longest`` row, ``supervised`` tokens.
        facts: What follows for the training: rows and tokens of an epoch, steps, disk.
        remarks: What cannot be told here, or is good to know.
        problems: What must be mended before training, a sentence each.
    """

    tasks: dict[str, dict[str, int]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @contextmanager
    def collected(self) -> Iterator[None]:
        """Turn an :class:`InputError` inside the block into a problem."""
        try:
            yield
        except InputError as error:
            self.problems.append(str(error))


def check_config(config: SftConfig) -> Findings:
    """Look for everything that LLaMA-Factory would not say, or not in time.

    Args:
        config: The config of a training that is about to start, overrides included.
    """
    found = Findings(problems=key_problems(config.keys))
    arguments = rows = model = stage = newest = None
    with found.collected():
        stage = zero_stage(config)
    with found.collected():
        arguments = parse(config, found.remarks)
    with found.collected():
        rows = config.rows()
    with found.collected():
        model = Model.read(config)
    with found.collected():
        newest = resumed_checkpoint(config)
    if rows is None or model is None:
        return found
    ids: list[int] = []
    with found.collected():
        ids = sid_ids(rows, model)
    if arguments is None:
        return found
    with found.collected():
        _count(found, rows, model, arguments["data"])
    if not found.tasks:
        return found
    with found.collected():
        check_template(rows, model, arguments["data"])
    with found.collected():
        check_trained_rows(ids, arguments, stage)
        steps = _plan(found, model, config, arguments, stage)
        if newest:
            found.remarks.append(check_resumed(newest, steps, arguments["training"].per_device_train_batch_size))
    return found


def key_problems(keys: Mapping[str, Any]) -> list[str]:
    """Return what breaks the order of the rows or the vocabulary, in the keys alone."""
    problems = [f"`{key}: {keys[key]}`: {why}" for key, why in ORDER_KEYS.items() if keys.get(key)]
    if not keys.get("disable_shuffling"):
        problems.append("`disable_shuffling` is not true: the curriculum's order would be lost; set it")
    if keys.get("streaming") and keys.get("buffer_size") != 1:
        problems.append("`streaming` shuffles in spite of disable_shuffling; leave it out, or set `buffer_size: 1`")
    if str(keys.get("mix_strategy", "concat")) != "concat":
        problems.append(
            f"`mix_strategy: {keys['mix_strategy']}` drops or repeats rows; write one file with `gream data mix`"
        )
    problems += [
        f"`{key}` would add tokens and rows of its own; leave it out, `gream model extend` has added all that is needed"
        for key in VOCABULARY_KEYS
        if keys.get(key)
    ]
    return problems


def parse(config: SftConfig, remarks: list[str]) -> dict[str, Any]:
    """Return LLaMA-Factory's own arguments, by the names ``model``, ``data``, ``training`` and ``finetuning``.

    They are read as on a CPU, so that a check runs anywhere.

    Args:
        config: The config.
        remarks: Gets what was not tried.

    Raises:
        InputError: When LLaMA-Factory refuses the config, or a number in it is none.
    """
    import torch

    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "ERROR")
    from llamafactory.hparams import get_train_args

    skipped = [key for key in TORCHRUN_ONLY if config.keys.get(key)]
    if not config.keys.get("use_cpu") and not torch.cuda.is_available():
        skipped += [key for key in ("bf16", "flash_attn") if config.keys.get(key)]
        remarks.append("No GPU is seen here: the config is for GPUs, or needs `use_cpu: true`.")
    if skipped:
        remarks.append(f"Not tried here: {', '.join(skipped)}.")
    keys = {key: value for key, value in config.keys.items() if key not in TORCHRUN_ONLY}
    try:
        model, data, training, finetuning, _ = get_train_args({**keys, "use_cpu": True})
    except (ValueError, TypeError, OSError, ImportError) as error:
        no = config.keys.get("save_strategy") is False
        hint = "; YAML reads `no` as false: quote it, behind the file name as save_strategy=\"'no'\"" if no else ""
        raise InputError(f"{config.path}: LLaMA-Factory refuses it: {error}{hint}") from error
    check_numbers(data, training)
    return {"model": model, "data": data, "training": training, "finetuning": finetuning}


def check_numbers(data: Any, training: Any) -> None:
    """Make sure that numbers are numbers: LLaMA-Factory's parser takes whatever is given.

    Raises:
        InputError: When one is not.
    """
    whole = {
        "cutoff_len": data.cutoff_len,
        "per_device_train_batch_size": training.per_device_train_batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "max_steps": 1 if training.max_steps == -1 else training.max_steps,
        "save_total_limit": 1 if training.save_total_limit is None else training.save_total_limit,
    }
    wrong = {key: value for key, value in whole.items() if not (isinstance(value, int) and value >= 1)}
    real = {"num_train_epochs": training.num_train_epochs, "save_steps": training.save_steps}
    wrong |= {
        key: value for key, value in real.items() if not (isinstance(value, int | float) and 0 < value < math.inf)
    }
    if wrong:
        given = ", ".join(f"`{key}: {value}`" for key, value in wrong.items())
        raise InputError(f"{given}: expected numbers above 0, and whole ones but for num_train_epochs and save_steps")


def zero_stage(config: SftConfig) -> int | None:
    """Return the stage of DeepSpeed's ZeRO, None without DeepSpeed.

    Raises:
        InputError: When the file that the config names is missing or says nothing of ZeRO.
    """
    path = config.keys.get("deepspeed")
    if not path:
        return None
    given = path if isinstance(path, Mapping) else read_json(Path(path), "choose one of sft_configs/deepspeed_*.json")
    try:
        return int(given["zero_optimization"]["stage"])
    except (KeyError, TypeError, ValueError):
        raise InputError(
            f"{path}: has no zero_optimization.stage; choose one of sft_configs/deepspeed_*.json"
        ) from None


def sid_ids(rows: pl.DataFrame, model: Model) -> list[int]:
    """Return the token ids of all SID tokens in the data.

    Raises:
        InputError: When one is not exactly one ordinary token that has a row in the model.
    """
    found: set[str] = set()
    for column in ("user", "assistant"):
        found.update(rows[column].str.extract_all(SID_TOKEN.pattern).explode().drop_nulls().unique())
    if not found:
        raise InputError("no row holds a semantic ID; make the data with `gream data mix`")
    return list(token_ids(model.tokenizer, sorted(found), str(model.folder), model.rows).values())


def check_template(rows: pl.DataFrame, model: Model, data: Any) -> None:
    """Hold one row of each task, as LLaMA-Factory encodes it, against the model's chat template.

    Args:
        rows: The rows.
        model: The model; SRPO and the evaluation render prompts with its chat template.
        data: LLaMA-Factory's data arguments.

    Raises:
        InputError: When prompts differ, or an answer is not trained as it stands with an end-of-sequence token behind.
    """
    from llamafactory.data.template import get_template_and_fix_tokenizer

    tokenizer, fixed = model.tokenizer, deepcopy(model.tokenizer)
    try:
        template = get_template_and_fix_tokenizer(fixed, data)
    except ValueError as error:
        raise InputError(f"`template: {data.template}`: {error}; choose that of the base model") from error
    if len(fixed) > len(tokenizer):
        raise InputError(
            f"`template: {data.template}` adds {len(fixed) - len(tokenizer)} tokens to those of {model.folder}: it is "
            "that of another model; choose that of the base model"
        )
    for row in (Row(*values) for values in rows.unique("task", keep="first", maintain_order=True).iter_rows()):
        turns = [{"role": "user", "content": row.user}, {"role": "assistant", "content": row.assistant}]
        [(prompt, response)] = template.encode_multiturn(fixed, turns, row.system)
        expected = tokenizer.encode(render_prompts(tokenizer, [row])[0], add_special_tokens=False)
        if prompt != expected:
            trained, given = _difference(tokenizer, prompt, expected)
            raise InputError(
                f"`template: {data.template}` trains other prompts than SRPO and the evaluation give the model: "
                f"{trained!r} instead of {given!r} (task {row.task}); choose the base's template, set "
                f"`default_system` to the system turn of its chat template, or change that in {model.folder}"
            )
        answer = [*tokenizer.encode(row.assistant, add_special_tokens=False), tokenizer.eos_token_id]
        if response[: len(answer)] != answer:
            trained, given = _difference(tokenizer, response, answer)
            raise InputError(
                f"`template: {data.template}` does not train answers as they stand: {trained!r} instead of {given!r} "
                f"(task {row.task}); choose the base's template, of Qwen3 the one that ends in _nothink"
            )


def _difference(tokenizer: PreTrainedTokenizerBase, one: Sequence[int], other: Sequence[int]) -> tuple[str, str]:
    """Return both texts around the first token that differs."""
    place = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    start = max(place - 4, 0)
    return tokenizer.decode(one[start : place + 4]), tokenizer.decode(other[start : place + 4])


def check_trained_rows(ids: Sequence[int], arguments: Mapping[str, Any], stage: int | None) -> None:
    """Make sure that the rows of SID tokens are trained.

    Args:
        ids: Token ids of the SID tokens.
        arguments: LLaMA-Factory's arguments.
        stage: Stage of ZeRO.

    Raises:
        InputError: When they would stay as they were drawn.
    """
    kind, adapters = arguments["finetuning"].finetuning_type, arguments["model"].adapter_name_or_path
    if kind == "full":
        return
    remedy = "make an adapter with `gream model adapter` and name it as `adapter_name_or_path`, with `lora`"
    if kind != "lora" or not adapters or arguments["finetuning"].create_new_adapter:
        raise InputError(
            f"`finetuning_type: {kind}` would leave the rows of semantic IDs as they were drawn; {remedy}, or train "
            "`full`"
        )
    if stage == 3:
        raise InputError(
            "`deepspeed`: ZeRO-3 has the embedding in parts, so that single rows cannot be trained; use zero2"
        )
    given = read_json(Path(adapters[-1]) / "adapter_config.json", remedy).get("trainable_token_indices") or []
    trained = set(given if isinstance(given, list) else [token for tokens in given.values() for token in tokens])
    if missing := [token for token in ids if token not in trained]:
        raise InputError(
            f"{adapters[-1]}: trains no rows of {len(missing)} of {len(ids)} SID tokens; make it anew with "
            "`gream model adapter` from the model of this config"
        )


def _count(found: Findings, rows: pl.DataFrame, model: Model, data: Any) -> None:
    """Fill in the table of tasks.

    Raises:
        InputError: When rows are longer than the trainer's limit.
    """
    count_turns = turn_counter(model.tokenizer)
    kinds, limit = rows["task"].to_numpy(), data.cutoff_len
    tokens = count_turns([Row(*values) for values in rows.iter_rows()])
    lengths = tokens.sum(1)
    supervised = lengths if data.train_on_prompt else tokens[:, 1]
    too_long = {}
    for task in rows["task"].unique(maintain_order=True):
        own = kinds == task
        found.tasks[task] = {
            "rows": int(own.sum()),
            "tokens": int(lengths[own].sum()),
            "longest": int(lengths[own].max()),
            "supervised": int(supervised[own].sum()),
        }
        if over := int((lengths[own] > limit).sum()):
            too_long[task] = over
    if too_long:
        each = ", ".join(f"{count:,} of {task}" for task, count in too_long.items())
        raise InputError(
            f"{sum(too_long.values()):,} rows are longer than `cutoff_len: {limit}` ({each}, up to {lengths.max():,} "
            "tokens) and would lose their end; make the data with `gream data mix --tokenizer "
            f"{model.folder} --longest {limit}`, or raise cutoff_len"
        )


def resumed_checkpoint(config: SftConfig) -> Path | None:
    """Return the checkpoint from which LLaMA-Factory would go on, None when there is none.

    Raises:
        InputError: When it is not whole, or the output folder is a file.
    """
    if config.output.is_file():
        raise InputError(f"{config.output}: is a file; choose another output_dir")
    newest = newest_checkpoint(config.output)
    if newest is None or config.keys.get("overwrite_output_dir"):
        return None
    remedy = "delete it, and the training goes on from the one before"
    if not is_whole(newest):
        raise InputError(f"{newest}: a stop has torn it; {remedy}")
    tensor_shapes(newest, remedy)
    return newest


def check_resumed(checkpoint: Path, steps: int, batch: int) -> str:
    """Return a sentence on the checkpoint from which a training goes on.

    Args:
        checkpoint: The checkpoint.
        steps: Steps of the whole training.
        batch: Rows of a batch on one device.

    Raises:
        InputError: When it is of another training, or the last of this one: LLaMA-Factory would train other rows,
            or nothing.
    """
    state, own = read_json(checkpoint / "trainer_state.json"), {"max_steps": steps, "train_batch_size": batch}
    if other := [f"{key} {state[key]} instead of {own[key]}" for key in own if state.get(key, own[key]) != own[key]]:
        raise InputError(
            f"{checkpoint}: is of another training ({', '.join(other)}), from which LLaMA-Factory would go on; choose "
            "another output_dir or delete it, or give the same keys, FORCE_TORCHRUN, NPROC_PER_NODE and NNODES as there"
        )
    if state["global_step"] >= steps:
        raise InputError(f"{checkpoint}: ends this training already; choose another output_dir, or delete it")
    return f"The training would go on from step {state['global_step']:,} of {checkpoint.parent}."


def _plan(found: Findings, model: Model, config: SftConfig, arguments: Mapping[str, Any], stage: int | None) -> int:
    """Fill in the facts, and return the number of steps.

    Raises:
        InputError: When LLaMA-Factory's launcher could not start the training.
    """
    training = arguments["training"]
    ranks = processes(config)
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    rows = sum(task["rows"] for task in found.tasks.values())
    an_epoch = math.ceil(math.ceil(rows / (batch * ranks)) / accumulation)
    steps = training.max_steps if training.max_steps > 0 else math.ceil(training.num_train_epochs * an_epoch)
    every = training.save_steps if training.save_steps >= 1 else math.ceil(training.save_steps * steps)
    written = {"steps": math.ceil(steps / every), "epoch": math.ceil(steps / an_epoch)}
    # While the newest is written, the oldest is still there.
    count = min(written.get(training.save_strategy.value, 0), (training.save_total_limit or steps) + 1)
    parameters = trained_parameters(model, arguments)
    final = parameters * (4 if stage is None else 2)  # float32, or bf16 by DeepSpeed
    size = final if training.save_only_model else parameters * CHECKPOINT_BYTES.get(stage, SHARDED_BYTES)
    kept = sum(path.stat().st_size for path in config.output.rglob("*") if path.is_file())
    place = next(path for path in (config.output.absolute(), *config.output.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    found.facts |= {
        "rows": f"{rows:,}",
        "tokens an epoch": f"{sum(task['tokens'] for task in found.tasks.values()):,}",
        "processes": f"{ranks} (by FORCE_TORCHRUN, NNODES, NPROC_PER_NODE and the GPUs here)",
        "rows a step": f"{batch * accumulation * ranks:,}",
        "steps": f"{steps:,}, {an_epoch:,} an epoch",
        "checkpoints": f"at most {count} of {decimal(size)}, and {decimal(final)} in the end, reckoned",
        "disk": f"{decimal(free)} free, {decimal(kept)} of output_dir there already",
    }
    if (needed := count * size + final - kept) > free:
        found.problems.append(
            f"{config.output}: its checkpoints take {decimal(needed)} more, but {decimal(free)} are free; "
            "lower save_total_limit, free some space or choose another output_dir"
        )
    return steps


def processes(config: SftConfig) -> int:
    """Return how many processes LLaMA-Factory's launcher would start.

    Raises:
        InputError: When the launcher could not.
    """
    from llamafactory.extras.misc import get_device_count, is_env_enabled, use_kt, use_ray

    gpus = get_device_count()
    if not is_env_enabled("FORCE_TORCHRUN") and (gpus <= 1 or use_ray() or use_kt()):
        return 1
    if blank := [word for word in (str(config.path), *config.overrides) if len(word.split()) > 1]:
        raise InputError(
            f"{blank[0]!r}: LLaMA-Factory's launcher splits it at its blanks for torchrun; put it into a config"
        )
    try:
        return int(os.environ.get("NNODES", 1)) * int(os.environ.get("NPROC_PER_NODE", max(gpus, 1)))
    except ValueError as error:
        raise InputError(f"NNODES and NPROC_PER_NODE: expected whole numbers ({error})") from error


def trained_parameters(model: Model, arguments: Mapping[str, Any]) -> int:
    """Return how many parameters a checkpoint holds: those of the model, or of its adapter.

    Raises:
        InputError: When the adapter has no weights.
    """
    adapters = arguments["model"].adapter_name_or_path
    if arguments["finetuning"].finetuning_type != "lora" or not adapters:
        return model.parameters
    shapes = tensor_shapes(Path(adapters[-1]), "make it anew with `gream model adapter`")
    return sum(map(math.prod, shapes.values()))
