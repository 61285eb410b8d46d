"""The protocol of an evaluation: the users, what they are shown, and what is ranked for them.

Two results are comparable when their protocols agree, so each result carries its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from gream_verl.core.data_folder import DataFolder
from gream_verl.core.errors import InputError
from gream_verl.core.files import fingerprint, read_json
from gream_verl.core.rsvr import Mode
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.prompts import Prompt, make_prompts, read_prompts, wording
from gream_verl.evaluation.results import Evaluation

AS_IN_FILE = "as in the file"


def read_protocol(
    data: DataFolder, options: EvaluationOptions, mode: Mode, index: ItemIndex
) -> tuple[list[Prompt], dict[str, Any]]:
    """Return the prompts of a mode and their protocol, ready for JSON, in the order in which to show it.

    The prompts are those of the named file, else those of the data folder's file where no wording is asked for, else
    they are made from the interactions.

    Raises:
        InputError: When a file is missing or does not fit.
    """
    is_worded = any(choice is not None for choice in (options.history, options.template, options.system))
    file = options.prompts or (data.test if options.split == "test" else data.val_of(mode))
    is_read = options.prompts is not None or (file.is_file() and not is_worded)
    source = file if is_read else data.inter
    prompts, total = (read_prompts if is_read else make_prompts)(source, mode, options, index)
    held_out = AS_IN_FILE
    if options.prompts is None and data.inter.is_file():
        held_out = read_json(data.split).get("kind", "temporal") if data.split.is_file() else "leave-one-out"
    # Equal digests are one evaluation, whatever file the prompts are from.
    digest = hashlib.sha256()
    for prompt in prompts:
        turns = [[turn["role"], turn["content"]] for turn in prompt.messages]
        digest.update(json.dumps([prompt.user, prompt.target, turns]).encode())
    whole = all(prompt.whole for prompt in prompts)
    return prompts, {
        "split": options.split if options.prompts is None else AS_IN_FILE,
        "held_out": held_out,
        "mode": mode,
        **wording(prompts),
        "drop_history": options.drop_history,
        "seen": "all items before the target" if whole else "the items that the prompt shows",
        "candidates": "all items",
        "items": len(index),
        "users": len(prompts),
        "users_in_file": total,
        "users_left_out": min(total, options.limit or total) - len(prompts),
        "seed": options.seed,
        "prompts": os.fspath(source),
        "prompts_are": "read from the file" if is_read else "made of the interactions",
        "prompts_sha256": fingerprint(source),
        "prompts_digest": digest.hexdigest(),
        "index": os.fspath(data.index),
        "index_sha256": fingerprint(data.index),
    }


def refuse_to_lose(path: Path, prompts: list[Prompt], protocol: dict[str, Any]) -> None:
    """Refuse to replace a result of other users or another protocol.

    A damaged result is replaced, and one whose files of prompts or index have changed since.

    Raises:
        InputError: When ``path`` holds such a result.
    """
    try:
        old = Evaluation.load(path)
    except InputError:
        return
    kept = old.settings.get("protocol", {})
    files = [file for file in ("prompts", "index") if kept.get(file) == protocol[file]]
    if any(kept.get(f"{file}_sha256") != protocol[f"{file}_sha256"] for file in files):
        return
    rows = [{"user": prompt.user, "target": prompt.target} for prompt in prompts]
    reasons = old.disagreements(Evaluation({}, {"mode": old.settings.get("mode"), "protocol": protocol}, rows))
    if reasons:
        raise InputError(f"{path}: holds another result ({'; '.join(reasons)}); choose a --name or add --overwrite")
