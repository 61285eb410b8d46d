"""What decides an evaluation's numbers beside the model: which users, shown what, ranked against what.

Two tables can be compared when their protocols agree, so each result carries its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from gream_verl.core.errors import InputError
from gream_verl.core.files import fingerprint, read_json
from gream_verl.core.prompts import SYSTEM, TEMPLATES
from gream_verl.core.rsvr import Mode
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.core.split import INTERACTIONS, split_file
from gream_verl.evaluation.prompts import Prompt, Wording, make_prompts, prompts_digest, read_prompts, wording

HISTORY = 20
"""Items that a prompt shows by default, as `gream data rl` does."""
AS_IN_FILE = "as in the file"
WHOLE = "all items before the target"
SHOWN = "the items that the prompt shows"


@dataclass(frozen=True)
class Protocol:
    """The protocol of one evaluation.

    Attributes:
        split: ``val`` or ``test``, or that a file of prompts was named, which says it.
        mode: ``direct`` or ``reasoning``.
        prompts: The file that the prompts were read from or made of.
        prompts_made: Whether they were made of interactions, and not read.
        prompts_sha256: Fingerprint of that file.
        prompts_digest: Fingerprint of users, targets and messages: equal ones are one evaluation, whatever file they
            are from.
        index: The item index.
        index_sha256: Its fingerprint.
        held_out: How the held-out interactions were chosen.
        wording: What the prompts show and say.
        drop_history: Whether items of a user's history are never recommended.
        seen: What counts as the history.
        items: How many items are ranked: all of the index.
        users: Users evaluated.
        users_in_file: Users that could have been.
        users_left_out: Users of the sample without a target that can be recommended.
        seed: Seed of the sample.
    """

    split: str
    mode: Mode
    prompts: str
    prompts_made: bool
    prompts_sha256: str
    prompts_digest: str
    index: str
    index_sha256: str
    held_out: str
    wording: Wording
    drop_history: bool
    seen: str
    items: int
    users: int
    users_in_file: int
    users_left_out: int
    seed: int

    def describe(self) -> dict[str, Any]:
        """Return names and values that a person can read and JSON can hold, in the order in which to show them."""
        return {
            "split": self.split,
            "held_out": self.held_out,
            "mode": self.mode,
            **asdict(self.wording),
            "drop_history": self.drop_history,
            "seen": self.seen,
            "candidates": "all items",
            "items": self.items,
            "users": self.users,
            "users_in_file": self.users_in_file,
            "users_left_out": self.users_left_out,
            "seed": self.seed,
            "prompts": self.prompts,
            "prompts_are": "made of the interactions" if self.prompts_made else "read from the file",
            "prompts_sha256": self.prompts_sha256,
            "prompts_digest": self.prompts_digest,
            "index": self.index,
            "index_sha256": self.index_sha256,
        }


@dataclass(frozen=True)
class PromptSource:
    """Where the prompts of an evaluation come from.

    A file that is named, else ``<D>-<split>.parquet`` where it is there and no wording is asked for, else
    ``<D>.inter.json``.

    Attributes:
        data: Folder of the data set.
        dataset: Its name, ``<D>``.
        split: ``val`` or ``test``.
        file: A parquet file with verl's columns, ours or the authors'.
        history: Items shown, the most recent ones; None for what the file shows, or ``HISTORY``.
        template: The user's turn, with ``{history}``; None for that of the file or the mode.
        system: The system's turn, "" for none; None for that of the file or the mode.
        limit: Users of the seeded sample; None takes all.
        seed: Seed of the sample.
        skip_missing: Leave out users whose target is not recommended, instead of refusing the data.

    Raises:
        InputError: When the choices do not fit together.
    """

    data: Path
    dataset: str
    split: str = "test"
    file: Path | None = None
    history: int | None = None
    template: str | None = None
    system: str | None = None
    limit: int | None = None
    seed: int = 0
    skip_missing: bool = False

    def __post_init__(self) -> None:
        if self.template is not None and "{history}" not in self.template:
            raise InputError(
                f"--template {self.template!r}: has no {{history}}; write it where the items' SIDs shall stand"
            )
        if self.file is not None and self._worded:
            raise InputError(
                f"--prompts {self.file}: its prompts have a wording already; leave out --history, --template and "
                "--system, or leave out --prompts"
            )

    @property
    def index(self) -> Path:
        """``<D>.index.json``."""
        return self.data / f"{self.dataset}.index.json"

    @property
    def interactions(self) -> Path:
        """``<D>.inter.json``."""
        return self.data / f"{self.dataset}{INTERACTIONS}"

    @property
    def _worded(self) -> bool:
        return any(choice is not None for choice in (self.history, self.template, self.system))

    def file_of(self, mode: Mode) -> Path | None:
        """Return the file that holds the prompts of ``mode``; None when they are made."""
        if self.file is not None or self._worded:
            return self.file
        part = "val-direct" if (self.split, mode) == ("val", "direct") else self.split
        file = self.data / f"{self.dataset}-{part}.parquet"
        return file if file.is_file() else None

    def read(self, mode: Mode, index: ItemIndex, *, drop_history: bool = True) -> tuple[list[Prompt], Protocol]:
        """Return the prompts and the protocol.

        Args:
            mode: ``direct`` or ``reasoning``.
            index: What :attr:`index` holds.
            drop_history: Whether items of a user's history are never recommended.

        Raises:
            InputError: When a file is missing or does not fit.
        """
        file = self.file_of(mode)
        if file is None:
            shown = Wording(
                HISTORY if self.history is None else self.history,
                TEMPLATES[mode][0] if self.template is None else self.template,
                SYSTEM[mode] if self.system is None else self.system,
            )
            prompts, total = make_prompts(
                self.interactions, index, mode, split=self.split, history=shown.history, template=shown.template,
                system=shown.system, limit=self.limit, seed=self.seed, skip=self.skip_missing,
            )  # fmt: skip
        else:
            prompts, total = read_prompts(
                file, mode, index=index, limit=self.limit, seed=self.seed, skip=self.skip_missing
            )
            shown = wording(prompts)
        source = file or self.interactions
        protocol = Protocol(
            split=self.split if self.file is None else AS_IN_FILE,
            mode=mode,
            prompts=os.fspath(source),
            prompts_made=file is None,
            prompts_sha256=fingerprint(source),
            prompts_digest=prompts_digest(prompts),
            index=os.fspath(self.index),
            index_sha256=fingerprint(self.index),
            held_out=self._held_out(),
            wording=shown,
            drop_history=drop_history,
            seen=WHOLE if all(prompt.whole for prompt in prompts) else SHOWN,
            items=len(index),
            users=len(prompts),
            users_in_file=total,
            users_left_out=min(total, total if self.limit is None else self.limit) - len(prompts),
            seed=self.seed,
        )
        return prompts, protocol

    def _held_out(self) -> str:
        """Return how the held-out interactions were chosen."""
        if self.file is not None or not self.interactions.is_file():
            return AS_IN_FILE
        split = split_file(self.interactions)
        return str(read_json(split).get("kind", "temporal")) if split.is_file() else "leave-one-out"


def protocol_table(protocols: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a table of protocols: a line for each setting, a column for each name.

    Args:
        protocols: Name to what ``Protocol.describe`` gives, and what else decides the result.
    """
    table = Table(title="Protocol and settings", title_justify="left", show_header=len(protocols) > 1)
    table.add_column("")
    for name in protocols:
        table.add_column(escape(name), overflow="fold")
    for key in dict.fromkeys(key for protocol in protocols.values() for key in protocol):
        values = [_text(protocol[key]) if key in protocol else "" for protocol in protocols.values()]
        table.add_row(key.replace("_", " "), *map(escape, values))
    return table


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "":
        return "(none)"
    return f"{value:,}" if isinstance(value, int) else str(value)
