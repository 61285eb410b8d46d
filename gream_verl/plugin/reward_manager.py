"""The reward ``rsvr`` as verl's reward loop calls it (``reward.reward_manager.name=rsvr``).

The plugin imports this module when verl imports its reward managers; ``source: importlib`` with
``pkg://gream_verl.plugin.reward_manager`` finds it as well.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, get_args

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict, Field, model_validator
from verl import DataProto
from verl.experimental.reward_loop.reward_manager import register
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from gream_verl.core.options import checked_options
from gream_verl.core.rsvr import Format, Mode, overlong_penalty, score_response
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.core.token_text import TokenText

OPTIONS = "reward.reward_kwargs.rsvr"
MODES = get_args(Mode)


class Overlong(BaseModel):
    """What may stand under ``reward.reward_kwargs.rsvr.overlong``, see ``gream_verl.core.rsvr.overlong_penalty``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_length: int = Field(ge=1)
    buffer: int = Field(ge=1)
    factor: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _buffer_fits(self) -> Overlong:
        if self.buffer > self.max_length:
            raise ValueError(f"buffer {self.buffer} is longer than max_length {self.max_length}")
        return self


class RsvrOptions(BaseModel):
    """What may stand under ``reward.reward_kwargs.rsvr``.

    Attributes:
        format: ``strict`` or ``reference``, see ``gream_verl.core.rsvr``.
        mode: Mode of rows whose ``extra_info.type`` is neither ``reasoning`` nor ``direct``.
        index_file: ``<D>.index.json``; None when ``valid_item`` is of no interest.
        base_levels: Levels that every SID has, where there is no index to tell.
        require_valid_item: Whether an answer that is no item gets nothing.
        binary: Whether exact answers only are paid, an ablation.
        overlong: Punishment of long responses; None for none. Filter groups by ``reward`` then: groups that differ in
            length only are alike in ``match``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Format = "strict"
    mode: Mode = "reasoning"
    index_file: str | None = None
    base_levels: int | None = Field(default=None, ge=1, le=25)
    require_valid_item: bool = False
    binary: bool = False
    overlong: Overlong | None = None

    @model_validator(mode="after")
    def _needs_index(self) -> RsvrOptions:
        if self.require_valid_item and self.index_file is None:
            raise ValueError("require_valid_item needs index_file")
        return self

    @classmethod
    def from_config(cls, config: DictConfig) -> RsvrOptions:
        """Return the options in the whole configuration of a run.

        Raises:
            InputError: When a key is unknown or has a wrong value; the message names it.
        """
        return checked_options(cls, OPTIONS, OmegaConf.select(config, OPTIONS))


@register("rsvr")
class RsvrRewardManager(RewardManagerBase):
    """Scores one response at a time with RSVR.

    A row needs ``reward_model.ground_truth`` (the SID of the target) and may say with ``extra_info.type`` whether its
    prompt asked for ``reasoning`` or ``direct``.
    """

    def __init__(self, config: DictConfig, tokenizer: Any, compute_score: Any = None, **_: Any) -> None:
        super().__init__(config, tokenizer, compute_score)
        self.options = RsvrOptions.from_config(config)
        self.index = ItemIndex.load(self.options.index_file) if self.options.index_file else None
        self.text = TokenText(tokenizer)
        if self.index is not None:
            self.text.check(self.index.tokens, self.index.source)

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """Return ``reward_score`` and ``reward_extra_info`` of the last sequence in ``data``.

        Raises:
            InputError: When the row has no ground truth, or one that no response could spell.
        """
        row = data[-1]
        columns = row.non_tensor_batch
        extra_info = columns.get("extra_info") or {}
        place = f"{columns.get('data_source')}: row {extra_info.get('index')}"
        ids = _response_ids(row)
        reward = score_response(
            self.text.read(ids),
            self.text.ground_truth(columns.get("reward_model"), place),
            mode=extra_info["type"] if extra_info.get("type") in MODES else self.options.mode,
            format=self.options.format,
            base_levels=self.options.base_levels,
            index=self.index,
            require_valid_item=self.options.require_valid_item,
        )
        details = asdict(reward)
        score = details.pop("score")
        if self.options.binary:
            score = reward.acc
        if (overlong := self.options.overlong) is not None:
            details["overlong"] = overlong_penalty(len(ids), overlong.max_length, overlong.buffer, overlong.factor)
            score += details["overlong"]
        return {"reward_score": score, "reward_extra_info": details}


def _response_ids(row: Any) -> list[int]:
    """Return the token ids of a response without the padding behind them."""
    response = row.batch["responses"]
    length = int(row.batch["attention_mask"][-response.shape[-1] :].sum())
    ids: list[int] = response[:length].tolist()
    return ids
