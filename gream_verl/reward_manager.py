"""The reward ``rsvr`` as verl's reward loop calls it (``reward.reward_manager.name=rsvr``).

The plugin imports this module when verl imports its reward managers; ``source: importlib`` with
``pkg://gream_verl.reward_manager`` finds it as well.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from verl import DataProto
from verl.experimental.reward_loop.reward_manager import register
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from gream_verl.files import InputError
from gream_verl.rsvr import Format, Mode, score_response
from gream_verl.semantic_ids import ItemIndex, SemanticId, parse_sid

OPTIONS = "reward.reward_kwargs.rsvr"


class RsvrOptions(BaseModel):
    """What may stand under ``reward.reward_kwargs.rsvr``.

    Attributes:
        format: ``strict`` or ``reference``, see ``gream_verl.rsvr``.
        mode: Mode of rows whose ``extra_info`` has no ``type``.
        index_file: ``<D>.index.json``; None when ``valid_item`` is of no interest.
        base_levels: Levels that every SID has, where there is no index to tell.
        require_valid_item: Whether an answer that is no item gets nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Format = "strict"
    mode: Mode = "reasoning"
    index_file: str | None = None
    base_levels: int | None = Field(default=None, ge=1, le=25)
    require_valid_item: bool = False

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
        raw = OmegaConf.select(config, OPTIONS)
        try:
            return cls.model_validate({} if raw is None else OmegaConf.to_container(raw, resolve=True))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join([OPTIONS, *map(str, first["loc"])])
            raise InputError(f"{key}: {first['msg']}; known keys are {', '.join(cls.model_fields)}") from None


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

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """Return ``reward_score`` and ``reward_extra_info`` of the last sequence in ``data``.

        Raises:
            InputError: When the row has no well-formed ground truth.
        """
        row = data[-1]
        extra_info = row.non_tensor_batch.get("extra_info") or {}
        reward = score_response(
            self._response_text(row),
            _ground_truth(row.non_tensor_batch, extra_info),
            mode=extra_info.get("type") or self.options.mode,
            format=self.options.format,
            base_levels=self.options.base_levels,
            index=self.index,
            require_valid_item=self.options.require_valid_item,
        )
        details = asdict(reward)
        return {"reward_score": details.pop("score"), "reward_extra_info": details}

    def _response_text(self, row: Any) -> str:
        """Return the response without padding and without one end-of-sequence token at its end."""
        response = row.batch["responses"]
        length = int(row.batch["attention_mask"][-response.shape[-1] :].sum())
        ids = response[:length].tolist()
        if ids and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        # Special tokens stay visible, or a response could hide its form behind them.
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


def _ground_truth(row: dict[str, Any], extra_info: dict[str, Any]) -> SemanticId:
    text = row["reward_model"]["ground_truth"]
    truth = parse_sid(text)
    if truth is None:
        raise InputError(
            f"{row.get('data_source')}: row {extra_info.get('index')}: reward_model.ground_truth is {text!r}; "
            "expected a SID such as '<|a_1|><|b_7|>'; build the parquet files anew with `gream data rl`"
        )
    return truth
