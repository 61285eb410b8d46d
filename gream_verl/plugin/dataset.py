"""verl's dataset, which refuses data that the model cannot answer (``data.custom_cls.name=SemanticIdDataset``).

Its rows come from verl parquet files, such as the authors' ``<D>-rl.parquet``, or are made while verl trains, from
``<D>.inter.json`` and ``data.index_file``. Either way a prompt that is too long loses its oldest items, whole ones;
verl itself would cut the head of the conversation off, and through a semantic ID (agent_loop.py:437).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from omegaconf import DictConfig
from pydantic import BaseModel, ConfigDict, Field, field_validator
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.tokenizer import normalize_token_ids

from gream_verl.core.errors import InputError
from gream_verl.core.options import checked_options
from gream_verl.core.prompts import NO_TARGET, NextItemRows, drop_oldest
from gream_verl.core.rsvr import Mode
from gream_verl.core.semantic_ids import ItemIndex, find_sids
from gream_verl.core.split import INTERACTIONS, read_interactions, training_parts
from gream_verl.core.token_text import TokenText

OPTIONS = "data.next_item"


class NextItemOptions(BaseModel):
    """What may stand under ``data.next_item``, for rows that are made from ``<D>.inter.json``.

    Attributes:
        mode: What the prompts ask for.
        history: Items shown, the most recent ones.
        templates: Wordings of the user's turn, each with ``{history}``; None for those of ``gream_verl.core.prompts``.
        system: The system's turn, "" for none; None for that of the mode.
        passes: Passes over all targets in one of verl's epochs, each in an order and with templates of its own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Mode = "reasoning"
    history: int = Field(default=20, ge=1)
    templates: tuple[str, ...] | None = Field(default=None, min_length=1)
    system: str | None = None
    passes: int = Field(default=1, ge=1)

    @field_validator("templates")
    @classmethod
    def _have_a_place_for_the_history(cls, templates: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for template in templates or ():
            if "{history}" not in template:
                raise ValueError(f"no {{history}} in {template!r}")
        return templates

    @classmethod
    def from_config(cls, data: DictConfig) -> NextItemOptions:
        """Return the options in the node ``data`` of a run.

        Raises:
            InputError: When a key is unknown or has a wrong value; the message names it.
        """
        return checked_options(cls, OPTIONS, data.get("next_item"))


class SemanticIdDataset(RLHFDataset):
    """Checks every row before training starts, and shortens prompts by whole items.

    Every ground truth must be a well-formed SID, every SID token of truth and prompt one token of the tokenizer, and,
    where ``data.index_file`` names an item index, every SID an item of it. ``data.filter_overlong_prompts`` and
    ``data.truncation`` have no effect.

    ``data.train_files`` may also name one ``<D>.inter.json``; see ``NextItemOptions``.

    Raises:
        InputError: Naming file, row and token.
    """

    def _read_files_and_tokenize(self) -> None:
        index_file = self.config.get("index_file")
        index = ItemIndex.load(index_file) if index_file else None
        text = TokenText(self.tokenizer)
        self._tokens_of_template: dict[tuple[str, ...], int] = {}
        if any(str(file).endswith(INTERACTIONS) for file in self.data_files):
            self.dataframe = rows = self._make_rows(index)
            text.check(rows.index.tokens, index_file)
            for prompt in rows.shortest():
                self._check_room(prompt, str(self.data_files[0]))
            return
        if self.config.get("next_item") is not None and not self._is_validation():
            raise InputError(
                f"{OPTIONS}: has no effect on {self.data_files[0]}; name a <D>{INTERACTIONS} in data.train_files, "
                "in the last of the recipes, or leave the node out"
            )
        known = set(index.sids.values()) if index is not None else set()
        for place, prompt, reward_model in _columns(self.data_files, self.prompt_key):
            truth = text.ground_truth(reward_model, place)
            shown = [sid for turn in prompt for sid in find_sids(str(turn["content"]))]
            text.check((token for sid in shown for token in sid), place)
            self._check_room(prompt, place)
            unknown = [sid for sid in (truth, *shown) if known and sid not in known]
            if unknown:
                raise InputError(
                    f"{place}: {''.join(unknown[0])} is no item of {index_file}; build the files from this index"
                )
        super()._read_files_and_tokenize()

    def maybe_filter_out_long_prompts(self, dataframe: Any = None) -> Any:
        """Keep every row: long prompts are shortened when they are asked for."""
        return dataframe

    def _is_validation(self) -> bool:
        return bool(self.original_data_files == _as_list(self.config.get("val_files")))

    def _make_rows(self, index: ItemIndex | None) -> NextItemRows:
        if len(self.data_files) > 1:
            raise InputError(f"data.train_files: {self.data_files}: expected one <D>{INTERACTIONS} and nothing else")
        path = Path(self.data_files[0])
        if self._is_validation():
            raise InputError(f"data.val_files: {path} has no validation rows; name the file of `gream data rl`")
        if index is None:
            raise InputError(f"data.index_file: missing; name the index that gives the items of {path} their SIDs")
        if self.config.get("shuffle"):
            raise InputError(
                f"data.shuffle: set it to false; rows made from {path} have an order of their own, by data.seed"
            )
        seed = self.config.get("seed") or 0
        if seed < 0:
            raise InputError(f"data.seed: must not be negative, got {seed}")
        if self.prompt_key != "prompt":
            raise InputError(f"data.prompt_key: rows made from {path} have their prompt in 'prompt'")
        rows = NextItemRows(
            path.name.removesuffix(INTERACTIONS),
            training_parts(path, _read_sequences(path, index)),
            index,
            seed=seed,
            limit=self.max_samples if self.max_samples > 0 else None,
            **dict(NextItemOptions.from_config(self.config)),
        )
        if not len(rows):
            raise InputError(f"{path}: {NO_TARGET}")
        return rows

    def _check_room(self, prompt: list[dict[str, Any]], place: str) -> None:
        """Refuse a prompt that is too long even with its latest item only."""
        if not _is_text(prompt):
            return
        roles = tuple(turn["role"] for turn in prompt)
        if roles not in self._tokens_of_template:
            self._tokens_of_template[roles] = self._count_tokens([{**turn, "content": ""} for turn in prompt])
        most = self._tokens_of_template[roles] + sum(len(turn["content"].encode()) for turn in prompt)
        if most <= self.max_prompt_length or self._fits(prompt):  # a token has at least one byte
            return
        if not self._fits(_without(prompt, len(prompt[_longest(prompt)]["content"]))):
            raise InputError(
                f"{place}: the prompt is longer than data.max_prompt_length={self.max_prompt_length}, with its latest "
                "item only if it has any; raise it, or leave the row out"
            )

    def __getitem__(self, item: int) -> dict[str, Any]:
        made: dict[str, Any] = super().__getitem__(item)
        if _is_text(made["raw_prompt"]):
            made["raw_prompt"] = self._shortened(made["raw_prompt"])
        return made

    def _shortened(self, prompt: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the prompt without as many of its oldest items as it takes to fit ``data.max_prompt_length``."""
        if self._fits(prompt):
            return prompt
        too_few, enough = 0, max(len(find_sids(prompt[_longest(prompt)]["content"])) - 1, 0)
        while enough - too_few > 1:
            middle = (too_few + enough) // 2
            too_few, enough = (too_few, middle) if self._fits(_without(prompt, middle)) else (middle, enough)
        return _without(prompt, enough)

    def _fits(self, prompt: list[dict[str, Any]]) -> bool:
        return self._count_tokens(prompt) <= self.max_prompt_length

    def _count_tokens(self, prompt: list[dict[str, Any]]) -> int:
        ours = {"add_generation_prompt": True, "tokenize": True, "return_dict": False, "return_tensors": None}
        ids = self.tokenizer.apply_chat_template(prompt, **{**self.apply_chat_template_kwargs, **ours})
        return len(normalize_token_ids(ids))


def _is_text(prompt: list[dict[str, Any]]) -> bool:
    return all(isinstance(turn["content"], str) for turn in prompt)


def _longest(prompt: list[dict[str, Any]]) -> int:
    """Return which turn has the most items: the one that holds the history."""
    return int(np.argmax([len(find_sids(turn["content"])) for turn in prompt]))


def _without(prompt: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return the prompt without the oldest ``count`` items of its history; the latest one always stays."""
    place = _longest(prompt)
    shorter = {**prompt[place], "content": drop_oldest(prompt[place]["content"], count)}
    return [*prompt[:place], shorter, *prompt[place + 1 :]]


def _read_sequences(path: Path, index: ItemIndex) -> dict[str, list[str]]:
    """Read ``<D>.inter.json`` and check that every item is in the index."""
    sequences = read_interactions(path)
    for user, items in sequences.items():
        if (missing := next((item for item in items if item not in index.sids), None)) is not None:
            raise InputError(f"{path}: user {user!r}: item {missing!r} is not in {index.source}; build the index anew")
    return sequences


def _columns(files: Sequence[str], prompt_key: str) -> Iterator[tuple[str, list[dict], dict[str, Any] | None]]:
    """Yield where each row stands, its prompt, and its column ``reward_model``."""
    for file in files:
        number = 0
        try:
            for batch in pq.ParquetFile(file).iter_batches(columns=[prompt_key, "reward_model"]):
                prompts, reward_models = batch.column(prompt_key).to_pylist(), batch.column("reward_model").to_pylist()
                for prompt, reward_model in zip(prompts, reward_models, strict=True):
                    yield f"{file}: row {number}", prompt or [], reward_model
                    number += 1
        except (OSError, KeyError, ValueError) as error:
            raise InputError(
                f"{file}: cannot be read as verl parquet ({error}); make it with `gream data rl`"
            ) from error


def _as_list(files: Any) -> list[str]:
    return [files] if isinstance(files, str) else list(files or [])
