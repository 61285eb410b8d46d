"""The reward as verl's own ``load_reward_manager`` makes it, custom functions and classes included."""

from __future__ import annotations

import copy
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import verl  # noqa: F401  loads the plugin
from assets import make_index, make_tokenizer, reasoning_response
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from transformers import AutoTokenizer
from verl import DataProto
from verl.trainer.ppo.reward import load_reward_manager
from verl.utils.ray_utils import get_event_loop

from gream_verl.core.errors import InputError

INDEX = make_index()
TRUTH, CLOSE = INDEX.text("23"), INDEX.text("20")
NO_ITEM = "".join(INDEX.sids["23"][:3])
DETAILS = {"acc": 1.0, "format": 1.0, "match": 1.0, "depth": 4.0, "valid_item": 1.0}
EXPECTED = ("reward.reward_kwargs.rsvr.expected=true",)
PAGE = (Path(__file__).parents[4] / "docs/reward.md").read_text()


@cache
def recipe() -> DictConfig:
    with initialize_config_module("verl.trainer.config", version_base=None):
        return compose("ppo_trainer", ["+recipe=[gream_srpo_cpu,sampled_reward]"])


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Return a run folder with a tokenizer and an index."""
    folder = tmp_path_factory.mktemp("run")
    make_tokenizer(["likes Alien."], INDEX).save_pretrained(folder / "sft")
    (folder / "data").mkdir()
    INDEX.save(folder / "data/tiny.index.json")
    return folder


@pytest.fixture(scope="module")
def tokenizer(run):
    return AutoTokenizer.from_pretrained(run / "sft")


@pytest.fixture
def make_manager(run, tokenizer, tmp_path, monkeypatch):
    """Return a function from overrides to the reward manager that verl loads; the working directory is empty."""
    monkeypatch.chdir(tmp_path)

    def make(*overrides: str, **options: str) -> Any:
        config = copy.deepcopy(recipe())
        parsed = OverridesParser.create().parse_overrides([f"gream.run={run}", "gream.dataset=tiny", *overrides])
        for override in parsed:
            known = OmegaConf.select(config, override.key_or_group, default=parsed) is not parsed
            assert known or override.is_add(), f"hydra wants a + before {override.key_or_group}"
            OmegaConf.update(config, override.key_or_group, override.value(), force_add=True)
        return load_reward_manager(config, tokenizer, **options)

    return make


def row(tokenizer, response: str, *, ends: int = 1, truth: object = TRUTH, **extra_info) -> DataProto:
    ids = tokenizer.encode(response, add_special_tokens=False) + [tokenizer.eos_token_id] * ends
    columns = {
        "data_source": "tiny",
        "reward_model": {"style": "rule", "ground_truth": truth},
        "extra_info": {"index": 7, **extra_info},
        "tool_extra_fields": {"turn_scores": []},
        "__num_turns__": 2,
    }
    return DataProto(
        batch=TensorDict(
            {
                "responses": torch.tensor([ids + [tokenizer.pad_token_id] * 5]),
                "attention_mask": torch.tensor([[1, 1] + [1] * len(ids) + [0] * 5]),
            },
            batch_size=1,
        ),
        non_tensor_batch={name: np.array([value, None], dtype=object)[:1] for name, value in columns.items()},
    )


def score(manager, data: DataProto) -> dict:
    return get_event_loop().run_until_complete(manager.run_single(data))


def test_rsvr_pays_a_well_formed_hit_and_reports_every_key(make_manager, tokenizer):
    manager = make_manager()
    result = score(manager, row(tokenizer, reasoning_response(TRUTH), type="reasoning"))
    assert result == {"reward_score": 1.0, "reward_extra_info": DETAILS}
    for response, options, expected in (
        (TRUTH, {"type": "direct"}, 1),
        (TRUTH, {"type": "reasoning"}, 0),
        (TRUTH, {"type": "SeqRec"}, 0),  # the mode of the run
        (NO_ITEM, {"type": "direct"}, 0.95),
        ("<|im_start|>" + TRUTH, {"type": "direct"}, 0),  # special tokens stay visible
        (TRUTH, {"type": "direct", "ends": 0}, 1),
        (TRUTH, {"type": "direct", "ends": 2}, 0),
        ("", {"ends": 0}, 0),
        ("", {"ends": 1}, 0),
    ):
        assert score(manager, row(tokenizer, response, **options))["reward_score"] == expected, (response, options)
    only_padding = row(tokenizer, TRUTH, type="direct")
    only_padding.batch["attention_mask"][:, 2:] = 0
    assert score(manager, only_padding)["reward_score"] == 0


@pytest.mark.parametrize("truth", [None, 3, "", "<|a_1|><|b_99|>"])
def test_a_truth_that_no_response_can_hold_is_named(make_manager, tokenizer, truth):
    with pytest.raises(InputError, match=r"tiny: row 7: (reward_model\.ground_truth is|<\|b_99\|> is not one token)"):
        score(make_manager(), row(tokenizer, TRUTH, truth=truth))


def test_binary_pays_exact_answers_only_and_the_mode_is_an_option(make_manager, tokenizer):
    manager = make_manager("+reward.reward_kwargs.rsvr.binary=true", "reward.reward_kwargs.rsvr.mode=direct")
    assert score(manager, row(tokenizer, TRUTH))["reward_score"] == 1
    result = score(manager, row(tokenizer, CLOSE))
    assert result["reward_score"] == 0
    assert result["reward_extra_info"]["match"] > 0


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward.reward_kwargs.rsvr.format=loose"], r"reward\.reward_kwargs\.rsvr\.format"),
        (["+reward.reward_kwargs.rsvr.strict=true"], r"reward\.reward_kwargs\.rsvr\.strict"),
        (["+reward.reward_kwargs.rsvr.overlong={max_length:8}"], r"rsvr\.overlong\.buffer: Field required"),
        (["gream.index=nowhere.json"], "nowhere.json: no such file"),
        (["gream.index=null", "reward.reward_kwargs.rsvr.require_valid_item=true"], "needs .*index_file"),
        (["reward.reward_model.enable=true", "reward.reward_model.model_path=${gream.model}"], "reward_model.enable"),
        (
            ["+reward.reward_kwargs.rsvr.binary=true", "reward.custom_reward_function.path=${gream.run}/mine.py"],
            "binary: has no effect with reward.custom_reward_function",
        ),
        (["+reward.reward_kwargs.overlong_buffer_cfg.enable=true"], r"set reward\.reward_kwargs\.rsvr\.overlong"),
        (["custom_reward_function.path=mine.py"], r"path: .*set reward\.custom_reward_function\.path"),
        (["reward_model.reward_manager=dapo"], r"reward_manager: .*set reward\.reward_manager\.name"),
        (["+reward_model.reward_kwargs.max_resp_len=9"], r"reward_kwargs: .*set reward\.reward_kwargs"),
        (["reward_model.model.path=x"], r"reward_model\.model: .*set reward\.reward_model\.model_path"),
        (["sandbox_fusion.url=x"], r"sandbox_fusion\.url: .*set reward\.sandbox_fusion\.url"),
        (
            ["+reward.reward_kwargs.rsvr.overlong={max_length:9,buffer:3,factor:0.04}"],
            r"overlong\.factor: a long exact hit is paid 0\.96, which is no hit for algorithm\.bgae\.success",
        ),
        ([*EXPECTED, "reward.custom_reward_function.path=${gream.run}/mine.py"], r"path is .*mine\.py: .* needs None"),
        ([*EXPECTED, "actor_rollout_ref.rollout.top_p=0.9"], r"top_p is 0\.9: .*expected needs 1\.0"),
        (
            [*EXPECTED, "actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent"],
            "default_agent_loop is tool_agent",
        ),
        ([*EXPECTED, "algorithm.bgae.expected=false"], r"algorithm\.bgae\.expected is False: .* needs True"),
        (
            [*EXPECTED, "actor_rollout_ref.rollout.engine_kwargs.vllm.logits_processors=[x:Y]"],
            r"logits_processors\[-1\] is x:Y: .* needs gream_verl\.decoding\.vllm_processor:TruthScorer",
        ),
        (["data.reward_fn_key=source"], r"data\.reward_fn_key: .*name the column data_source"),
    ],
)
def test_options_that_are_wrong_or_would_be_ignored_are_named(make_manager, run, overrides, message):
    (run / "mine.py").write_text("def compute_score(**_): return 1")
    with pytest.raises(InputError, match=message):
        make_manager(*overrides)


def test_what_is_refused_is_what_verls_own_migration_would_move(run):
    """The day verl reads these keys again, or moves others, this fails."""
    import inspect

    from verl.experimental.reward_loop import migrate_legacy_reward_impl
    from verl.trainer import main_ppo

    from gream_verl.plugin.unread_keys import LEGACY_NODES

    moved = set(re.findall(r"del config\.(\w+)", inspect.getsource(migrate_legacy_reward_impl)))
    assert moved == set(LEGACY_NODES)
    assert "migrate_legacy" not in inspect.getsource(main_ppo)


def custom(make_manager, source: str, *overrides: str, **options: str):
    Path("mine.py").write_text(source)
    return make_manager("reward.custom_reward_function.path=mine.py", *overrides, **options)


def test_a_custom_function_gets_verls_arguments_and_decides_the_score(make_manager, tokenizer):
    manager = custom(
        make_manager,
        "def judge(**arguments):\n    seen.append(arguments)\n    return 0.25\nseen = []\n",
        "reward.custom_reward_function.name=judge",
        "+reward.custom_reward_function.reward_kwargs.scale=3",
        "+reward.reward_kwargs.rsvr.overlong={max_length:1,buffer:1,factor:0}",
    )
    response = reasoning_response(TRUTH) + " \u00e9\u732b"  # letters of several tokens
    result = score(manager, row(tokenizer, response, user="u"))
    assert result == {"reward_score": 0.25, "reward_extra_info": {**DETAILS, "acc": 0, "format": 0, "overlong": 0}}
    (arguments,) = manager.compute_score.args[0].__globals__["seen"]
    extra_info = arguments.pop("extra_info")
    assert arguments == {"data_source": "tiny", "solution_str": response, "ground_truth": TRUTH, "scale": 3}
    assert extra_info.pop("rsvr") == {**DETAILS, "score": 0, "acc": 0, "format": 0}
    assert extra_info == {"index": 7, "user": "u", "turn_scores": [], "num_turns": 2, "rollout_reward_scores": {}}


@pytest.mark.parametrize("keyword", ["def", "async def"])
def test_a_dictionary_is_logged_with_rsvrs_parts_which_it_may_replace(make_manager, tokenizer, keyword):
    manager = custom(
        make_manager, f"{keyword} compute_score(**_):\n    return {{'score': -2, 'acc': 0.5, 'words': 9}}\n"
    )
    result = score(manager, row(tokenizer, reasoning_response(TRUTH)))
    assert result == {"reward_score": -2.0, "reward_extra_info": {**DETAILS, "acc": 0.5, "words": 9}}


@pytest.mark.parametrize("returned", ["None", "{'reward': 1}", "float('nan')"])
def test_a_custom_function_that_returns_no_number_is_named(make_manager, tokenizer, returned):
    manager = custom(make_manager, f"def compute_score(**_): return {returned}")
    with pytest.raises(InputError, match=r"reward\.custom_reward_function: returned .*; expected a number"):
        score(manager, row(tokenizer, TRUTH))


def test_a_reward_model_is_reached_by_the_custom_function(make_manager, tokenizer):
    source = "def compute_score(reward_router_address, **_): return len(reward_router_address)"
    manager = custom(make_manager, source, "reward.reward_model.enable=true", reward_router_address="host:1")
    assert score(manager, row(tokenizer, TRUTH))["reward_score"] == len("host:1")


def test_verls_reward_worker_starts_with_it(make_manager, tokenizer):
    from verl.experimental.reward_loop import RewardLoopWorker

    worker = RewardLoopWorker(custom(make_manager, "async def compute_score(**_): return 3").config)
    (result,) = get_event_loop().run_until_complete(worker.compute_score_batch(row(tokenizer, TRUTH)))
    assert result["reward_score"] == 3


def examples() -> dict[str, tuple[str, list[str]]]:
    """Return the code and the overrides of every command of the page, by the name of its file, "" for none."""
    found, block = {}, ("", "")
    part = r"```python\n# (\S+)\n(.*?)```|^    python -m verl\.trainer\.main_ppo ([^\n]*)$"
    for name, code, command in re.findall(part, PAGE.replace("\\\n", ""), re.MULTILINE | re.DOTALL):
        block = block if command else (name, code)
        if command:
            base, *overrides = shlex.split(command)
            assert base == "+recipe=[gream_srpo_cpu,sampled_reward]"
            found[block[0]] = block[1], overrides
    return found


EXAMPLES = examples()


@pytest.mark.parametrize(
    ("name", "response", "reward", "detail"),
    [
        ("", reasoning_response(TRUTH), 1, {"overlong": 0}),
        ("", reasoning_response(NO_ITEM), 0, {"valid_item": 0}),
        ("", "<think>" + "x" * 126, -0.04, {"format": 0}),
        ("my_reward.py", f"no tags {TRUTH}", 1, {"format": 0}),
        ("my_reward.py", reasoning_response(CLOSE), 0, {"format": 1}),
        ("with_bonus.py", reasoning_response(TRUTH), 1, {"bonus": 0}),
        ("with_bonus.py", reasoning_response(TRUTH).replace("likes", "he likes"), 1.02, {"bonus": 0.02}),
        ("two_gates.py", reasoning_response(TRUTH), 1, {}),
        ("two_gates.py", f"x{reasoning_response(TRUTH)}", 0.5, {"format": 0}),
        ("my_manager.py", TRUTH, -0.0005, {"tokens": 5, "acc": 0}),
    ],
)
def test_the_examples_of_the_page_do_what_it_says(make_manager, tokenizer, name, response, reward, detail):
    code, overrides = EXAMPLES[name]
    if name:
        Path(name).write_text(code)
    result = score(make_manager(*overrides), row(tokenizer, response))
    assert result["reward_score"] == pytest.approx(reward)
    assert detail.items() <= result["reward_extra_info"].items()


def test_every_block_of_the_page_is_an_example():
    assert set(EXAMPLES) == {"", *re.findall(r"```python\n# (\S+)", PAGE)}
    assert PAGE.count("```") == 2 * (len(EXAMPLES) - 1)
