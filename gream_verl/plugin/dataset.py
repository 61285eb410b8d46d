"""verl's dataset with checks, and prompts shortened by whole items (``data.custom_cls.name=SemanticIdDataset``).

It reads verl parquet files, such as the authors' ``<D>-rl.parquet``. A prompt that is too long loses its oldest items;
verl itself would cut off the head of the conversation, and through a semantic ID (agent_loop.py:437).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from omegaconf import DictConfig, OmegaConf
from transformers import AutoConfig
from verl.utils.dataset.rl_dataset import RLHFDataset
from verl.utils.tokenizer import normalize_token_ids

from gream_verl.core.errors import InputError
from gream_verl.core.origin import check_origin
from gream_verl.core.prompts import drop_oldest
from gream_verl.core.semantic_ids import ItemIndex, find_sids
from gream_verl.core.token_text import TokenText
from gream_verl.plugin.run_lock import hold_checkpoints
from gream_verl.plugin.unread_keys import refuse_unread_keys

Prompt = list[dict[str, Any]]


class SemanticIdDataset(RLHFDataset):
    """Checks every row before training starts, and shortens prompts by whole items.

    Every ground truth must be a well-formed SID, every SID token of truth and prompt one token of the tokenizer, and,
    where ``data.index_file`` names an item index, every SID an item of it. ``data.filter_overlong_prompts`` and
    ``data.truncation`` have no effect.
    """

    def _read_files_and_tokenize(self) -> None:
        root = self.config._get_root()  # here, because verl builds the data before any model
        refuse_unread_keys(root)
        refuse_short_models(root)
        if self.for_training and (checkpoints := OmegaConf.select(root, "trainer.default_local_dir")):
            resumes = OmegaConf.select(root, "trainer.resume_mode") != "disable"
            hold_checkpoints(Path(checkpoints), [*map(Path, self.data_files)], resumes)
        index_file = self.config.get("index_file")
        items = ItemIndex.load(index_file).items if index_file else None
        text, room = TokenText(self.tokenizer), self.config.get("max_response_length", float("inf"))
        self._tokens_of_template: dict[tuple[str, ...], int] = {}
        for row, prompt, reward_model in _columns(self.data_files, self.prompt_key):
            truth = text.ground_truth(reward_model, row)
            shown = [sid for turn in prompt for sid in find_sids(turn["content"])]
            text.check((token for sid in shown for token in sid), row)
            self._check_room(prompt, row)
            if len(truth) >= room:
                raise InputError(f"{row}: its SID has {len(truth)} tokens; raise data.max_response_length={room}")
            unknown = [sid for sid in (truth, *shown) if items is not None and sid not in items]
            if unknown:
                raise InputError(
                    f"{row}: {''.join(unknown[0])} is no item of {index_file}; build the files from this index"
                )
        for file in self.data_files:
            check_origin(Path(file), "make it with `gream data rl`")
        super()._read_files_and_tokenize()
        self._check_size()

    def maybe_filter_out_long_prompts(self, dataframe: Any = None) -> Any:
        """Keep every row: ``__getitem__`` shortens long prompts."""
        return dataframe

    @cached_property
    def for_training(self) -> bool:
        """True for the training rows; validation may read the same files."""
        files = self.config.get("train_files")
        trained_on = list(self.original_data_files) == ([files] if isinstance(files, str) else files)
        return trained_on and self.max_samples == self.config.get("train_max_samples", -1)

    def _check_size(self) -> None:
        """Refuse training files with less than one batch: verl starts its engines first, and divides by 0 then."""
        size = self.config.get("train_batch_size")
        if self.for_training and len(self) < size:
            raise InputError(
                f"{', '.join(self.original_data_files)}: {len(self)} rows are less than one batch of "
                f"data.train_batch_size={size}; lower it"
            )

    def _check_room(self, prompt: Prompt, row: str) -> None:
        """Refuse a prompt that is too long even with its latest item only."""
        # A token has at least one byte: with this bound, most prompts need no tokenizer.
        roles = tuple(turn["role"] for turn in prompt)
        if roles not in self._tokens_of_template:
            self._tokens_of_template[roles] = self._count_tokens([{**turn, "content": ""} for turn in prompt])
        most = self._tokens_of_template[roles] + sum(len(turn["content"].encode()) for turn in prompt)
        if most <= self.max_prompt_length or self._fits(prompt):
            return
        if not self._fits(_without(prompt, len(prompt[_longest(prompt)]["content"]))):
            limit = f"data.max_prompt_length={self.max_prompt_length}"
            raise InputError(f"{row}: the prompt is longer than {limit} even with its latest item only; raise it")

    def __getitem__(self, item: int) -> dict[str, Any]:
        """Return a row whose prompt lost as many of its oldest items as it takes to fit, and its ``for_training``."""
        row: dict[str, Any] = {**super().__getitem__(item), "for_training": self.for_training}
        prompt: Prompt = row["raw_prompt"]
        if not self._fits(prompt):
            # The fewest items to drop, by bisection: ``too_few`` does not fit, ``enough`` does.
            too_few, enough = 0, len(find_sids(prompt[_longest(prompt)]["content"])) - 1
            while enough - too_few > 1:
                middle = (too_few + enough) // 2
                too_few, enough = (too_few, middle) if self._fits(_without(prompt, middle)) else (middle, enough)
            row["raw_prompt"] = _without(prompt, enough)
        return row

    def _fits(self, prompt: Prompt) -> bool:
        return self._count_tokens(prompt) <= self.max_prompt_length

    def _count_tokens(self, prompt: Prompt) -> int:
        ours = {"add_generation_prompt": True, "tokenize": True, "return_dict": False, "return_tensors": None}
        ids = self.tokenizer.apply_chat_template(prompt, **{**self.apply_chat_template_kwargs, **ours})
        return len(normalize_token_ids(ids))


def _longest(prompt: Prompt) -> int:
    """Return the number of the turn with the most items: the one that holds the history."""
    return int(np.argmax([len(find_sids(turn["content"])) for turn in prompt]))


def refuse_short_models(root: DictConfig) -> None:
    """Refuse prompts and responses for which the model has no room; verl's servers would, each in a traceback."""
    model, data = OmegaConf.select(root, "actor_rollout_ref.model.path"), OmegaConf.select(root, "data")
    if not model:
        return
    most = AutoConfig.from_pretrained(model).get_text_config(decoder=True).max_position_embeddings
    room = OmegaConf.select(root, "actor_rollout_ref.rollout.max_model_len") or most
    if room > most:
        raise InputError(f"actor_rollout_ref.rollout.max_model_len={room}: {model} has {most} positions; lower it")
    if data.max_prompt_length + data.max_response_length > room:
        lengths = f"data.max_prompt_length={data.max_prompt_length}, max_response_length={data.max_response_length}"
        raise InputError(f"{lengths}: do not fit into rollout.max_model_len={room}, of {most} at most; change one")


def _without(prompt: Prompt, count: int) -> Prompt:
    """Return the prompt without the oldest ``count`` items of its history; the latest one always stays."""
    turn = _longest(prompt)
    shorter = {**prompt[turn], "content": drop_oldest(prompt[turn]["content"], count)}
    return [*prompt[:turn], shorter, *prompt[turn + 1 :]]


def _columns(files: Sequence[str], prompt_key: str) -> Iterator[tuple[str, Prompt, dict[str, Any] | None]]:
    """Yield the label of each row for messages, its prompt, and its column ``reward_model``."""
    for file in files:
        number = 0
        try:
            for batch in pq.ParquetFile(file).iter_batches(columns=[prompt_key, "reward_model"]):
                prompts, reward_models = (batch.column(name).to_pylist() for name in (prompt_key, "reward_model"))
                for prompt, reward_model in zip(prompts, reward_models, strict=True):
                    yield f"{file}: row {number}", prompt or [], reward_model
                    number += 1
        except (OSError, KeyError, ValueError) as error:
            raise InputError(f"{file}: no verl parquet ({error}); make it with `gream data rl`") from error
