"""`gream sft check`, with real tiny models and LLaMA-Factory's own parser and templates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from llamafactory.data.template import TEMPLATES
from rich.filesize import decimal
from safetensors.torch import load_file, save_file
from sft_run import ROWS, make_sft_run, sft_arguments
from typer.testing import CliRunner

from data_processing.sft.check import Findings, check_config, key_problems
from data_processing.sft.config import SftConfig
from data_processing.sft.rows import read_rows
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
THINKING = (  # as Qwen3-4B renders answers: a thought before each
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
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


def check(folder: Path, *overrides: str) -> Findings:
    config, *given = sft_arguments(folder, *overrides)
    return check_config(SftConfig.read(Path(config), given))


def problem(folder: Path, *overrides: str) -> str:
    problems = check(folder, *overrides).problems
    assert len(problems) == 1, problems
    return problems[0]


def edit_mix(folder: Path, change: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    path = folder / "data" / "small-mix.parquet"
    change(pl.read_parquet(path)).write_parquet(path)


def test_a_good_config_is_told_what_it_will_train(made: Path) -> None:
    from llamafactory.data.template import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments
    from transformers import AutoTokenizer

    found = check(made)
    assert found.problems == []
    assert {task: counts["rows"] for task, counts in found.tasks.items()} == ROWS
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template="qwen3_nothink"))
    lengths: dict[str, list[int]] = {task: [] for task in ROWS}
    for task, system, user, assistant in read_rows(made / "data" / "small-mix.parquet").iter_rows():
        turns = [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
        [(prompt, response)] = template.encode_multiturn(tokenizer, turns, system)
        lengths[task].append(len(prompt) + len(response))
    for task, counts in found.tasks.items():
        assert (counts["tokens"], counts["longest"]) == (sum(lengths[task]), max(lengths[task]))
        assert counts["supervised"] == counts["tokens"]  # tiny_cpu.yaml trains prompts, too
    steps = -(-sum(ROWS.values()) // 32)
    assert found.facts["steps"] == f"{steps}, {steps} an epoch"
    assert check(made, "train_on_prompt=false").tasks["seqrec"]["supervised"] < found.tasks["seqrec"]["supervised"]


def test_steps_are_those_of_all_processes(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NPROC_PER_NODE", "4")
    monkeypatch.setenv("NNODES", "2")
    settings = ("per_device_train_batch_size=2", "gradient_accumulation_steps=1", "num_train_epochs=3")
    assert check(made, *settings).facts["rows a step"] == "2"  # no torchrun, one process
    monkeypatch.setenv("FORCE_TORCHRUN", "1")
    facts = check(made, *settings).facts
    assert facts["rows a step"] == "16"
    assert facts["steps"] == "12, 4 an epoch"
    assert check(made, *settings, "max_samples=5").facts["steps"] == "3, 1 an epoch"
    assert "splits it at its blanks" in problem(made, "run_name=my run")
    monkeypatch.setenv("NNODES", "two")
    assert "expected whole numbers" in problem(made)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"disable_shuffling": False}, "order would be lost"),
        ({"packing": True}, "packing"),
        ({"neat_packing": True}, "packing"),
        ({"streaming": True}, "buffer_size: 1"),
        ({"mix_strategy": "interleave_under"}, "drops or repeats rows"),
        ({"val_size": 0.1}, "eval_dataset"),
        ({"ignore_data_skip": True}, "first row again"),
        ({"dataloader_drop_last": True}, "last rows"),
        ({"auto_find_batch_size": True}, "--block"),
        ({"tokenized_path": "old"}, "tokenized_path"),
        ({"resize_vocab": True}, "gream model extend"),
        ({"add_tokens": "<|a_1|>"}, "gream model extend"),
        ({"add_special_tokens": "<|a_1|>"}, "gream model extend"),
    ],
)
def test_keys_that_break_order_or_vocabulary(keys: dict[str, object], said: str) -> None:
    [sentence] = key_problems({"disable_shuffling": True, **keys})
    assert said in sentence
    assert key_problems({"disable_shuffling": True, "streaming": True, "buffer_size": 1}) == []


def test_a_config_for_gpus_is_read_where_there_is_none(made: Path) -> None:
    stage = Path(__file__).parents[4] / "sft_configs" / "deepspeed_zero2.json"
    gpu = ("use_cpu=false", "bf16=true", "flash_attn=fa2", "tf32=true", f"deepspeed={stage}")
    found = check(made, *gpu)
    assert found.problems == []
    assert "Not tried here: deepspeed, tf32" in found.remarks[-1]
    assert "has no zero_optimization.stage" in problem(made, *gpu, f"deepspeed={made / 'data' / 'dataset_info.json'}")


def test_all_problems_are_told_at_once(made: Path) -> None:
    found = check(made, "no_such_key=1", "disable_shuffling=false", "model_name_or_path=nowhere")
    assert ["disable_shuffling" in found.problems[0], "no_such_key" in found.problems[1]] == [True, True]
    assert "nowhere: no weights there" in found.problems[2]
    found = check(made, "disable_shuffling=false", "cutoff_len=20")
    assert "62 rows are longer than `cutoff_len: 20`" in found.problems[1]
    assert "--longest 20" in found.problems[1]


@pytest.mark.parametrize(
    "override",
    [
        "cutoff_len=abc",
        "cutoff_len=",
        "cutoff_len=0",
        "num_train_epochs=abc",
        "num_train_epochs=.inf",
        "max_samples=abc",
        "max_samples=-1",
        "per_device_train_batch_size=0",
        "per_device_train_batch_size=3.5",
        "gradient_accumulation_steps=0",
        "save_steps=0",
        "max_steps=0",
    ],
)
def test_numbers_must_be_numbers(made: Path, override: str) -> None:
    assert override.partition("=")[0] in problem(made, override)


def test_a_no_must_be_quoted(made: Path) -> None:
    assert "quote it" in problem(made, "save_strategy=no")
    assert check(made, "save_strategy='no'").facts["checkpoints"].startswith("at most 0 of ")


def test_a_config_that_is_no_yaml(tmp_path: Path) -> None:
    (tmp_path / "torn.yaml").write_text("a: [1,\nb: {")
    with pytest.raises(InputError, match="cannot be read") as raised:
        SftConfig.read(tmp_path / "torn.yaml")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"columns": {"messages": "conversations"}}, "system turns are dropped"),
        ({"columns": {"messages": "conversations", "system": "system", "tools": "task"}}, "nothing else"),
        ({"num_samples": 3}, "rows drawn at random"),
        ({"file_name": None}, "must have a file_name"),
    ],
)
def test_rows_must_be_read_as_they_were_written(folder: Path, change: dict[str, object], said: str) -> None:
    info = folder / "data" / "dataset_info.json"
    given = json.loads(info.read_text())
    write_json(info, {"small-mix": {**given["small-mix"], **change}})
    assert said in problem(folder)
    write_json(info, {"small-mix": "small-mix.parquet"})
    assert "must have a file_name" in problem(folder)
    write_json(info, [])
    assert "which knows none" in problem(folder)


def test_a_torn_file_and_a_row_of_another_form(folder: Path) -> None:
    turns, chain = pl.col("conversations").list, pl.col("task") == "reasoning"
    edit_mix(folder, lambda mix: mix.with_columns(turns.head(2 - chain.cast(pl.Int64)).alias("conversations")))
    first = pl.read_parquet(folder / "data" / "small-mix.parquet")["task"].to_list().index("reasoning")
    assert f"row {first}: expected a task, and `conversations`" in problem(folder)
    mix = folder / "data" / "small-mix.parquet"
    mix.write_bytes(mix.read_bytes()[:-100])
    assert "small-mix.parquet: not a whole SFT file" in problem(folder)
    mix.unlink()
    assert "small-mix.parquet: no such file" in problem(folder)


def test_sid_tokens_must_be_single_ordinary_tokens_with_a_row(folder: Path) -> None:
    tokenizer = folder / "model" / "tokenizer.json"
    given = json.loads(tokenizer.read_text())
    for added in given["added_tokens"]:
        added["special"] = added["special"] or added["content"] == "<|a_1|>"
    tokenizer.write_text(json.dumps(given))
    assert "1 SID tokens, <|a_1|> among them, are special tokens" in problem(folder)
    # In the vocabulary, but no added token: the pre-tokenizer splits it before it is looked up.
    [number] = [added["id"] for added in given["added_tokens"] if added["content"] == "<|a_1|>"]
    given["added_tokens"] = [added for added in given["added_tokens"] if added["content"] != "<|a_1|>"]
    given["model"]["vocab"]["<|a_1|>"] = number
    tokenizer.write_text(json.dumps(given))
    assert "1 SID tokens, <|a_1|> among them, are not read as one token" in problem(folder)


def test_a_sid_token_of_another_index(folder: Path) -> None:
    other = [{"from": "human", "value": "What is <|a_77|><|b_1|><|c_1|>?"}, {"from": "gpt", "value": "Unknown."}]
    edit_mix(folder, lambda mix: mix.vstack(mix[:1].with_columns(pl.Series("conversations", [other]))))
    assert "<|a_77|> among them, are not in the tokenizer" in problem(folder)


def test_an_embedding_with_too_few_rows(folder: Path) -> None:
    weights = load_file(folder / "model" / "model.safetensors")
    name = "model.embed_tokens.weight"
    save_file({**weights, name: weights[name][:300].clone()}, folder / "model" / "model.safetensors")
    assert "beyond the 300 rows" in problem(folder)
    cut = folder / "model" / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    assert "is cut off" in problem(folder)


def test_the_full_stop_of_smollm2(folder: Path) -> None:
    (folder / "model" / "chat_template.jinja").write_text(SMOLLM2)
    said = problem(folder, "template=smollm2")
    assert "trains other prompts" in said
    assert ".<|im_end|>" in said
    system = "default_system=You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert check(folder, "template=smollm2", system).problems == []


def test_the_template_of_llama_3(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"})
    tokenizer.add_tokens(["<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"], special_tokens=True)
    tokenizer.chat_template = LLAMA3
    tokenizer.save_pretrained(folder / "model")
    assert check(folder, "template=llama3").problems == []
    dated = "<|eot_id|>{% endfor %}", "<|eot_id|>{% endfor %}Today Date: {{ strftime_now('%d %b %Y') }}"
    (folder / "model" / "chat_template.jinja").write_text(LLAMA3.replace(*dated))
    assert "trains other prompts" in problem(folder, "template=llama3")


def test_answers_must_be_trained_as_they_stand(folder: Path) -> None:
    assert "does not train answers as they stand: '<think>" in problem(folder, "template=qwen3")
    assert "adds" in problem(folder, "template=llama3")
    assert "does not exist" in problem(folder, "template=no_such")
    # A chat template that puts a thought before answers does not matter: prompts are what SRPO renders.
    before = check(folder)
    (folder / "model" / "chat_template.jinja").write_text(THINKING)
    after = check(folder)
    assert after.problems == []
    assert after.tasks == before.tasks
    (folder / "model" / "chat_template.jinja").unlink()
    assert "has no chat template" in problem(folder)


def test_lora_must_train_the_rows_of_sid_tokens(folder: Path) -> None:
    lora = ("finetuning_type=lora", "lora_rank=4")
    assert "`finetuning_type: lora` would leave the rows" in problem(folder, *lora)
    assert "`finetuning_type: freeze` would leave the rows" in problem(folder, "finetuning_type=freeze")
    adapter = folder / "adapter"
    write_adapter(folder / "model", folder / "data" / "small.index.json", adapter, rank=4, alpha=8)
    lora = (*lora, f"adapter_name_or_path={adapter}")
    assert check(folder, *lora).problems == []
    deepspeed = Path(__file__).parents[4] / "sft_configs" / "deepspeed_zero3.json"
    assert "ZeRO-3 has the embedding in parts" in problem(folder, *lora, f"deepspeed={deepspeed}")
    given = json.loads((adapter / "adapter_config.json").read_text())
    write_json(adapter / "adapter_config.json", {**given, "trainable_token_indices": None})
    assert "trains no rows of" in problem(folder, *lora)
    shutil.rmtree(adapter)
    assert "gream model adapter" in problem(folder, *lora)


def save_checkpoint(folder: Path, **state: int) -> Path:
    path = folder / "sft" / f"checkpoint-{state['global_step']}"
    path.mkdir(parents=True)
    shutil.copy(folder / "model" / "model.safetensors", path)
    write_json(path / "trainer_state.json", state)
    return path


def test_the_disk_that_checkpoints_take(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = sum(tensor.numel() for tensor in load_file(folder / "model" / "model.safetensors").values())
    four = ("max_steps=4", "save_steps=2", "save_total_limit=5")
    stage = f"deepspeed={Path(__file__).parents[4] / 'sft_configs' / 'deepspeed_zero2.json'}"
    cases: list[tuple[tuple[str, ...], int, int, int]] = [
        (four, 2, 12, 4),
        ((*four, "save_steps=0.25"), 4, 12, 4),
        ((*four, "save_steps=1", "save_total_limit=1"), 2, 12, 4),
        ((*four, "save_strategy=epoch"), 2, 12, 4),
        ((*four, "save_only_model=true"), 2, 4, 4),
        ((*four, stage), 2, 16, 2),
        ((*four, stage.replace("zero2", "zero3")), 2, 14, 2),
    ]
    for settings, count, each, final in cases:
        said = f"at most {count} of {decimal(each * weights)}, and {decimal(final * weights)} in the end, reckoned"
        assert check(folder, *settings).facts["checkpoints"] == said
    # What is there already is not needed once more.
    there = save_checkpoint(folder, global_step=2, max_steps=4, train_batch_size=16)
    kept = sum(path.stat().st_size for path in there.iterdir())
    needed = (2 * 12 + 4) * weights - kept
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    assert check(folder, *four).problems == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    assert "lower save_total_limit" in problem(folder, *four)


def test_checkpoints_that_are_torn_or_of_another_training(folder: Path) -> None:
    save_checkpoint(folder, global_step=8, max_steps=20, train_batch_size=16)
    (folder / "sft" / "checkpoint-16").mkdir()
    assert "checkpoint-16: a stop has torn it; delete it" in problem(folder, "max_steps=20")
    shutil.rmtree(folder / "sft" / "checkpoint-16")
    found = check(folder, "max_steps=20")
    assert (found.problems, "go on from step 8" in found.remarks[-1]) == ([], True)
    assert "another training (max_steps 20 instead of 30)" in problem(folder, "max_steps=30")
    assert "train_batch_size 16 instead of 8" in problem(folder, "max_steps=20", "per_device_train_batch_size=8")
    save_checkpoint(folder, global_step=20, max_steps=20, train_batch_size=16)
    assert "ends this training already" in problem(folder, "max_steps=20")
    assert check(folder, "max_steps=30", "overwrite_output_dir=true").problems == []
    shutil.rmtree(folder / "sft")
    (folder / "sft").touch()
    assert "sft: is a file" in problem(folder)


def test_the_command_ends_in_one_line_a_problem(made: Path) -> None:
    result = CliRunner().invoke(app, ["sft", "check", *sft_arguments(made)])
    assert result.exit_code == 0, result.output
    assert result.output.rstrip().endswith("OK")
    result = CliRunner().invoke(app, ["sft", "check", *sft_arguments(made, "packing=true", "cutoff_len=20")])
    assert isinstance(result.exception, InputError)
    assert str(result.exception).count("\n  ") == 2
