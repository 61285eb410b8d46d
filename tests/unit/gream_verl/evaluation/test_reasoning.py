from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from assets import make_index, make_tiny_model, rl_rows, teach_form
from evaluation_files import write_prompts
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.core.token_text import TokenText
from gream_verl.evaluation import reasoning
from gream_verl.evaluation.prompts import encode, load_model, read_prompts
from gream_verl.evaluation.reasoning import evaluate_reasoning, tokens_up_to_answer, up_to_answer
from gream_verl.evaluation.results import Evaluation
from gream_verl.evaluation.sampling import HuggingFaceSampler, Response, SamplingSettings, choose

USERS = 7
MANY = 50


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reasoning")
    index = make_index()
    index.save(folder / "tiny.index.json")
    make_tiny_model(folder / "model", index)
    write_prompts(folder / "tiny-test.parquet", index, USERS)
    return folder


def evaluate(world: Path, **options: object) -> Evaluation:
    arguments = {"engine": "hf", "max_tokens": 6, "beams": 30, "batch_size": 4} | options
    prompts, _ = read_prompts(world / "tiny-test.parquet", "reasoning")
    return evaluate_reasoning(world / "model", prompts, world / "tiny.index.json", **arguments)


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers in the right form, of which most items have left the catalogue."""
    folder = tmp_path_factory.mktemp("taught")
    known, index = make_index(), make_index(items=12)
    index.save(folder / "tiny.index.json")
    make_tiny_model(folder / "model", known)
    teach_form(folder / "model", known, steps=120)
    pl.DataFrame(rl_rows(index, MANY)).write_parquet(folder / "many-test.parquet")
    pl.DataFrame(rl_rows(index, USERS)).write_parquet(folder / "tiny-test.parquet")
    return folder


SAMPLED = {"chains": 8, "max_tokens": 40, "batch_size": 16}


def token_scores(model: object, prompt: Sequence[int], response: Sequence[int]) -> list[float]:
    """Return the log-probability of every token of a response, by one plain forward pass."""
    with torch.inference_mode():
        log_probs = model(torch.tensor([[*prompt, *response]])).logits[0].float().log_softmax(-1)
    return [log_probs[len(prompt) - 1 + place, token].item() for place, token in enumerate(response)]


class ScriptedSampler:
    """Answers with given texts, so that a random model can be seen to finish."""

    def __init__(self, tokenizer: object, texts: Sequence[str]) -> None:
        ids = [tokenizer(text)["input_ids"] for text in texts]
        self.responses = [Response(tokens, [-1.0] * len(tokens)) for tokens in ids]

    def sample(self, sequences: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[list[Response]]:
        return [self.responses for _ in sequences]


@pytest.mark.parametrize(
    ("response", "kept", "reached"),
    [
        ("<think>a</think>b<answer>c</answer>", "<think>a</think>b<answer>", True),
        ("<think>a</think>b<answer>", "<think>a</think>b<answer>", True),
        ("<think>a</think>b<answ", "<think>a</think>b<answ<answer>", False),
        ("<think>a", "<think>a</think><answer>", False),
        ("<think><answer>x</answer>", "<think><answer>x</answer></think><answer>", False),
        ("a", "a<answer>", False),
        ("", "<answer>", False),
    ],
)
def test_a_chain_is_kept_up_to_its_answer_and_closed_when_it_has_none(response: str, kept: str, reached: bool) -> None:
    assert up_to_answer(response) == (kept, reached)


@given(st.text(alphabet="ab<>/", max_size=6), st.text(alphabet="ab<>/", max_size=6))
def test_what_is_kept_always_ends_in_one_answer_tag_after_the_thinking(thought: str, rest: str) -> None:
    for response in (
        thought,
        f"<think>{thought}",
        f"<think>{thought}</think>{rest}",
        f"{thought}</think>{rest}<answer>",
    ):
        kept, _ = up_to_answer(response)
        assert kept.endswith("<answer>")
        assert kept.startswith(response) or response.startswith(kept)
        assert kept.count("<think>") <= kept.count("</think>")


def test_the_second_stage_ranks_real_items_given_the_chain_and_merges_chains(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = ItemIndex.load(world / "tiny.index.json")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32).eval()
    target = index.text("5")  # the target of user 0
    texts = [f"<think>likes it</think><answer>{target}</answer>", "<think>cut sho"]
    monkeypatch.setattr(reasoning, "HuggingFaceSampler", lambda *_: ScriptedSampler(tokenizer, texts))
    evaluation = evaluate(world, chains=2)
    row = evaluation.rows[0]
    assert row["target"] == "5"
    assert [chain["rsvr"] for chain in row["chains"]] == [1.0, 0.0]
    assert [chain["reached_answer"] for chain in row["chains"]] == [1.0, 0.0]
    assert row["rsvr"] == 0.5

    prompt = "<|im_start|>system\nRecommend.<|im_end|>\n<|im_start|>user\n"
    prompt += index.text("0") + " Next?<|im_end|>\n<|im_start|>assistant\n"
    probability = {}
    for item in index.sids:
        sid = tokenizer(index.text(item))["input_ids"]
        total = 0.0
        for kept in ("<think>likes it</think><answer>", "<think>cut sho</think><answer>"):
            ids = tokenizer(prompt + kept)["input_ids"]
            with torch.inference_mode():
                log_probs = model(torch.tensor([ids + sid])).logits[0].log_softmax(-1)
            total += np.exp(sum(log_probs[len(ids) - 1 + place, token].item() for place, token in enumerate(sid)))
        probability[item] = total / 2
    del probability["0"]  # the history
    expected = sorted(probability, key=lambda item: -probability[item])
    assert row["recommended"] == expected
    assert row["scores"] == pytest.approx([np.log(probability[item]) for item in expected], abs=1e-4)

    assert evaluation.metrics["format"] == evaluation.metrics["valid_item"] == 0.5
    assert evaluation.metrics["reached_answer"] == 0.5
    hits = sum(row["target"] == "5" for row in evaluation.rows) / USERS
    assert evaluation.metrics["pass@1"] == pytest.approx(hits / 2)
    assert evaluation.metrics["pass@2"] == pytest.approx(hits)


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<answer>", "</ans", "<", "answer", ">", "a", "b>"]), max_size=9)
)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_tokens_of_a_chain_are_kept_as_they_were_sampled(world: Path, pieces: list[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    reader = TokenText(tokenizer)
    tokens = [token for piece in pieces for token in tokenizer.encode(piece)]  # not those of the text as a whole
    places = [place for place in range(len(tokens) + 1) if up_to_answer(reader.read(tokens[:place]))[1]]
    for response in (tokens, [*tokens, tokenizer.eos_token_id]):
        kept, reached = tokens_up_to_answer(response, reader, tokenizer)
        assert reached == bool(places)
        assert kept[: len(tokens)] == tokens[: min([*places, len(tokens)])]
        if not reached:
            assert reader.read(kept) == up_to_answer("".join(pieces))[0]
            assert tokenizer.eos_token_id not in kept


def test_the_second_stage_follows_the_tokens_that_were_sampled_however_they_spell(
    world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    model = AutoModelForCausalLM.from_pretrained(world / "model", dtype=torch.float32).eval()
    index = ItemIndex.load(world / "tiny.index.json")
    text = "<think>likes it</think><answer>"
    letters = [token for letter in text for token in tokenizer.encode(letter)]
    assert len(letters) > len(tokenizer.encode(text))
    sampler = ScriptedSampler(tokenizer, [])
    sampler.responses = [Response([*letters, *index_tokens(tokenizer, index, "5")], [])]
    monkeypatch.setattr(reasoning, "HuggingFaceSampler", lambda *_: sampler)
    row = evaluate(world, max_tokens=60).rows[0]
    prompts, _ = read_prompts(world / "tiny-test.parquet", "reasoning")
    [prompt] = encode(prompts[:1], tokenizer)
    for item, score in zip(row["recommended"], row["scores"], strict=True):
        sid = index_tokens(tokenizer, index, item)
        assert score == pytest.approx(sum(token_scores(model, [*prompt, *letters], sid)), abs=1e-4)


def index_tokens(tokenizer: object, index: ItemIndex, item: str) -> list[int]:
    return tokenizer.encode(index.text(item))


@pytest.mark.parametrize("chains", [1, 3])
def test_where_memory_runs_out_batches_are_halved_and_chains_are_not(
    world: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, chains: int
) -> None:
    expected = evaluate(world, chains=chains, beams=0)

    def small(folder: Path) -> tuple[object, object]:
        def refuse(module: object, arguments: object, options: dict[str, torch.Tensor]) -> None:
            if len(options["input_ids"]) > room:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")

        model, tokenizer = load_model(folder)
        model.register_forward_pre_hook(refuse, with_kwargs=True)
        return model, tokenizer

    monkeypatch.setattr(reasoning, "load_model", small)
    room = 2
    found = evaluate(world, chains=chains, beams=0, batch_size=8)
    for row, whole in zip(found.rows, expected.rows, strict=True):
        for chain, same in zip(row["chains"], whole["chains"], strict=True):
            assert chain["text"] == same["text"]
            assert chain["response_score"] == pytest.approx(same["response_score"], abs=1e-4)
    # The first batch is of 7 users, or of 2 with 3 chains each.
    assert [record.args[0] for record in caplog.records if "out of memory" in record.msg] == [3, 1]
    assert f"{chains} chains a user" in caplog.text
    room = 0
    with pytest.raises(InputError, match="use fewer --max-tokens"):
        evaluate(world, chains=chains, beams=0)


def test_a_model_that_says_no_numbers_is_a_sentence(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> tuple[object, object]:
        model, tokenizer = load_model(folder)
        model.model.norm.weight.data[0] = float("nan")
        return model, tokenizer

    monkeypatch.setattr(reasoning, "load_model", broken)
    with pytest.raises(InputError, match="the model's output is not a number"):
        evaluate(world)


def test_the_batch_size_changes_nothing_and_the_seed_does(world: Path) -> None:
    expected = evaluate(world, batch_size=4, chains=2)
    assert len(expected.rows) == USERS
    for batch_size in (1, 64):
        found = evaluate(world, batch_size=batch_size, chains=2)
        for row, other in zip(expected.rows, found.rows, strict=True):
            assert [chain["text"] for chain in row["chains"]] == [chain["text"] for chain in other["chains"]]
            assert row["recommended"] == other["recommended"]
    other = evaluate(world, chains=2, seed=1)
    assert [row["chains"] for row in other.rows] != [row["chains"] for row in expected.rows]
    texts = [chain["text"] for row in expected.rows for chain in row["chains"]]
    assert len(set(texts)) > USERS


@pytest.mark.parametrize("constrained", [False, True])
def test_log_probabilities_are_the_models_own_however_tokens_are_drawn(taught: Path, constrained: bool) -> None:
    from gream_verl.decoding.answer_automaton import AnswerAutomaton

    model, tokenizer = load_model(taught / "model")
    automaton = AnswerAutomaton.build(ItemIndex.load(taught / "tiny.index.json"), tokenizer) if constrained else None
    settings = SamplingSettings(chains=3, temperature=0.5, top_p=0.7, max_tokens=40)
    prompts = encode(read_prompts(taught / "tiny-test.parquet", "reasoning")[0], tokenizer)[:2]
    sampler = HuggingFaceSampler(model, settings, tokenizer.eos_token_id, 4, automaton)
    ended = 0
    for prompt, responses in zip(prompts, sampler.sample(prompts, [1, 2]), strict=True):
        for response in responses:
            assert response.logprobs == pytest.approx(token_scores(model, prompt, response.tokens), abs=1e-4)
            assert tokenizer.eos_token_id not in response.tokens[:-1]
            ended += response.tokens[-1] == tokenizer.eos_token_id
    assert ended


def brute_force(
    taught: Path, row: dict[str, object], sequence: list[int], ranking: str, merge: str
) -> dict[str, float]:
    """Rank what the chains of a user answered, from their texts and by plain forward passes."""
    index = ItemIndex.load(taught / "tiny.index.json")
    tokenizer = AutoTokenizer.from_pretrained(taught / "model")
    model = AutoModelForCausalLM.from_pretrained(taught / "model", dtype=torch.float32).eval()
    found: dict[str, list[float]] = {}
    for chain in row["chains"]:
        text = chain["text"]
        items = [item for item in index.sids if f"<answer>{index.text(item)}</answer>" in text]
        if not items or (ranking == "answers" and not chain["format"]):
            continue
        tokens = tokenizer(text)["input_ids"]
        ended = [tokenizer.eos_token_id] * (len(tokens) < SAMPLED["max_tokens"])
        scores = token_scores(model, sequence, [*tokens, *ended])
        if ranking == "answers":
            before = len(tokenizer(text[: text.index("<answer>") + len("<answer>")])["input_ids"])
            scores = scores[before : before + len(index.sids[items[0]])]
        found.setdefault(items[0], []).append(sum(scores))
    if merge == "max":
        return {item: max(scores) for item, scores in found.items()}
    return {item: float(np.log(sum(np.exp(scores)) / SAMPLED["chains"])) for item, scores in found.items()}


@pytest.mark.parametrize(
    ("ranking", "merge"), [("answers", "mean"), ("answers", "max"), ("reference", "max"), ("reference", "mean")]
)
def test_sampled_answers_are_ranked_as_brute_force_ranks_them(taught: Path, ranking: str, merge: str) -> None:
    evaluation = evaluate(taught, ranking=ranking, merge=merge, temperature=0.9, top_p=0.95, **SAMPLED)
    assert evaluation.settings["constrained"] == (ranking == "answers")
    tokenizer = AutoTokenizer.from_pretrained(taught / "model")
    prompts, _ = read_prompts(taught / "tiny-test.parquet", "reasoning")
    lengths = []
    for prompt, row in zip(prompts, evaluation.rows, strict=True):
        text = tokenizer.apply_chat_template(prompt.messages, add_generation_prompt=True, tokenize=False)
        merged = "max" if ranking == "reference" else merge
        scores = brute_force(taught, row, tokenizer(text)["input_ids"], ranking, merged)
        expected = sorted(set(scores) - set(prompt.history), key=lambda item: -scores[item])
        assert row["recommended"] == expected
        assert row["scores"] == pytest.approx([scores[item] for item in expected], abs=1e-3)
        assert row["history_length"] == len(prompt.history)
        lengths.append(len(expected))
    assert max(lengths) > 1
    if ranking == "answers":
        hits = [row["target"] in row["recommended"][:5] for row in evaluation.rows]
        assert evaluation.metrics["recall@5"] == pytest.approx(sum(hits) / USERS)


def test_constrained_answers_are_items_and_free_ones_need_not_be(taught: Path) -> None:
    def shares(**options: object) -> list[float]:
        rows = evaluate(taught, ranking="answers", **SAMPLED, **options).rows
        return [chain["valid_item"] for row in rows for chain in row["chains"] if chain["format"]]

    constrained, free = shares(), shares(constrained=False)
    assert set(constrained) == {1.0}
    assert len(constrained) > USERS
    assert 0.0 in free


def test_the_batch_size_changes_no_constrained_answer(taught: Path) -> None:
    options = {"ranking": "answers", "chains": 8, "max_tokens": 40, "temperature": 1.2, "top_p": 1.0}
    expected, found = (evaluate(taught, **options, batch_size=batch_size).rows for batch_size in (1, 32))
    for row, other in zip(expected, found, strict=True):
        assert [chain["text"] for chain in row["chains"]] == [chain["text"] for chain in other["chains"]]
        assert row["recommended"] == other["recommended"]
    assert len({chain["tokens"] for row in expected for chain in row["chains"]}) > 5


def test_a_chain_has_the_item_it_answers_with_both_scores(taught: Path) -> None:
    rows = evaluate(taught, ranking="answers", beams=0, **SAMPLED).rows
    chains = [chain for row in rows for chain in row["chains"]]
    index = ItemIndex.load(taught / "tiny.index.json")
    for chain in chains:
        answered = bool(chain["format"] and chain["valid_item"])
        assert (chain["item"] is not None) == answered
        if answered:
            assert chain["text"].endswith(f"<answer>{index.text(chain['item'])}</answer>")
            assert chain["response_score"] < chain["answer_score"] < 0
    assert "recommended" not in rows[0]


def test_pass_at_k_for_every_k_up_to_the_chains(world: Path) -> None:
    def ks(chains: int) -> list[str]:
        metrics = evaluate(world, chains=chains, beams=0, max_tokens=2).metrics
        return [name for name in metrics if name.startswith("pass@")]

    assert ks(1) == ["pass@1"]
    assert ks(7) == ["pass@1", "pass@5", "pass@7"]
    assert ks(10) == ["pass@1", "pass@5", "pass@10"]


def test_the_generation_config_in_the_folder_changes_nothing(taught: Path) -> None:
    options = {"ranking": "answers", **SAMPLED}
    expected = evaluate(taught, **options)
    file = taught / "model" / "generation_config.json"
    before = file.read_text()
    leaking = {"do_sample": True, "temperature": 0.01, "top_k": 1, "repetition_penalty": 9.0, "max_new_tokens": 1}
    ends = [*range(500)]  # every token of the text vocabulary ends a response
    file.write_text(json.dumps(json.loads(before) | leaking | {"eos_token_id": ends}))
    try:
        assert evaluate(taught, **options).rows == expected.rows
    finally:
        file.write_text(before)


def test_without_beams_only_the_free_answers_are_scored(world: Path) -> None:
    evaluation = evaluate(world, beams=0)
    assert "recommended" not in evaluation.rows[0]
    assert "recall@10" not in evaluation.metrics
    assert 0 <= evaluation.metrics["rsvr"] <= 1


def test_the_number_of_shards_changes_nothing(world: Path, tmp_path: Path) -> None:
    progress = tmp_path / "progress.jsonl"
    options = {"chains": 2, "batch_size": 4}  # pieces of two users, and one of the last
    expected = evaluate(world, **options)
    evaluate(world, **options, progress_file=progress)
    lines = progress.read_text().splitlines(keepends=True)
    progress.write_text("".join(lines[:4]))  # three users are done: a piece and a half
    assert evaluate(world, **options, shards=2, progress_file=progress).rows == expected.rows
    assert sorted(progress.read_text().splitlines()) == sorted("".join(lines).splitlines())


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_reasoning import evaluate_many

evaluate_many(Path(sys.argv[2]), Path(sys.argv[3]))
"""


def evaluate_many(world: Path, progress: Path | None) -> Evaluation:
    prompts, _ = read_prompts(world / "many-test.parquet", "reasoning")
    options = {"engine": "hf", "ranking": "answers", "chains": 2, "max_tokens": 40}
    # pieces of three users; the last has two
    return evaluate_reasoning(
        world / "model", prompts, world / "tiny.index.json", **options, batch_size=6, progress_file=progress
    )


def test_a_killed_process_loses_nothing_and_another_goes_on_to_the_same_rows(taught: Path, tmp_path: Path) -> None:
    progress = tmp_path / "progress.jsonl"
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(taught), str(progress)]
    paths = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not progress.exists() or progress.read_bytes().count(b"\n") <= 0.4 * MANY:
        assert run.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    run.kill()
    run.wait(30)
    lines = progress.read_bytes().splitlines(keepends=True)
    done = [line for line in lines if line.endswith(b"\n")]
    assert 0.4 * MANY < len(done) <= MANY

    resumed = evaluate_many(taught, progress)
    assert progress.read_bytes().splitlines(keepends=True)[: len(done)] == done
    assert progress.read_bytes().count(b"\n") == MANY + 1
    assert list(resumed.rows) == list(evaluate_many(taught, None).rows)


def test_only_what_decides_a_row_decides_whether_a_run_is_gone_on_with(world: Path, tmp_path: Path) -> None:
    progress = tmp_path / "progress.jsonl"
    evaluate(world, progress_file=progress)
    begun = progress.read_bytes()
    evaluate(world, progress_file=progress, batch_size=2)
    assert [*tmp_path.iterdir()] == [progress]
    assert progress.read_bytes() == begun
    evaluate(world, progress_file=progress, temperature=1.0)
    [aside] = [path for path in tmp_path.iterdir() if path != progress]
    assert aside.read_bytes() == begun
    evaluate(world, progress_file=progress)
    assert progress.read_bytes() == begun


def test_a_call_tells_what_it_took_from_the_progress_file(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    progress = tmp_path / "progress.jsonl"
    assert evaluate(world, progress_file=progress).settings["users_from_progress"] == 0
    assert "taken from" not in capsys.readouterr().out
    lines = progress.read_text().splitlines(keepends=True)
    for done in (USERS, 3):
        progress.write_text("".join(lines[: 1 + done]))
        settings = evaluate(world, progress_file=progress).settings
        assert f"{done} of {USERS} users taken from {progress}" in capsys.readouterr().out
        assert settings["users_from_progress"] == done
        assert settings["seconds_of_this_call"] > 0
        assert "seconds" not in settings


def other_weights(folder: Path) -> None:
    make_tiny_model(folder / "model", make_index(), seed=1)


def other_template(folder: Path) -> None:
    file = folder / "model" / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_start|>", "<think>"))


def other_end(folder: Path) -> None:
    file = folder / "model" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token": "<|a_1|>"}))


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (nothing, {}),
        (nothing, {"drop_history": False}),
        (nothing, {"score": "items"}),
        (nothing, {"merge": "max"}),
        (nothing, {"ranking": "reference"}),
        (nothing, {"constrained": True}),
        (nothing, {"beams": 4}),
        (nothing, {"chains": 3}),
        (nothing, {"top_p": 0.5}),
        (nothing, {"max_tokens": 5}),
        (nothing, {"seed": 1}),
        (other_weights, {}),
        (other_template, {}),
        (other_end, {}),
    ],
)
def test_whatever_decides_a_row_begins_a_new_file(
    world: Path, tmp_path: Path, change: Callable[[Path], None], options: dict[str, object]
) -> None:
    folder = shutil.copytree(world, tmp_path / "world")
    progress = tmp_path / "progress.jsonl"
    evaluate(folder, progress_file=progress, chains=2)
    change(folder)
    resumed = evaluate(folder, progress_file=progress, **({"chains": 2} | options))
    same = change is nothing and not options
    assert resumed.settings["users_from_progress"] == (USERS if same else 0)
    assert resumed.rows == evaluate(folder, **({"chains": 2} | options)).rows


def test_another_kind_of_device_begins_a_new_file(world: Path, tmp_path: Path) -> None:
    progress = tmp_path / "progress.jsonl"
    evaluate(world, progress_file=progress)
    [header, *lines] = progress.read_text().splitlines()
    elsewhere = {**json.loads(header)["settings"], "device": "cuda"}
    progress.write_text("\n".join([json.dumps({"settings": elsewhere}, sort_keys=True), *lines, ""]))
    assert evaluate(world, progress_file=progress).settings["users_from_progress"] == 0


@given(
    st.lists(st.floats(-4, 4), min_size=2, max_size=8),
    st.floats(0.3, 2.0),
    st.floats(0.05, 1.0),
)
@settings(deadline=None)
def test_draws_follow_the_nucleus_of_the_distribution(logits: list[float], temperature: float, top_p: float) -> None:
    probabilities = torch.tensor(logits).div(temperature).softmax(-1).tolist()
    order = sorted(range(len(logits)), key=lambda token: -probabilities[token])
    nucleus: dict[int, float] = {}
    for token in order:
        if sum(nucleus.values()) >= top_p - 1e-6:
            break
        nucleus[token] = probabilities[token]
    draws = 2000
    uniforms = (torch.arange(draws) + 0.5) / draws
    drawn = choose(torch.tensor(logits).expand(draws, -1), uniforms, temperature, top_p)
    share = torch.bincount(drawn, minlength=len(logits)) / draws
    edge = abs(sum(list(nucleus.values())) - top_p) < 1e-5  # the last token may or may not belong
    for token in range(len(logits)):
        expected = nucleus.get(token, 0.0) / sum(nucleus.values())
        assert share[token].item() == pytest.approx(expected, abs=2 / draws) or edge


def test_a_draw_of_the_largest_number_stays_inside_the_nucleus() -> None:
    largest = torch.tensor([1.0 - 2**-24])
    assert choose(torch.tensor([[0.0, 5.0, -50.0]]), largest, 1.0, 1.0).item() in (0, 1)
    assert choose(torch.tensor([[0.0, 5.0, 1.0]]), largest, 1.0, 0.5).item() == 1


@pytest.mark.parametrize(
    "wrong", [{"chains": 0}, {"temperature": 0.0}, {"top_p": 0.0}, {"top_p": 1.1}, {"max_tokens": 0}]
)
def test_settings_that_cannot_be_sampled_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match="cannot sample"):
        SamplingSettings(**({"chains": 1, "temperature": 1.0, "top_p": 1.0, "max_tokens": 9} | wrong))


def test_an_endpoint_goes_with_the_server_engine_only(world: Path) -> None:
    for options in ({"engine": "server"}, {"engine": "hf", "endpoint": "http://127.0.0.1:1/v1"}):
        with pytest.raises(InputError, match="--endpoint"):
            evaluate(world, **options)


def test_two_prompts_of_one_user_are_refused(world: Path) -> None:
    prompts, _ = read_prompts(world / "tiny-test.parquet", "reasoning")
    with pytest.raises(InputError, match="user '0' has 2 prompts"):
        evaluate_reasoning(world / "model", [*prompts, prompts[0]], world / "tiny.index.json", engine="hf")
