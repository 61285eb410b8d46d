"""The faults that silently ruin SFT by LLaMA-Factory, found before the training; no weights are loaded."""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from data_processing.sft.lengths import render_prompts, token_counter
from data_processing.sft.mix import READ_AS
from data_processing.sft.tasks import REASONING, SftRow
from gream_verl.core.checkpoints import is_whole, newest_checkpoint
from gream_verl.core.errors import InputError
from gream_verl.core.files import read_json, require_file
from gream_verl.core.origin import check_model, check_origin
from gream_verl.core.semantic_ids import SID_TOKEN, find_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REMEDY = "make the data with `gream data mix`"
REQUIRED = ("model_name_or_path", "dataset_dir", "dataset", "template", "output_dir")
OFF = (None, False, "concat")
FORBIDDEN = {
    "packing": "lets the tokens of a row see the rows before it; `neat_packing` does not",
    **dict.fromkeys(("resize_vocab", "add_tokens", "add_special_tokens"), "adds tokens next to those of the model"),
    "val_size": "takes rows out at random; `eval_dataset` does not",
    "dataloader_drop_last": "leaves out the last rows of every epoch",
    "auto_find_batch_size": "makes batches smaller than the blocks of `gream data mix --block`",
    "ignore_data_skip": "trains from the first row again after a stop",
    "tokenized_path": "trains old rows when those of `dataset` are new",
    "streaming": "shuffles rows in spite of `disable_shuffling`",
    "mix_strategy": "drops or repeats rows",
}


def check_config(path: Path, overrides: Sequence[str] = ()) -> tuple[dict[str, dict[str, int]], list[str]]:
    """Look for faults in the keys, data, tokenizer, template and checkpoints of a training.

    Takes a LLaMA-Factory config and ``key=value`` overrides. Returns ``rows``, ``tokens`` and tokens of the ``longest``
    row of each task; and a sentence for each fault.
    """
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments
    from transformers import AutoTokenizer, HfArgumentParser

    keys = read_config(path, overrides)
    try:
        (data,) = HfArgumentParser(DataArguments).parse_dict(keys, allow_extra_keys=True)
        tokenizer, cutoff = AutoTokenizer.from_pretrained(keys["model_name_or_path"]), int(data.cutoff_len)
        changed = deepcopy(tokenizer)
        template = get_template_and_fix_tokenizer(changed, data)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}, {keys['model_name_or_path']}: {str(error).splitlines()[0]}") from error
    files = [data_file(Path(keys["dataset_dir"]), name) for name in [*data.dataset, *(data.eval_dataset or [])]]
    index = f"{data.dataset[0].rpartition('-')[0]}.index.json"
    check_model(Path(keys["model_name_or_path"]), Path(keys["dataset_dir"], index))
    rows = [row for file in files[: len(data.dataset)] for row in read_rows(file)[: data.max_samples]]
    lengths, by_task = token_counter(tokenizer)(rows), defaultdict(list)
    for row, tokens in zip(rows, lengths, strict=True):
        by_task[row.task].append(tokens)
    table = {task: {"rows": len(own), "tokens": sum(own), "longest": max(own)} for task, own in by_task.items()}
    problems = [*key_problems(keys, ordered=REASONING in by_task), *token_problems(rows, tokenizer, keys)]
    problems += template_problems(rows, tokenizer, template, changed)
    if too_long := sum(tokens > cutoff for tokens in lengths):
        problems.append(
            f"{too_long:,} rows are longer than `cutoff_len: {cutoff}` and would lose the end of the answer; "
            f"make the data with `gream data mix --tokenizer {keys['model_name_or_path']} --longest {cutoff}`"
        )
    return table, [*problems, *checkpoint_problems(keys, files)]


def read_config(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Read a config as LLaMA-Factory does; refuse one that is not ``key: value`` lines, or lacks a key."""
    try:
        keys: Any = OmegaConf.to_container(OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_cli(list(overrides))))
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, OSError) as error:
        raise InputError(f"{path}: not a LLaMA-Factory config ({str(error).splitlines()[0]})") from error
    if missing := [key for key in REQUIRED if not keys.get(key)]:
        raise InputError(f"{path}: has no `{missing[0]}`; add it, or give {missing[0]}=VALUE")
    return keys


def data_file(folder: Path, name: str) -> Path:
    """Return the file of a data set; refuse an entry by which LLaMA-Factory would lose system turns or draw rows."""
    info = folder / "dataset_info.json"
    entry = read_json(info, REMEDY).get(name, {})
    if entry != {"file_name": str(entry.get("file_name")), **READ_AS}:
        raise InputError(f"{info}: no entry {name!r} as `gream data mix` writes it; {REMEDY}")
    return folder / entry["file_name"]


def read_rows(file: Path) -> list[SftRow]:
    """Read the rows of a file; refuse one that is torn, or not an SFT file."""
    try:
        rows = pq.read_table(require_file(file, REMEDY)).select(["conversations", "task", "system"]).to_pylist()
        for row in rows:
            row["user"], row["assistant"] = (turn["value"] for turn in row.pop("conversations"))
        found = [SftRow(**row) for row in rows]
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise InputError(f"{file}: not a whole SFT file ({str(error).splitlines()[0]}); {REMEDY}") from error
    check_origin(file, REMEDY)
    return found


def key_problems(keys: Mapping[str, Any], *, ordered: bool = True) -> Iterator[str]:
    """Yield the keys that break the rows or the vocabulary, and the order where the rows are ``ordered``."""
    for key, fault in FORBIDDEN.items():
        if keys.get(key) not in OFF and not (key == "packing" and keys.get("neat_packing")):
            yield f"`{key}: {keys[key]}` {fault}; leave it out"
    if ordered and (keys.get("neat_packing") or not keys.get("disable_shuffling")):
        yield "`disable_shuffling` is not true, or `neat_packing` is: the order of the curriculum would be lost"


def token_problems(
    rows: Sequence[SftRow], tokenizer: PreTrainedTokenizerBase, keys: Mapping[str, Any]
) -> Iterator[str]:
    """Yield faults of SID tokens: each must be one ordinary token, whose embedding row is trained."""
    tokens = sorted({token for row in rows for token in find_tokens(row.user + row.assistant)})
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    special = {number for number, token in added.items() if token.special}
    encoded = tokenizer(tokens, add_special_tokens=False)["input_ids"] if tokens else []
    pairs = zip(tokens, encoded, strict=True)
    if wrong := [token for token, ids in pairs if ids != [vocabulary.get(token)] or ids[0] in special]:
        yield (
            f"{len(wrong)} of {len(tokens)} SID tokens, such as {wrong[0]}, are not one ordinary token of "
            f"{keys['model_name_or_path']}; extend the base with `gream model extend` and this data set's index"
        )
    names = [token.content for token in added.values() if token.special and not SID_TOKEN.fullmatch(token.content)]
    control = re.compile("|".join(map(re.escape, names)) or "(?!)")
    hits = [(row.user, hit[0]) for row in rows if (hit := control.search(f"{row.system}{row.user}{row.assistant}"))]
    if hits:
        said = f"such as {hits[0][1]} in {hits[0][0]!r:.120}"
        yield f"{len(hits)} rows hold a control token of the tokenizer, {said}; take it out of the texts"
    kind = keys.get("finetuning_type", "lora")
    adapter = keys.get("adapter_name_or_path") if kind == "lora" else None
    rows_by_module = adapter and read_json(Path(adapter, "adapter_config.json")).get("trainable_token_indices")
    trained = set(itertools.chain(*(rows_by_module or {}).values()))
    if kind != "full" and not trained.issuperset(itertools.chain(*encoded)):
        yield (
            f"`finetuning_type: {kind}` leaves embedding rows of SID tokens untrained; name an adapter of "
            "`gream model adapter` as `adapter_name_or_path`"
        )


def template_problems(
    rows: Sequence[SftRow], tokenizer: PreTrainedTokenizerBase, template: Any, changed: PreTrainedTokenizerBase
) -> list[str]:
    """Compare LLaMA-Factory's template, and the tokenizer it changed, with the model's chat template on a row per task.

    SRPO and evaluation use the chat template; the end-of-sequence token follows the answer.
    """
    from llamafactory.data.template import TEMPLATES

    samples, expected = list({row.task: row for row in rows}.values()), []
    for row in samples:
        asked = tokenizer.encode(render_prompts(tokenizer, [row])[0], add_special_tokens=False)
        answer = tokenizer.encode(row.assistant, add_special_tokens=False)
        expected.append([*asked, *answer, tokenizer.eos_token_id])

    def trained(template: Any, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        """Return the tokens of each sample that LLaMA-Factory trains, as many as are expected."""
        ids = []
        for row, wanted in zip(samples, expected, strict=True):
            turns = [{"role": "user", "content": row.user}, {"role": "assistant", "content": row.assistant}]
            [(prompt, response)] = template.encode_multiturn(tokenizer, turns, row.system)
            ids.append([*prompt, *response][: len(wanted)])
        return ids

    for row, ids, wanted in zip(samples, trained(template, changed), expected, strict=True):
        if ids != wanted:
            same = (one == other for one, other in zip(ids, wanted, strict=False))
            start = max(sum(itertools.takewhile(bool, same)) - 4, 0)
            texts = [tokenizer.decode(part[start : start + 8]) for part in (ids, wanted)]
            fitting = sorted(name for name, other in TEMPLATES.items() if trained(other, tokenizer) == expected)
            remedy = f"choose one of {', '.join(fitting)}" if fitting else "no template of LLaMA-Factory has that"
            said = f"`template` trains {texts[0]!r}, not {texts[1]!r} of the model's chat template (task {row.task})"
            return [f"{said}; {remedy}, or set `default_system`"]
    return []


def checkpoint_problems(keys: Mapping[str, Any], files: Sequence[Path]) -> Iterator[str]:
    """Yield faults of the checkpoint from which LLaMA-Factory would go on."""
    newest = newest_checkpoint(Path(keys["output_dir"]))
    if newest is None or keys.get("overwrite_output_dir"):
        return
    if not is_whole(newest):
        yield f"{newest}: is torn; delete it, and the training goes on from the one before"
        return
    state = newest / "trainer_state.json"
    batch = read_json(state).get("train_batch_size")
    older = any(file.stat().st_mtime > state.stat().st_mtime for file in files)
    if older or batch != keys.get("per_device_train_batch_size", batch):
        yield f"{newest}: is of other data or batches, and LLaMA-Factory would go on from it; choose another output_dir"
