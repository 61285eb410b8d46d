"""The reward ``rsvr`` in verl's reward loop (``reward.reward_manager.name=rsvr``), or a function of yours in its place.

docs/reward.md shows how to change the reward.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any, get_args

import numpy as np
from omegaconf import DictConfig, OmegaConf
from pydantic import BaseModel, ConfigDict, Field
from verl import DataProto
from verl.experimental.reward_loop.reward_manager import register
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from gream_verl.core.errors import InputError
from gream_verl.core.options import checked_options
from gream_verl.core.rsvr import Format, Mode, Reward, overlong_penalty, prefix_matches, score_response
from gream_verl.core.semantic_ids import ItemIndex, SemanticId
from gream_verl.core.token_text import TokenText
from gream_verl.plugin.unread_keys import refuse_unread_keys

OPTIONS = "reward.reward_kwargs.rsvr"
CUSTOM = "reward.custom_reward_function"
SAMPLED = "sampled_response"
"""Extra field of an agent loop's output: the token ids to judge, where the response itself has another answer."""
SCORER = "gream_verl.decoding.vllm_processor:TruthScorer"


class Overlong(BaseModel):
    """Options below ``reward.reward_kwargs.rsvr.overlong``, see ``gream_verl.core.rsvr.overlong_penalty``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_length: int = Field(ge=1)
    buffer: int = Field(ge=1)
    factor: float = Field(default=1.0, ge=0)


class RsvrOptions(BaseModel):
    """Options below ``reward.reward_kwargs.rsvr``.

    Attributes:
        format: ``strict`` or ``reference``, see ``gream_verl.core.rsvr``.
        mode: Mode of rows whose ``extra_info.type`` is neither ``reasoning`` nor ``direct``.
        index_file: ``<D>.index.json``; without it every well-formed answer is a ``valid_item``.
        base_levels: Levels that every SID has, for runs without ``index_file``.
        require_valid_item: Pay nothing for an answer that is no item.
        binary: Pay exact answers only, an ablation.
        overlong: Penalty of long responses; filter groups by ``reward`` then, because ``match`` does not have it.
        expected: Pay the chain by expected RSVR and train on the true answer, see ``plugin.agent_loop``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Format = "strict"
    mode: Mode = "reasoning"
    index_file: str | None = None
    base_levels: int | None = Field(default=None, ge=1, le=25)
    require_valid_item: bool = False
    binary: bool = False
    overlong: Overlong | None = None
    expected: bool = False

    @classmethod
    def from_config(cls, config: DictConfig) -> RsvrOptions:
        """Return the options in the whole configuration of a run; refuse keys that would have no effect."""
        refuse_unread_keys(config)
        options = checked_options(cls, OPTIONS, OmegaConf.select(config, OPTIONS))
        custom = OmegaConf.select(config, f"{CUSTOM}.path")
        if options.require_valid_item and options.index_file is None:
            raise InputError(f"{OPTIONS}.require_valid_item: needs {OPTIONS}.index_file")
        if custom and options.binary:
            raise InputError(f"{OPTIONS}.binary: has no effect with {CUSTOM}; leave one of them out")
        if not custom and OmegaConf.select(config, "reward.reward_model.enable"):
            raise InputError(f"reward.reward_model.enable: verl asks it instead of rsvr; combine them in a {CUSTOM}")
        bgae = OmegaConf.select(config, "algorithm.bgae") or {}
        if options.expected:
            refuse_sampled_settings(config)
        elif bgae.get("expected"):
            raise InputError(f"algorithm.bgae.expected: needs {OPTIONS}.expected=true; set both, or neither")
        elif options.overlong and 1 - options.overlong.factor < bgae.get("success", 0) and bgae.get("weight"):
            raise InputError(
                f"{OPTIONS}.overlong.factor: a long exact hit is paid {1 - options.overlong.factor:g}, which is no hit "
                "for algorithm.bgae.success; take a factor below 0.05 and a success just above 0.95"
            )
        for name in ("overlong_buffer_cfg", "max_resp_len"):
            if OmegaConf.select(config, f"reward.reward_kwargs.{name}") is not None:
                raise InputError(f"reward.reward_kwargs.{name}: rsvr does not read it; set {OPTIONS}.overlong instead")
        return options

    def mode_of(self, extra_info: Mapping[str, Any]) -> Mode:
        """Return the mode of a row."""
        return extra_info["type"] if extra_info.get("type") in get_args(Mode) else self.mode

    def score(self, response: str, truth: SemanticId, extra_info: Mapping[str, Any], index: ItemIndex | None) -> Reward:
        """Return the reward of one response; see ``score_response``."""
        return score_response(
            response,
            truth,
            mode=self.mode_of(extra_info),
            format=self.format,
            base_levels=self.base_levels,
            index=index,
            require_valid_item=self.require_valid_item,
        )

    def prefix_rewards(self, truth: SemanticId, index: ItemIndex | None) -> np.ndarray:
        """Return the rewards of answers that go wrong after i true tokens, then that of the SID, shape [tokens + 1]."""
        levels = self.base_levels or (index.base_levels if index else len(truth))
        rewards = prefix_matches(truth, min(levels, len(truth)))
        return np.floor(rewards) if self.binary else rewards


def refuse_sampled_settings(config: DictConfig) -> None:
    """Refuse settings under which the probabilities of the true tokens are not those of the reward."""
    engine = "actor_rollout_ref.rollout"
    needed: dict[str, Any] = {
        f"{CUSTOM}.path": None,
        "reward.reward_manager.name": "rsvr",
        f"{engine}.name": "vllm",
        f"{engine}.agent.default_agent_loop": "gream",
        f"{engine}.logprobs_mode": "processed_logprobs",
        f"{engine}.top_p": 1.0,
        f"{engine}.top_k": -1,
        "algorithm.bgae.expected": True,
    }
    processors = f"{engine}.engine_kwargs.vllm.logits_processors"
    checks = [(key, OmegaConf.select(config, key), value) for key, value in needed.items()]
    checks.append((f"{processors}[-1]", (OmegaConf.select(config, processors) or [None])[-1], SCORER))
    for key, found, value in checks:
        if found != value:
            raise InputError(f"{key} is {found}: {OPTIONS}.expected needs {value}; or add the mix-in sampled_reward")


@register("rsvr")
class RsvrRewardManager(RewardManagerBase):
    """Scores one response at a time with RSVR, or with ``reward.custom_reward_function`` where its path is set.

    A row has the SID of its target in ``reward_model.ground_truth``, and may have its mode in ``extra_info.type``.
    """

    def __init__(
        self,
        config: DictConfig,
        tokenizer: Any,
        compute_score: Callable[..., Any] | None = None,
        reward_router_address: str | None = None,
        reward_model_tokenizer: Any = None,
    ) -> None:
        super().__init__(config, tokenizer, compute_score)
        self.options = RsvrOptions.from_config(config)
        self.has_custom_function = bool(OmegaConf.select(config, f"{CUSTOM}.path"))  # verl passes its own without one
        names = {"reward_router_address": reward_router_address, "reward_model_tokenizer": reward_model_tokenizer}
        self.reward_model = names if reward_router_address is not None else {}
        self.index = ItemIndex.load(self.options.index_file) if self.options.index_file else None
        self.text = TokenText(tokenizer)
        if self.index is not None:
            self.text.check(self.index.tokens, self.index.source)

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """Return ``reward_score`` and ``reward_extra_info`` of the last sequence in ``data``."""
        row = data[-1]
        columns = row.non_tensor_batch
        extra_info = columns.get("extra_info") or {}
        label = f"{columns.get('data_source')}: row {extra_info.get('index')}"
        response = row.batch["responses"]
        ids: list[int] = response[: int(row.batch["attention_mask"][-len(response) :].sum())].tolist()
        ids = (columns.get("tool_extra_fields") or {}).get(SAMPLED, ids)
        truth = self.text.ground_truth(columns.get("reward_model"), label)
        reward = self.options.score(self.text.read(ids), truth, extra_info, self.index)
        score = reward.acc if self.options.binary else reward.score
        details = {name: value for name, value in asdict(reward).items() if name != "score"}
        if self.has_custom_function:
            score, more = await self._custom_score(columns, ids, reward)
            details |= more
        if (overlong := self.options.overlong) is not None:
            details["overlong"] = overlong_penalty(len(ids), overlong.max_length, overlong.buffer, overlong.factor)
            score += details["overlong"]
        return {"reward_score": score, "reward_extra_info": details}

    async def _custom_score(
        self, columns: Mapping[str, Any], ids: list[int], reward: Reward
    ) -> tuple[float, dict[str, Any]]:
        """Return score and other values of the user's function, which gets the arguments of verl's own managers."""
        end = self.tokenizer.eos_token_id
        arguments = {
            "data_source": columns.get("data_source"),
            # Unlike in verl's managers, special tokens stay: semantic IDs may be some.
            "solution_str": self.tokenizer.decode(ids[:-1] if ids[-1:] == [end] else ids, skip_special_tokens=False),
            "ground_truth": columns["reward_model"]["ground_truth"],
            "extra_info": {
                **(columns.get("extra_info") or {}),
                **(columns.get("tool_extra_fields") or {}),
                "num_turns": columns.get("__num_turns__"),
                "rollout_reward_scores": columns.get("reward_scores", {}),
                "rsvr": asdict(reward),
            },
            **self.reward_model,
        }
        if inspect.iscoroutinefunction(self.compute_score):
            result = await self.compute_score(**arguments)
        else:
            result = await self.loop.run_in_executor(None, partial(self.compute_score, **arguments))
        values = dict(result) if isinstance(result, Mapping) else {"score": result}
        try:
            score = float(values.pop("score"))
        except (KeyError, TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):
            raise InputError(f"{CUSTOM}: returned {result!r}; expected a number, or a dictionary with one as 'score'")
        return score, values
