import gzip
import json

import polars as pl
import pytest
import yaml
from assets import TITLES, make_index, make_tiny_model
from small_data import make_data
from wheel_build import ROOT

from data_processing.sft.checkpoints import drop_torn_checkpoints
from data_processing.sft.rules import WORDINGS
from gream_verl.cli import model as cli_model
from gream_verl.cli.main import main as cli
from gream_verl.core.errors import InputError
from gream_verl.model.embedding_rows import ROWS
from gream_verl.pipeline.quickstart import PROFILES, QuickstartOptions, steps


def run(monkeypatch, capsys, *arguments):
    """Run `gream ...` in this process; return the exit status and what it printed to stdout and stderr."""
    monkeypatch.setattr("sys.argv", ["gream", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    printed = capsys.readouterr()
    return caught.value.code or 0, printed.out, printed.err


@pytest.mark.parametrize(
    "command",
    [[], ["quickstart"], ["doctor"], ["data", "prepare"], ["data", "enrich"], ["data", "prompts"],
     ["data", "tasks"], ["data", "mix"], ["data", "rl"], ["data", "stats"], ["index", "build"],
     ["index", "report"], ["index", "add"], ["index", "check"], ["index", "import"],
     ["model", "tiny"], ["model", "smollm2"], ["model", "extend"], ["model", "check"], ["model", "adapter"],
     ["model", "merge"], ["sft", "check"], ["sft", "report"], ["evaluate"], ["baseline"], ["compare"],
     ["report"], ["inspect"], ["learning"]],
)  # fmt: skip
def test_every_command_explains_itself(monkeypatch, capsys, command):
    status, out, _ = run(monkeypatch, capsys, *command, "--help")
    assert status == 0
    assert "Usage" in out
    assert len(out.split("╭")[0].split()) > 8


def write_gzip(path, lines):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def amazon(tmp_path):
    """Raw Amazon files of 12 users who all had the same 8 items."""
    reviews = [
        {"reviewerID": f"u{user}", "asin": f"i{item}", "unixReviewTime": 10 * user + item, "overall": 5.0}
        for user in range(12)
        for item in range(8)
    ]
    write_gzip(tmp_path / "R.json.gz", reviews)
    write_gzip(tmp_path / "M.json.gz", [{"asin": f"i{item}", "title": f"Title {item}"} for item in range(8)])
    return tmp_path


def prepare(folder, reviews="R.json.gz", metadata="M.json.gz"):
    return ["data", "prepare", "--source", "amazon2018", "--reviews", folder / reviews, "--metadata", folder / metadata,
            "--data", folder / "data", "--dataset", "D"]  # fmt: skip


def test_the_numbers_of_a_data_set_are_printed(monkeypatch, capsys, amazon):
    run(monkeypatch, capsys, *prepare(amazon))
    status, out, _ = run(monkeypatch, capsys, "data", "stats", "--data", amazon / "data", "--dataset", "D")
    assert status == 0
    rows = {line.split("│")[1].strip(): line.split("│")[2].strip() for line in out.splitlines() if line.count("│") == 3}
    assert (rows["users"], rows["items"], rows["interactions"], rows["longest"]) == ("12", "8", "96", "8")


def test_a_data_set_goes_through_other_sources_unchanged(monkeypatch, capsys, amazon):
    assert run(monkeypatch, capsys, *prepare(amazon))[0] == 0
    made = [(amazon / f"data/D.{kind}.json").read_bytes() for kind in ("inter", "item")]
    layout = ["--source", "layout", "--inter", amazon / "data/D.inter.json", "--item", amazon / "data/D.item.json"]
    status, _, err = run(monkeypatch, capsys, "data", "prepare", *layout, "--data", amazon / "again", "--dataset", "D")
    assert (status, err) == (0, "")
    assert [(amazon / f"again/D.{kind}.json").read_bytes() for kind in ("inter", "item")] == made

    rows = [f"u{user},i{item},{10 * user + item}" for user in range(12) for item in range(8)]
    (amazon / "i.csv").write_text("\n".join(["who,item,timestamp", *rows]))
    (amazon / "m.csv").write_text("\n".join(["item,title", *(f"i{item},Title {item}" for item in range(8))]))
    table = ["--source", "table", "--inter", amazon / "i.csv", "--item", amazon / "m.csv", "--column", "user=who"]
    status, _, err = run(monkeypatch, capsys, "data", "prepare", *table, "--data", amazon / "table", "--dataset", "D")
    assert (status, err) == (0, "")
    assert (amazon / "table/D.inter.json").read_bytes() == made[0]


def test_raw_files_become_a_data_set(monkeypatch, capsys, amazon):
    status, out, _ = run(monkeypatch, capsys, *prepare(amazon))
    assert status == 0
    assert "users" in out
    assert len(json.loads((amazon / "data" / "D.inter.json").read_text())) == 12


def test_a_temporal_split_reaches_the_prompts_and_a_dry_run_writes_nothing(monkeypatch, capsys, amazon):
    temporal = [*prepare(amazon), "--split", "temporal", "--test-share", "0.2", "--validation-share", "0.35"]
    status, out, _ = run(monkeypatch, capsys, *temporal, "--dry-run")
    assert status == 0
    assert "split kind" in out
    assert not (amazon / "data").exists()
    assert run(monkeypatch, capsys, *temporal)[0] == 0
    split = json.loads((amazon / "data/D.split.json").read_text())
    assert split["users"]["u0"] == [8, None, None]
    assert split["users"]["u5"] == [3, 3, None]
    assert split["users"]["u9"] == [0, None, 5]
    assert split["users"]["u11"] == [0, None, None]
    status, _, err = run(monkeypatch, capsys, *temporal, "--test-share", "0.9")
    assert status == 1
    assert "leave no training" in err


def test_reviews_are_kept_for_the_teacher_but_those_of_held_out_interactions(monkeypatch, capsys, amazon):
    reviews = [
        {
            "reviewerID": f"u{user}",
            "asin": f"i{item}",
            "unixReviewTime": item,
            "reviewText": f"Said by u{user} of {item}",
        }
        for user in range(12)
        for item in range(8)
    ]
    write_gzip(amazon / "R.json.gz", reviews)
    status, out, _ = run(monkeypatch, capsys, *prepare(amazon), "--review-texts", "3")
    assert status == 0
    assert "18 reviews of 6 items" in out
    kept = pl.read_parquet(amazon / "data/D.reviews.parquet")
    assert set(kept["item"]) == {f"i{item}" for item in range(6)}
    status, _, err = run(monkeypatch, capsys, "data", "prepare", "--review-texts", "3")
    assert status == 1
    assert "--review-texts: does not go with --source movielens" in err


def test_too_many_bad_rows_stop_the_run_unless_they_are_allowed(monkeypatch, capsys, amazon):
    whole = gzip.decompress((amazon / "R.json.gz").read_bytes())
    (amazon / "R.json.gz").write_bytes(gzip.compress(whole + b"{torn\n" * 10))
    status, _, err = run(monkeypatch, capsys, *prepare(amazon))
    assert status == 1
    assert "the first is row 97 (not an object: '{torn')" in err
    assert run(monkeypatch, capsys, *prepare(amazon), "--bad-rows", "0.2")[0] == 0
    rejects = [json.loads(line) for line in (amazon / "data/D.rejects.jsonl").read_text().splitlines()]
    assert [reject["row"] for reject in rejects] == list(range(97, 107))


def test_the_prompts_of_the_teacher_are_written_and_an_estimate_asks_nobody(monkeypatch, capsys, amazon):
    run(monkeypatch, capsys, *prepare(amazon))
    status, out, _ = run(monkeypatch, capsys, "data", "prompts", amazon / "mine")
    assert status == 0
    assert (amazon / "mine/chain.txt").is_file()
    where = ["--data", amazon / "data", "--dataset", "D", "--model", "m", "--endpoint", "http://127.0.0.1:9/v1"]
    price = ["--price", "1/2", "--prompts", amazon / "mine"]
    status, out, err = run(monkeypatch, capsys, "data", "enrich", "items", *where, *price, "--dry-run")
    assert (status, err) == (0, "")
    assert "questions" in out
    assert not list((amazon / "data").glob("*teacher*"))
    for wrong, said in (
        (["--extra", "["], "--extra"),
        (["--budget-money", "1"], "--price"),
        (["--price", "1"], "0.15/0.60"),
        (["--extra", '{"max_tokens": 9}'], "max_tokens cannot be set there"),
    ):
        status, _, err = run(monkeypatch, capsys, "data", "enrich", "items", *where, *wrong)
        assert status == 1
        assert said in err


def test_alignment_tasks_alone_go_to_a_file_of_their_own(monkeypatch, capsys, tmp_path):
    make_data(tmp_path)
    where = ["--data", tmp_path, "--dataset", "small"]
    status, out, _ = run(
        monkeypatch, capsys, "data", "tasks", *where, "--rows", "seqrec=50%", "--rows", "item2index=20"
    )
    assert status == 0
    tasks = pl.read_parquet(tmp_path / "small-align.parquet")["task"].value_counts()
    report = json.loads((tmp_path / "small-align.json").read_text())["tasks"]
    assert dict(tasks.iter_rows()) == {"seqrec": round(report["seqrec"]["exist"] / 2), "item2index": 20}
    assert "small-align" in json.loads((tmp_path / "dataset_info.json").read_text())
    status, out, _ = run(monkeypatch, capsys, "data", "tasks", *where, "--dry-run")
    assert all(task in out for task in ("historyreconstruction", "itemsearch", "preferenceobtain"))
    run(monkeypatch, capsys, "data", "mix", *where, "--total", "40", "--rows", "seqrec=3", "--rows", "reasoning=1")
    tasks = pl.read_parquet(tmp_path / "small-mix.parquet")["task"].value_counts()
    assert dict(tasks.iter_rows()) == {"seqrec": 30, "reasoning": 10}


def test_bad_input_is_one_sentence_and_leaves_earlier_results(monkeypatch, capsys, amazon):
    run(monkeypatch, capsys, *prepare(amazon))
    earlier = (amazon / "data" / "D.inter.json").read_bytes()
    whole = (amazon / "R.json.gz").read_bytes()
    (amazon / "torn.json.gz").write_bytes(whole[: len(whole) // 2])
    (amazon / "broken.json.gz").write_bytes(gzip.compress(b"{not json\n" * 50))
    for reviews in ("absent.json.gz", "torn.json.gz", "broken.json.gz"):
        status, out, err = run(monkeypatch, capsys, *prepare(amazon, reviews=reviews))
        assert status == 1
        assert err.startswith("gream: ")
        assert reviews in err
        assert "Traceback" not in out + err
        assert len(err.strip().splitlines()) == 1
    assert (amazon / "data" / "D.inter.json").read_bytes() == earlier


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["index", "build", "nowhere"], "holds no data set"),
        (["data", "mix", "--data", "nowhere"], "no such file"),
        (["data", "rl", "--data", "nowhere"], "no such file"),
        (["data", "mix", "--rows", "seqrec"], "--rows 'seqrec': expected NAME=VALUE"),
        (["data", "mix", "--rows", "seqrec=many"], "seqrec=40%"),
        (["data", "tasks", "--rows", "reasoning=5"], "gream data mix"),
        (["data", "prepare", "--source", "amazon2018"], "--reviews"),
        (["data", "prepare", "--source", "recbole"], "--inter"),
        (["data", "prepare", "--source", "amazon2023", "--reviews", "r"], "--source amazon2023 needs --metadata FILE"),
        (["data", "prepare", "--source", "table", "--inter", "i", "--item", "m", "--column", "user"], "NAME=VALUE"),
        (["data", "prepare", "--source", "layout", "--inter", "i", "--column", "user=x"], "--column: does not go with"),
        (["data", "prepare", "--source", "layout", "--inter", "i", "--split", "temporal"], "whose files hold no times"),
        (
            ["data", "prepare", "--source", "layout", "--inter", "D.inter.json", "--data", ".", "--dataset", "D"],
            "D.inter.json: would be overwritten",
        ),
        (["model", "tiny", "--data", "nowhere"], "gream index build"),
        (["model", "extend", "--base", "x", "--index", "nowhere.json", "--output", "y"], "gream index build"),
        (["evaluate", "--model", "nowhere"], "neither"),
        (["report", "--run", "nowhere"], "gream evaluate"),
        (["quickstart", "--reviews", "R.json.gz"], "go with --source amazon2014"),
        (["quickstart", "--source", "amazon2018", "--reviews", "absent", "--metadata", "absent"], "no such file"),
        (["quickstart", "--source", "recbole"], "choose one of"),
    ],
)
def test_a_wrong_call_names_the_remedy(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(monkeypatch, capsys, *arguments)
    assert status == 1
    assert message in err
    assert len(err.strip().splitlines()) == 1


def test_a_folder_that_cannot_be_written_is_one_sentence(monkeypatch, capsys, amazon):
    (amazon / "data").write_text("a file where a folder should be")
    status, _, err = run(monkeypatch, capsys, *prepare(amazon))
    assert status == 1
    assert "cannot be written" in err


def test_histories_are_shortened_to_what_the_trainer_takes(monkeypatch, capsys, tmp_path):
    folder = make_data(tmp_path, users=40)
    model = make_tiny_model(tmp_path / "model", folder.read_index(folder.read_items()))
    where = ["data", "mix", "--data", tmp_path, "--dataset", "small", "--rows", "seqrec=50"]
    status, out, err = run(monkeypatch, capsys, *where, "--tokenizer", model, "--longest", "60")
    assert status == 0, err
    assert all(name in out for name in ("median", "longest", "shortened", "left out"))
    report = json.loads((tmp_path / "small-mix.json").read_text())["tasks"]["seqrec"]
    assert report["made"] == 50
    assert report["shortened"] > 0
    assert report["longest"] <= 60
    assert (tmp_path / "small-mix.png").read_bytes().startswith(b"\x89PNG")


def test_another_mix_lies_beside_the_first(tmp_path, monkeypatch, capsys):
    make_data(tmp_path)
    where = ["data", "mix", "--data", tmp_path, "--dataset", "small"]
    run(monkeypatch, capsys, *where, "--rows", "seqrec=20")
    status, _, _ = run(monkeypatch, capsys, *where, "--rows", "reasoning=9", "--name", "thoughts")
    assert status == 0
    assert set(pl.read_parquet(tmp_path / "small-thoughts.parquet")["task"]) == {"reasoning"}
    assert len(pl.read_parquet(tmp_path / "small-mix.parquet")) == 20
    assert {"small-mix", "small-thoughts"} <= json.loads((tmp_path / "dataset_info.json").read_text()).keys()
    status, _, error = run(monkeypatch, capsys, *where, "--rows", "reasoning=9", "--name", "chains")
    assert status == 1
    assert "none of align, rl, val, test, chains" in error


@pytest.mark.parametrize("name", ["../up", "a,b", "a=b", "with blank", ""])
def test_a_name_that_a_config_would_misread_is_refused(name):
    with pytest.raises(InputError, match="cannot be a name"):
        QuickstartOptions(name=name).check()


def test_a_killed_checkpoint_is_dropped_and_a_whole_one_kept(tmp_path):
    (tmp_path / "checkpoint-10").mkdir()
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"global_step": 10}')
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-30").mkdir()
    (tmp_path / "checkpoint-30" / "trainer_state.json").write_text('{"global_st')
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-notes").write_text("dear")
    drop_torn_checkpoints(tmp_path)
    kept = sorted(path.name for path in tmp_path.iterdir())
    assert kept == ["checkpoint-10", "checkpoint-best", "checkpoint-notes"]


def test_the_default_quickstart_runs_the_bare_commands():
    commands = {step.name: list(step.command) for step in steps(QuickstartOptions())}
    assert commands["sft"][:2] == ["llamafactory-cli", "train"]
    assert commands["sft"][2].endswith("sft_configs/tiny_cpu.yaml")
    assert len(commands["sft"]) == 3
    assert commands["srpo"] == ["python", "-m", "verl.trainer.main_ppo", "+recipe=gream_srpo_cpu"]


def test_a_pretrained_model_is_extended_before_the_mix_and_checked_before_sft():
    commands = {step.name: list(step.command) for step in steps(QuickstartOptions(model="smollm2"))}
    order = ["base", "model", "sft-data", "sft-check", "sft", "sft-report", "evaluate-sft", "srpo", "evaluate-srpo"]
    assert [name for name in commands if name in order] == order
    assert commands["sft"][2].endswith("sft_configs/smollm2_cpu.yaml")
    assert len(commands["sft"]) == 3
    assert commands["sft-check"][3:] == commands["sft"][2:]
    assert commands["sft-data"][-2:] == ["--tokenizer", "runs/pretrained/model"]
    assert commands["srpo"][-1] == "+recipe=gream_srpo_smollm2_cpu"


@pytest.mark.parametrize("model", PROFILES)
def test_another_name_is_passed_on_to_every_step(model):
    for step in steps(QuickstartOptions(model, "other", seed=3)):
        assert any("runs/other" in word for word in step.command)
        assert not any(f"runs/{PROFILES[model].run}" in word for word in step.command)


@pytest.mark.parametrize("model", PROFILES)
def test_config_and_recipe_name_the_run_of_their_model(model):
    profile = PROFILES[model]
    folder = f"runs/{profile.run}"
    keys = yaml.safe_load((ROOT / "sft_configs" / profile.config).read_text())
    assert keys["model_name_or_path"] == f"{folder}/model"
    assert keys["dataset_dir"] == f"{folder}/data"
    assert keys["output_dir"] == f"{folder}/sft"
    recipe = (ROOT / "recipes" / "recipe" / f"{profile.recipe}.yaml").read_text()
    assert yaml.safe_load(recipe)["gream"]["run"] == folder


@pytest.mark.parametrize(
    ("choices", "table"), [(cli_model.Initialisation, ROWS), (cli.Chains, WORDINGS), (cli.Trained, PROFILES)]
)
def test_choices_are_those_of_their_table(choices, table):
    assert {choice.value for choice in choices} == set(table)


def test_a_model_is_extended_adapted_and_merged(monkeypatch, capsys, tmp_path):
    import torch
    from safetensors.torch import load_file
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from gream_verl.model.tiny_model import train_tokenizer

    tokenizer, index = train_tokenizer(TITLES, 300), tmp_path / "D.index.json"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes)).save_pretrained(
        tmp_path / "base"
    )
    tokenizer.save_pretrained(tmp_path / "base")
    make_index().save(index)
    base, model, adapter, merged = (tmp_path / name for name in ("base", "[model]", "adapter", "[merged]"))
    extend = ["model", "extend", "--base", base, "--index", index, "--output", model]
    adapt = ["model", "adapter", "--model", model, "--index", index, "--output", adapter, "--rank", "2"]
    merge = ["model", "merge", "--adapter", adapter, "--output", merged]
    check = ["model", "check", "--model", merged, "--index", index]
    said = {"extend": "14 added", "adapter": "14", "merge": f"{merged}: written", "check": "all 12 semantic-ID"}
    for command in (extend, adapt, merge, check):
        status, out, err = run(monkeypatch, capsys, *command)
        assert status == 0, err
        assert said[command[1]] in out
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["target_modules"] == sorted(config["target_modules"])
    record = json.loads((merged / "semantic_ids.json").read_text())
    assert record == {**json.loads((model / "semantic_ids.json").read_text()), "merged": str(adapter)}
    assert (merged / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    assert "made before" in " ".join(run(monkeypatch, capsys, *extend)[1].split())

    for command, output in ((extend, model), (adapt, adapter), (merge, merged)):
        old = (output / ".gream.json").stat().st_ino
        changed = ["--seed", "1"] if command is extend else []
        status, _, err = run(monkeypatch, capsys, *command, *changed)
        assert (status, "--overwrite" in err) == (1, True)
        assert (output / ".gream.json").stat().st_ino == old
        assert run(monkeypatch, capsys, *command, *changed, "--overwrite")[0] == 0
        assert (output / ".gream.json").stat().st_ino != old
    before = load_file(model / "model.safetensors")
    for own_input in (
        [*adapt[:-4], "--output", model],
        [*merge[:-1], model],
        [*merge[:-1], adapter],
        [*extend[:-1], merged],  # what another command wrote
        [*extend[:-1], base],
    ):
        status, _, err = run(monkeypatch, capsys, *own_input, "--overwrite")
        assert (status, "choose another folder" in err) == (1, True)
    assert all(torch.equal(before[name], tensor) for name, tensor in load_file(model / "model.safetensors").items())

    (model / "semantic_ids.json").unlink()  # as SFT leaves it
    assert run(monkeypatch, capsys, *adapt, "--overwrite")[0] == 0
    assert json.loads((adapter / "adapter_config.json").read_text()) == config
    (merged / "config.json").write_text(
        json.dumps(json.loads((merged / "config.json").read_text()) | {"vocab_size": 9})
    )
    rows = "trainable_token_indices"
    for saved, more, sentence in (
        (config | {rows: None}, [], "trains no rows of SID tokens"),
        ({}, [], "trains no rows of SID tokens"),
        ([], [], "trains no rows of SID tokens"),
        (config | {rows: {"embed_tokens": [3]}}, [], "does not train the SID tokens"),
        (config, ["--model", base], "name its model with --model"),
        (config, ["--model", tmp_path / "absent"], "cannot be loaded"),
        (config | {"r": 3}, [], "cannot be loaded"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(saved))
        status, _, err = run(monkeypatch, capsys, *merge[:-1], tmp_path / "other", *more)
        assert (status, sentence in err, len(err.strip().splitlines())) == (1, True, 1)
    for wrong in (check, [*check[:3], tmp_path, *check[4:]]):
        status, _, err = run(monkeypatch, capsys, *wrong)
        assert (status, len(err.strip().splitlines())) == (1, 1)
