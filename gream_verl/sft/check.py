"""What goes wrong in SFT by LLaMA-Factory without a word, or hours later: looked for before the training.

No weights are loaded, and nothing is written.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from rich.filesize import decimal

from gream_verl.files import InputError, read_json
from gream_verl.semantic_ids import SID_TOKEN
from gream_verl.sft.checkpoints import is_whole, newest_checkpoint
from gream_verl.sft.config import SftConfig
from gream_verl.sft.lengths import render_prompts, turn_counter
from gream_verl.sft.rows import Row, read_rows

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


@dataclass(frozen=True)
class Model:
    """What a checkpoint's files say of a model.

    Attributes:
        folder: The checkpoint.
        tokenizer: Its tokenizer, as SRPO and the evaluation load it.
        rows: Rows of the input embedding.
        parameters: How many there are in all weight files.
    """

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    rows: int
    parameters: int

    @classmethod
    def read(cls, folder: Path) -> Model:
        """Read the tokenizer and the heads of the weight files.

        Raises:
            InputError: When the folder is no complete checkpoint in safetensors.
        """
        from transformers import AutoTokenizer

        if not folder.is_dir():
            raise InputError(
                f"{folder}: no such folder; make the model with `gream model extend` or `gream model tiny`"
            )
        shapes = tensor_shapes(folder)
        rows = [shape[0] for name, shape in shapes.items() if name.endswith("embed_tokens.weight")]
        if not rows:
            raise InputError(
                f"{folder}: no weights of an input embedding; make the model anew with `gream model extend`"
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder}: its tokenizer cannot be loaded ({error}); copy it from the base") from error
        return cls(folder, tokenizer, rows[0], sum(map(math.prod, shapes.values())))


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    """Return the shape of every tensor in the ``.safetensors`` files of a folder, from their heads.

    Raises:
        InputError: When a file is shorter than its head says.
    """
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                head = json.loads(file.read(size)) if size < path.stat().st_size else {}
        except (struct.error, ValueError) as error:
            raise InputError(f"{path}: not a safetensors file ({error}); make the checkpoint anew") from error
        head.pop("__metadata__", None)
        if 8 + size + max((tensor["data_offsets"][1] for tensor in head.values()), default=0) != path.stat().st_size:
            raise InputError(f"{path}: is cut off; make the checkpoint anew")
        shapes |= {name: tensor["shape"] for name, tensor in head.items()}
    return shapes


def check_config(config: SftConfig) -> Findings:
    """Look for everything that LLaMA-Factory would not say, or not in time.

    Args:
        config: The config of a training that is about to start, overrides included.
    """
    found = Findings(problems=key_problems(config.keys))
    arguments = rows = model = stage = None
    with found.collected():
        stage = zero_stage(config)
    with found.collected():
        arguments = parse(config, found.remarks)
    with found.collected():
        rows = _read_data(config)
    with found.collected():
        model = Model.read(config.model)
    with found.collected():
        check_checkpoints(config.output)
    if rows is None or model is None:
        return found
    ids: list[int] = []
    with found.collected():
        ids = sid_ids(rows, model)
    with found.collected():
        _count(found, rows, model, config)
    if arguments and ids:
        with found.collected():
            check_template(rows, model, arguments["data"])
        with found.collected():
            check_trained_rows(ids, arguments, stage)
    if found.tasks:
        with found.collected():
            _plan(found, model, config, stage)
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
        InputError: When LLaMA-Factory refuses the config.
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
        raise InputError(f"{config.path}: LLaMA-Factory refuses it: {error}") from error
    return {"model": model, "data": data, "training": training, "finetuning": finetuning}


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


def _read_data(config: SftConfig) -> pl.DataFrame:
    """Read the rows of all data sets of a config, in the order in which they are trained.

    Raises:
        InputError: When a file cannot be used, or ``dataset_info.json`` would have it read otherwise.
    """
    files = config.data_files
    info = read_json(Path(config.text("dataset_dir")) / "dataset_info.json")
    for name in (name.strip() for name in config.text("dataset").split(",")):
        entry = info[name]
        columns = entry.get("columns", {})
        if entry.get("formatting") != "sharegpt" or columns.get("system") != "system":
            raise InputError(
                f"{config.text('dataset_dir')}/dataset_info.json: {name!r} must have formatting sharegpt and the "
                "columns messages: conversations, system: system, else system turns are dropped; make it with "
                "`gream data mix`"
            )
        if entry.get("num_samples"):
            raise InputError(
                f"{config.text('dataset_dir')}/dataset_info.json: `num_samples` of {name!r} draws rows at random; "
                "leave it out, or set `max_samples` in the config"
            )
    return pl.concat(read_rows(file).slice(0, config.keys.get("max_samples")) for file in files)


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
    tokens = sorted(found)
    vocabulary = model.tokenizer.get_vocab()
    if missing := [token for token in tokens if token not in vocabulary]:
        raise InputError(
            f"{model.folder}: {len(missing)} of the data's {len(tokens)} SID tokens, {missing[0]} among them, are not "
            "in the tokenizer; extend the base with `gream model extend` by the index that the data were made with"
        )
    ids = [vocabulary[token] for token in tokens]
    if special := [token for token in tokens if model.tokenizer.added_tokens_decoder[vocabulary[token]].special]:
        raise InputError(
            f"{model.folder}: {len(special)} SID tokens, {special[0]} among them, are special tokens, which vanish "
            "from decoded text; extend the base anew with `gream model extend`"
        )
    encoded = model.tokenizer(tokens, add_special_tokens=False)["input_ids"]
    if split := [token for token, own, got in zip(tokens, ids, encoded, strict=True) if got != [own]]:
        raise InputError(
            f"{model.folder}: {len(split)} SID tokens, {split[0]} among them, are not read as one token; extend the "
            "base anew with `gream model extend`"
        )
    if max(ids) >= model.rows:
        raise InputError(
            f"{model.folder}: SID tokens go up to number {max(ids)}, but the embedding has {model.rows} rows; extend "
            "the base anew with `gream model extend`"
        )
    return ids


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
    from transformers import AutoTokenizer

    tokenizer, fixed = model.tokenizer, AutoTokenizer.from_pretrained(model.folder)
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


def _count(found: Findings, rows: pl.DataFrame, model: Model, config: SftConfig) -> None:
    """Fill in the table of tasks.

    Raises:
        InputError: When rows are longer than the trainer's limit.
    """
    count_turns = turn_counter(model.tokenizer)
    kinds, limit = rows["task"].to_numpy(), int(config.keys.get("cutoff_len") or 2048)
    tokens = count_turns([Row(*values) for values in rows.iter_rows()])
    lengths = tokens.sum(1)
    supervised = lengths if config.keys.get("train_on_prompt") else tokens[:, 1]
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


def check_checkpoints(output: Path) -> None:
    """Make sure that the checkpoint from which LLaMA-Factory would go on is whole.

    Raises:
        InputError: When it is not.
    """
    newest = newest_checkpoint(output)
    if newest is None:
        return
    if not is_whole(newest):
        raise InputError(f"{newest}: a stop has torn it; delete it, and the training goes on from the one before")
    tensor_shapes(newest)


def _plan(found: Findings, model: Model, config: SftConfig, stage: int | None) -> None:
    """Fill in the facts.

    Raises:
        InputError: When checkpoints do not fit on the disk.
    """
    import torch

    keys = config.keys
    # As LLaMA-Factory's launcher counts them.
    ranks = int(os.environ.get("NNODES", 1)) * int(os.environ.get("NPROC_PER_NODE", max(torch.cuda.device_count(), 1)))
    batch = int(keys.get("per_device_train_batch_size") or 8)
    accumulation = int(keys.get("gradient_accumulation_steps") or 1)
    rows = sum(task["rows"] for task in found.tasks.values())
    an_epoch = math.ceil(math.ceil(rows / (batch * ranks)) / accumulation)
    given = int(keys.get("max_steps") or -1)
    steps = given if given > 0 else math.ceil(float(keys.get("num_train_epochs") or 3) * an_epoch)
    size = trained_parameters(model, config) * CHECKPOINT_BYTES.get(stage, SHARDED_BYTES)
    written = {"steps": steps // int(keys.get("save_steps") or 500) + 1, "epoch": math.ceil(steps / an_epoch)}
    count = min(written.get(keys.get("save_strategy", "steps"), 0), int(keys.get("save_total_limit") or steps) + 1)
    kept = sum(path.stat().st_size for path in config.output.rglob("*") if path.is_file())
    place = next(path for path in (config.output.absolute(), *config.output.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    found.facts |= {
        "rows": f"{rows:,}",
        "tokens an epoch": f"{sum(task['tokens'] for task in found.tasks.values()):,}",
        "processes": f"{ranks} (NNODES x NPROC_PER_NODE, or the GPUs here)",
        "rows a step": f"{batch * accumulation * ranks:,}",
        "steps": f"{steps:,}, {an_epoch:,} an epoch",
        "checkpoints": f"at most {count} of {decimal(size)}, reckoned; {decimal(free)} are free",
    }
    newest = newest_checkpoint(config.output)
    state = read_json(newest / "trainer_state.json") if newest and (newest / "trainer_state.json").is_file() else {}
    if state.get("global_step", 0) >= steps:
        found.remarks.append(f"{config.output} holds this training already; a new one needs another output_dir.")
    elif state:
        found.remarks.append(f"The training would go on from step {state['global_step']:,} of {config.output}.")
    if (needed := count * size - kept) > free:
        raise InputError(
            f"{config.output}: its checkpoints take {decimal(needed)} more, but {decimal(free)} are free; "
            "lower save_total_limit, free some space or choose another output_dir"
        )


def trained_parameters(model: Model, config: SftConfig) -> int:
    """Return how many parameters a checkpoint holds: those of the model, or of its adapter."""
    adapters = config.keys.get("adapter_name_or_path")
    if config.keys.get("finetuning_type") != "lora" or not adapters:
        return model.parameters
    shapes = tensor_shapes(Path(str(adapters).split(",")[-1].strip()))
    return sum(map(math.prod, shapes.values()))
