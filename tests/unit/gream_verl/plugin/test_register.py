from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch
import verl  # noqa: F401  loads the plugin
from assets import make_index, make_tokenizer, reasoning_response
from omegaconf import OmegaConf
from tensordict import TensorDict
from verl import DataProto
from verl.utils.ray_utils import get_event_loop

import gream_verl.plugin.register
from gream_verl.core.errors import InputError
from gream_verl.core.import_hooks import when_imported
from gream_verl.plugin.register import self_check

INDEX = make_index()
TRUTH = INDEX.text("23")


def run_python(script: str, folder) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=110, check=False, cwd=folder
    )


def test_the_self_check_finds_every_part():
    findings = self_check()
    assert [finding for finding in findings if not finding.ok] == []
    assert {"advantage estimator bgae", "reward manager rsvr", "recipes"} <= {finding.what for finding in findings}


def test_the_self_check_names_what_is_missing(monkeypatch):
    from verl.trainer.ppo import core_algos

    monkeypatch.delitem(core_algos.ADV_ESTIMATOR_REGISTRY, "bgae")
    broken = [finding for finding in self_check() if not finding.ok]
    assert [finding.what for finding in broken] == ["advantage estimator bgae"]
    assert "bgae" in broken[0].detail


def test_registering_costs_little_and_imports_nothing_heavy():
    before = set(sys.modules)
    start = time.perf_counter()
    gream_verl.plugin.register.register()
    assert time.perf_counter() - start < 0.3
    assert not {name for name in set(sys.modules) - before if name.startswith(("verl.", "vllm", "pydantic"))}


def test_import_verl_stays_light(tmp_path):
    script = (
        "import verl, sys\n"
        "heavy = [m for m in ('verl.trainer.ppo.core_algos', 'verl.experimental.reward_loop', 'vllm', 'pydantic',"
        " 'gream_verl.plugin.reward_manager', 'gream_verl.cpu.hf_rollout') if m in sys.modules]\n"
        "assert 'gream_verl.plugin.register' in sys.modules\n"
        "assert not heavy, heavy\n"
    )
    done = run_python(script, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_broken_plugin_is_loud(tmp_path):
    script = (
        "import gream_verl.cpu\n"
        "def broken(): raise RuntimeError('the roof is on fire')\n"
        "gream_verl.cpu.activate = broken\n"
        "import verl\n"
    )
    done = run_python(script, tmp_path)
    assert "the roof is on fire" in done.stderr
    assert "run `gream doctor`" in done.stderr


def test_an_error_in_a_hook_fails_the_import(tmp_path):
    script = (
        "from gream_verl.core.import_hooks import when_imported\n"
        "def fail(module): raise RuntimeError('no ' + module.__name__)\n"
        "when_imported('colorsys', fail)\n"
        "import colorsys\n"
    )
    done = run_python(script, tmp_path)
    assert done.returncode == 1
    assert "no colorsys" in done.stderr


def test_hooks_run_once_after_import_and_at_once_for_what_is_there(tmp_path):
    seen = []
    when_imported("sys", seen.append)
    assert seen == [sys]
    script = (
        "from gream_verl.core.import_hooks import when_imported\n"
        "import sys, inspect\n"
        "seen = []\n"
        "when_imported('colorsys', seen.append)\n"
        "assert not seen\n"
        "import colorsys, importlib\n"
        "assert seen == [colorsys] and colorsys.rgb_to_hsv\n"
        "assert 'def rgb_to_hsv' in inspect.getsource(colorsys)\n"
    )
    done = run_python(script, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(["likes Alien."], INDEX)


def reward_manager(tokenizer, **options):
    from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls

    config = OmegaConf.create({"reward": {"reward_kwargs": {"rsvr": options}}})
    return get_reward_manager_cls("rsvr")(config, tokenizer, None, reward_router_address=None)


def row(tokenizer, response: str, *, ends: int = 1, truth: str = TRUTH, **extra_info) -> DataProto:
    ids = tokenizer.encode(response, add_special_tokens=False) + [tokenizer.eos_token_id] * ends
    responses = torch.tensor([ids + [tokenizer.pad_token_id] * 5])
    mask = torch.tensor([[1, 1] + [1] * len(ids) + [0] * 5])
    return DataProto(
        batch=TensorDict({"responses": responses, "attention_mask": mask}, batch_size=1),
        non_tensor_batch={
            "data_source": _objects("tiny"),
            "reward_model": _objects({"style": "rule", "ground_truth": truth}),
            "extra_info": _objects({"index": 7, **extra_info}),
        },
    )


def _objects(value):
    import numpy as np

    column = np.empty(1, dtype=object)
    column[0] = value
    return column


def score(manager, data: DataProto) -> dict:
    return get_event_loop().run_until_complete(manager.run_single(data))


def test_the_reward_manager_pays_a_well_formed_hit_and_reports_every_key(tokenizer):
    result = score(reward_manager(tokenizer), row(tokenizer, reasoning_response(TRUTH), type="reasoning"))
    assert result == {
        "reward_score": 1.0,
        "reward_extra_info": {"acc": 1.0, "format": 1.0, "match": 1.0, "depth": 4.0, "valid_item": 1.0},
    }


def test_the_row_decides_between_direct_and_reasoning(tokenizer):
    manager = reward_manager(tokenizer)
    assert score(manager, row(tokenizer, TRUTH, type="direct"))["reward_score"] == 1
    assert score(manager, row(tokenizer, TRUTH, type="reasoning"))["reward_score"] == 0
    assert score(manager, row(tokenizer, TRUTH))["reward_score"] == 0
    assert score(reward_manager(tokenizer, mode="direct"), row(tokenizer, TRUTH))["reward_score"] == 1


def test_one_end_token_is_dropped_and_other_special_tokens_stay_visible(tokenizer):
    manager = reward_manager(tokenizer)
    assert score(manager, row(tokenizer, TRUTH, ends=0, type="direct"))["reward_score"] == 1
    assert score(manager, row(tokenizer, TRUTH, ends=2, type="direct"))["reward_score"] == 0
    assert score(manager, row(tokenizer, "<|im_start|>" + TRUTH, type="direct"))["reward_score"] == 0


def test_the_index_is_read_and_can_be_part_of_the_gate(tokenizer, tmp_path):
    INDEX.save(tmp_path / "index.json")
    no_item = "".join(INDEX.sids["23"][:3])
    free = reward_manager(tokenizer, index_file=str(tmp_path / "index.json"))
    result = score(free, row(tokenizer, no_item, type="direct"))
    assert result["reward_score"] == 0.95
    assert result["reward_extra_info"]["valid_item"] == 0
    gated = reward_manager(tokenizer, index_file=str(tmp_path / "index.json"), require_valid_item=True)
    assert score(gated, row(tokenizer, no_item, type="direct"))["reward_score"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "loose"}, r"reward\.reward_kwargs\.rsvr\.format"),
        ({"strict": True}, r"reward\.reward_kwargs\.rsvr\.strict"),
        ({"require_valid_item": True}, "require_valid_item needs index_file"),
        ({"overlong": {"max_length": 8, "buffer": 9}}, r"rsvr\.overlong: .*buffer 9 is longer than max_length 8"),
        ({"overlong": {"max_length": 8}}, r"rsvr\.overlong\.buffer: Field required"),
        ({"index_file": "nowhere.json"}, "nowhere.json: no such file"),
    ],
)
def test_wrong_reward_options_are_named(tokenizer, options, message):
    with pytest.raises(InputError, match=message):
        reward_manager(tokenizer, **options)


def test_a_row_without_a_truth_is_named(tokenizer):
    with pytest.raises(InputError, match=r"tiny: row 7: reward_model\.ground_truth is 'Alien'"):
        score(reward_manager(tokenizer), row(tokenizer, TRUTH, truth="Alien"))


@pytest.mark.parametrize("truth", [None, 3, ""])
def test_a_row_whose_truth_is_no_text_is_named(tokenizer, truth):
    with pytest.raises(InputError, match=r"tiny: row 7: reward_model\.ground_truth is"):
        score(reward_manager(tokenizer), row(tokenizer, TRUTH, truth=truth))


def test_a_truth_that_no_response_can_hold_is_named(tokenizer):
    with pytest.raises(InputError, match=r"tiny: row 7: <\|b_99\|> is not one token of the tokenizer"):
        score(reward_manager(tokenizer), row(tokenizer, TRUTH, truth="<|a_1|><|b_99|>"))


def test_responses_without_a_token_are_scored(tokenizer):
    manager = reward_manager(tokenizer)
    for ends in (0, 1):
        assert score(manager, row(tokenizer, "", ends=ends))["reward_score"] == 0
    only_padding = row(tokenizer, TRUTH, type="direct")
    only_padding.batch["attention_mask"][:, 2:] = 0
    assert score(manager, only_padding)["reward_score"] == 0


def test_a_row_of_another_type_leaves_the_mode_to_the_option(tokenizer):
    assert score(reward_manager(tokenizer, mode="direct"), row(tokenizer, TRUTH, type="SeqRec"))["reward_score"] == 1


def test_long_responses_lose_what_the_option_says(tokenizer):
    response = reasoning_response(TRUTH)
    length = len(tokenizer.encode(response, add_special_tokens=False)) + 1
    manager = reward_manager(tokenizer, overlong={"max_length": length + 1, "buffer": 4, "factor": 0.5})
    result = score(manager, row(tokenizer, response))
    assert result["reward_extra_info"]["overlong"] == pytest.approx(-0.5 * 3 / 4)
    assert result["reward_score"] == pytest.approx(1 - 0.5 * 3 / 4)
    assert result["reward_extra_info"]["acc"] == 1


def test_binary_pays_exact_answers_only(tokenizer):
    manager = reward_manager(tokenizer, binary=True)
    close = "".join(INDEX.sids["22"])
    assert score(manager, row(tokenizer, TRUTH, type="direct"))["reward_score"] == 1
    result = score(manager, row(tokenizer, close, type="direct"))
    assert (result["reward_score"], result["reward_extra_info"]["match"]) == (0, pytest.approx(0.75**0.5))
