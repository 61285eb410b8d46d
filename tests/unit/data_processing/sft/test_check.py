"""`gream sft check`, with a real tiny model and LLaMA-Factory's own parser and templates."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from llamafactory.data.template import TEMPLATES
from sft_run import ROWS, make_sft_run, sft_arguments
from typer.testing import CliRunner

from data_processing.sft.check import FORBIDDEN, check_config, key_problems, read_rows
from gream_verl.cli.main import app
from gream_verl.core.errors import InputError
from gream_verl.core.files import write_json
from gream_verl.model.lora import write_adapter

SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (  # of Llama 3.1 and later, without the date
    "{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    make_sft_run(folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(autouse=True)
def templates(monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaMA-Factory writes `default_system` into its templates, which all tests of this process share."""
    monkeypatch.setattr(TEMPLATES["smollm2"], "default_system", TEMPLATES["smollm2"].default_system)


def check(folder: Path, *overrides: str) -> tuple[dict[str, dict[str, int]], list[str]]:
    config, *given = sft_arguments(folder, *overrides)
    return check_config(Path(config), given)


def problem(folder: Path, *overrides: str) -> str:
    _, problems = check(folder, *overrides)
    assert len(problems) == 1, problems
    return problems[0]


def edit_mix(folder: Path, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    path = folder / "data" / "small-mix.parquet"
    change(pl.read_parquet(path)).write_parquet(path)


def test_a_good_config_has_no_problem_and_its_tokens_are_llama_factorys(made: Path) -> None:
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments
    from transformers import AutoTokenizer

    tasks, problems = check(made, "eval_dataset=small-mix-eval-seqrec,small-mix-eval-reasoning")
    assert problems == []
    assert {task: counts["rows"] for task, counts in tasks.items()} == ROWS
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template="qwen3_nothink"))
    lengths: dict[str, list[int]] = {task: [] for task in ROWS}
    for row in read_rows(made / "data" / "small-mix.parquet"):
        turns = [{"role": "user", "content": row.user}, {"role": "assistant", "content": row.assistant}]
        [(prompt, response)] = template.encode_multiturn(tokenizer, turns, row.system)
        lengths[row.task].append(len(prompt) + len(response))
    for task, counts in tasks.items():
        assert (counts["tokens"], counts["longest"]) == (sum(lengths[task]), max(lengths[task]))
    assert check(made, "max_samples=5")[0] != tasks


@pytest.mark.parametrize(
    "keys",
    [
        *({key: True} for key in FORBIDDEN),
        {"disable_shuffling": False},
        {"mix_strategy": "interleave_under"},
        {"val_size": 0.1},
        {"tokenized_path": "old"},
    ],
)
def test_keys_that_break_order_or_vocabulary(keys: dict[str, object]) -> None:
    [sentence] = key_problems({"disable_shuffling": True, **keys})
    assert f"`{next(iter(keys))}" in sentence
    assert not list(
        key_problems({"disable_shuffling": True, "packing": False, "val_size": 0, "mix_strategy": "concat"})
    )


def test_rows_without_a_curriculum_may_be_packed_and_shuffled(folder: Path) -> None:
    free = ("packing=true", "neat_packing=true", "disable_shuffling=false")
    assert "or `neat_packing` is" in problem(folder, *free)
    assert "or `neat_packing` is" in problem(folder, "neat_packing=true")
    edit_mix(folder, lambda rows: rows.filter(pl.col("task") != "reasoning"))
    assert check(folder, *free)[1] == []


def test_all_problems_are_found_at_once(made: Path) -> None:
    _, problems = check(made, "disable_shuffling=false", "cutoff_len=20")
    assert "disable_shuffling" in problems[0]
    assert "62 rows are longer than `cutoff_len: 20`" in problems[1]
    assert "--longest 20" in problems[1]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("dataset=other", "no entry 'other' as `gream data mix` writes it"),
        ("eval_dataset=other", "no entry 'other'"),
        ("dataset=", "has no `dataset`"),
        ("cutoff_len=abc", "invalid literal"),
        ("model_name_or_path=nowhere", "nowhere"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused(made: Path, override: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        check(made, override)


def test_a_config_that_is_no_yaml_is_refused(tmp_path: Path) -> None:
    for text in ("a: [1,\nb: {", "- a list"):
        (tmp_path / "torn.yaml").write_text(text)
        with pytest.raises(InputError, match=r"torn\.yaml: "):
            check_config(tmp_path / "torn.yaml")


@pytest.mark.parametrize(
    "change", [{"columns": {"messages": "conversations"}}, {"num_samples": 3}, {"file_name": None}]
)
def test_rows_must_be_read_as_they_were_written(folder: Path, change: dict[str, object]) -> None:
    info = folder / "data" / "dataset_info.json"
    given = json.loads(info.read_text())
    write_json(info, {"small-mix": {**given["small-mix"], **change}})
    with pytest.raises(InputError, match="no entry 'small-mix' as"):
        check(folder)


def test_a_torn_or_foreign_file_is_refused(folder: Path) -> None:
    mix = folder / "data" / "small-mix.parquet"
    whole = mix.read_bytes()
    turns = pl.col("conversations").list
    edit_mix(folder, lambda rows: rows.with_columns(turns.head(1).alias("conversations")))
    short = mix.read_bytes()
    for content in (short, whole[:-100], b""):
        mix.write_bytes(content)
        with pytest.raises(InputError, match=r"small-mix\.parquet: not a whole SFT file"):
            check(folder)


def test_sid_tokens_must_be_single_ordinary_tokens(folder: Path) -> None:
    tokenizer = folder / "model" / "tokenizer.json"
    given = json.loads(tokenizer.read_text())
    for added in given["added_tokens"]:
        added["special"] = added["special"] or added["content"] == "<|a_1|>"
    tokenizer.write_text(json.dumps(given))
    assert "SID tokens, such as <|a_1|>, are not one ordinary token of" in problem(folder)
    # In the vocabulary, but no added token: the pre-tokenizer splits it before it is looked up.
    [number] = [added["id"] for added in given["added_tokens"] if added["content"] == "<|a_1|>"]
    given["added_tokens"] = [added for added in given["added_tokens"] if added["content"] != "<|a_1|>"]
    given["model"]["vocab"]["<|a_1|>"] = number
    tokenizer.write_text(json.dumps(given))
    assert "such as <|a_1|>, are not one ordinary token" in problem(folder)


def test_a_control_token_in_a_text(folder: Path) -> None:
    def end_early(frame: pl.DataFrame) -> pl.DataFrame:
        rows = frame.to_dicts()
        rows[3]["conversations"][0]["value"] += " by <|im_end|>"
        return pl.DataFrame(rows, schema=frame.schema)

    edit_mix(folder, end_early)
    assert "1 rows hold a control token of the tokenizer, such as <|im_end|> in '" in problem(folder)


def test_a_sid_token_of_another_index(folder: Path) -> None:
    other = [{"from": "human", "value": "What is <|a_77|><|b_1|><|c_1|>?"}, {"from": "gpt", "value": "Unknown."}]
    edit_mix(folder, lambda mix: mix.vstack(mix[:1].with_columns(pl.Series("conversations", [other]))))
    assert "such as <|a_77|>, are not one ordinary token" in problem(folder)


def test_the_full_stop_of_smollm2(folder: Path) -> None:
    (folder / "model" / "chat_template.jinja").write_text(SMOLLM2)
    assert ".<|im_end|>" in problem(folder, "template=smollm2")
    system = "default_system=You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert check(folder, "template=smollm2", system)[1] == []


def test_the_template_of_llama_3(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"})
    tokenizer.add_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"], special_tokens=True)
    tokenizer.chat_template = LLAMA3
    tokenizer.save_pretrained(folder / "model")
    assert check(folder, "template=llama3")[1] == []
    dated = "<|eot_id|>{% endfor %}", "<|eot_id|>{% endfor %}Today Date: {{ strftime_now('%d %b %Y') }}"
    (folder / "model" / "chat_template.jinja").write_text(LLAMA3.replace(*dated))
    assert "no template of LLaMA-Factory has that" in problem(folder, "template=llama3")


def test_answers_must_be_trained_as_they_are(folder: Path) -> None:
    assert "trains '" in (said := problem(folder, "template=qwen3"))
    assert "<think>" in said
    assert ", qwen3_nothink, " in said  # a remedy for this base, not for another
    assert ", qwen3_nothink, " in problem(folder, "template=llama3")
    with pytest.raises(InputError, match="no_such does not exist"):
        check(folder, "template=no_such")
    (folder / "model" / "chat_template.jinja").unlink()
    with pytest.raises(InputError, match="with a chat template"):
        check(folder)


def test_lora_must_train_the_rows_of_sid_tokens(folder: Path) -> None:
    lora = ["finetuning_type=lora", "lora_rank=4"]
    assert "`finetuning_type: lora` leaves embedding rows" in problem(folder, *lora)
    assert "`finetuning_type: freeze` leaves embedding rows" in problem(folder, "finetuning_type=freeze")
    adapter = folder / "adapter"
    write_adapter(folder / "model", folder / "data" / "small.index.json", adapter, rank=4, alpha=8)
    lora.append(f"adapter_name_or_path={adapter}")
    assert check(folder, *lora)[1] == []
    given = json.loads((adapter / "adapter_config.json").read_text())
    write_json(adapter / "adapter_config.json", {**given, "trainable_token_indices": None})
    assert "leaves embedding rows" in problem(folder, *lora)


def test_checkpoints_that_are_torn_or_of_another_training(folder: Path) -> None:
    state = folder / "sft" / "checkpoint-8" / "trainer_state.json"
    write_json(state, {"global_step": 8, "train_batch_size": 16})
    assert check(folder)[1] == []
    assert "checkpoint-8: is of other data or batches" in problem(folder, "per_device_train_batch_size=8")
    os.utime(state, (0, 0))
    assert "checkpoint-8: is of other data or batches" in problem(folder)
    assert check(folder, "overwrite_output_dir=true")[1] == []
    state.with_name("trainer_state.json").write_text("{")
    assert "checkpoint-8: is torn; delete it" in problem(folder)


def test_the_command_ends_in_one_line_per_problem(made: Path) -> None:
    result = CliRunner().invoke(app, ["sft", "check", *sft_arguments(made)])
    assert result.exit_code == 0, result.output
    assert result.output.rstrip().endswith("OK")
    result = CliRunner().invoke(app, ["sft", "check", *sft_arguments(made, "packing=true", "cutoff_len=20")])
    assert isinstance(result.exception, InputError)
    assert str(result.exception).count("\n  ") == 2
