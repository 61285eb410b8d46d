"""The engine ``server`` with a server that is not vLLM's; with vLLM's: tests/integration/test_reasoning_server.py."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from assets import make_index, make_tiny_model, rl_rows, teach_form
from completion_server import Change, CompletionServer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from gream_verl.core.errors import InputError
from gream_verl.evaluation.prompts import load_model, read_prompts
from gream_verl.evaluation.reasoning import evaluate_reasoning
from gream_verl.evaluation.results import Evaluation
from gream_verl.evaluation.sampling import SamplingSettings
from gream_verl.evaluation.server import Connection, ServerSampler

USERS, CHAINS = 5, 3


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    index = make_index()
    index.save(folder / "tiny.index.json")
    make_tiny_model(folder / "model", index)
    teach_form(folder / "model", index, steps=120)
    pl.DataFrame(rl_rows(index, USERS)).write_parquet(folder / "tiny-test.parquet")
    return folder


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the clients ask again at once."""
    import openai._base_client
    from tenacity import wait_none

    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.0)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.0)
    monkeypatch.setattr(ServerSampler._ask.retry, "wait", wait_none())


def evaluate(world: Path, **options: Any) -> Evaluation:
    arguments = {"chains": CHAINS, "max_tokens": 40, "temperature": 0.9, "top_p": 0.95, "batch_size": 6}
    arguments |= {"constrained": False} | options
    prompts, _ = read_prompts(world / "tiny-test.parquet", "reasoning")
    return evaluate_reasoning(world / "model", prompts, world / "tiny.index.json", **arguments)


def served(world: Path, server: CompletionServer, **options: Any) -> Evaluation:
    return evaluate(world, **({"engine": "server", "endpoint": server.url, "ranking": "answers"} | options))


def tokenizer_of(world: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(world / "model")


def without_scores(rows: Sequence[Any]) -> list[Any]:
    return [
        [{name: value for name, value in chain.items() if not name.endswith("_score")} for chain in row["chains"]]
        for row in rows
    ]


@pytest.mark.parametrize("ranking", ["answers", "beam"])
def test_any_server_gives_what_the_model_gives_here(world: Path, ranking: str) -> None:
    expected = evaluate(world, engine="hf", ranking=ranking)
    with CompletionServer(world / "model").running() as server:
        found = served(world, server, ranking=ranking)
    assert without_scores(found.rows) == without_scores(expected.rows)
    assert [row["recommended"] for row in found.rows] == [row["recommended"] for row in expected.rows]
    assert any(row["recommended"] for row in found.rows)
    for row, other in zip(found.rows, expected.rows, strict=True):
        assert row["scores"] == pytest.approx(other["scores"], abs=1e-3)
    assert len(server.requests) == USERS * CHAINS
    assert len({request["seed"] for request in server.requests}) == USERS * CHAINS
    assert {request["prompt"].count("<|im_start|>") for request in server.requests} == {2}


def test_everything_that_a_generation_config_could_say_is_said_in_the_request(world: Path) -> None:
    with CompletionServer(world / "model").running() as server:
        served(world, server, beams=0, temperature=0.5, top_p=0.7)
    expected = {"temperature": 0.5, "top_p": 0.7, "max_tokens": 40, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    expected |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0, "model": "tiny"}
    for request in server.requests:
        assert request.items() >= expected.items()


def test_the_key_comes_from_the_environment(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CompletionServer(world / "model").running() as server:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
        served(world, server, beams=0)
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        evaluation = served(world, server, beams=0, seed=1)
    assert set(server.keys) == {"Bearer none", "Bearer secret"}
    assert "secret" not in repr(evaluation)


def test_faults_that_pass_change_nothing(world: Path) -> None:
    expected = evaluate(world, engine="hf", ranking="answers")
    with CompletionServer(world / "model").running() as server:
        server.faults = [(500, b"oops"), (429, b"{}"), (200, b"<html>"), (200, b'{"choices": []}'), (503, b"")]
        found = served(world, server, concurrency=1)
    assert len(server.requests) == USERS * CHAINS + 5
    assert without_scores(found.rows) == without_scores(expected.rows)


def test_a_fault_that_stays_ends_the_run_and_another_goes_on_with_it(world: Path, tmp_path: Path) -> None:
    progress = tmp_path / "progress.jsonl"
    with CompletionServer(world / "model").running() as server:
        complete = server.complete

        def dies(body: dict[str, Any]) -> bytes:
            if len(server.requests) > 8:
                server.faults = [(400, b'{"message": "too long for me"}')] * 100
            return complete(body)

        server.complete = dies  # type: ignore[method-assign]
        with pytest.raises(InputError, match="too long for me"):
            served(world, server, concurrency=1, progress_file=progress)
        assert progress.read_bytes().count(b"\n") == 1 + 3  # of the only piece, those with all their chains
        server.complete, server.faults, asked = complete, [], len(server.requests)  # type: ignore[method-assign]
        resumed = served(world, server, progress_file=progress)
        assert len(server.requests) - asked == (USERS - 3) * CHAINS
        assert resumed.rows == served(world, server).rows


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ((400, b'{"message": "unknown field top_k"}'), "top_k; .*a longer context, or take one that knows"),
        ((401, b"{}"), "OPENAI_API_KEY"),
        ((404, b'{"message": "no such model"}'), "--served-model"),
    ],
)
def test_a_fault_of_the_user_is_a_sentence_with_a_remedy(world: Path, fault: tuple[int, bytes], sentence: str) -> None:
    with CompletionServer(world / "model").running() as server:
        server.faults = [fault]
        with pytest.raises(InputError, match=sentence):
            served(world, server, concurrency=1)


def test_the_only_model_is_taken_and_others_must_be_named(world: Path) -> None:
    with CompletionServer(world / "model").running() as server:
        server.models = ["tiny", "large"]
        with pytest.raises(InputError, match="large, tiny; give one with --served-model"):
            served(world, server)
        with pytest.raises(InputError, match="no model 'small'"):
            served(world, server, served_model="small")
        served(world, server, served_model="large", beams=0)
        server.models = None  # a server without a list
        served(world, server, served_model="other", beams=0)
        with pytest.raises(InputError, match="--served-model"):
            served(world, server)
    assert {request["model"] for request in server.requests} == {"large", "other"}


def test_nobody_there_is_a_sentence(world: Path) -> None:
    with pytest.raises(InputError, match="start the server or check --endpoint"):
        evaluate(world, engine="server", endpoint="http://127.0.0.1:9/v1")
    with pytest.raises(InputError, match="expected a URL"):
        evaluate(world, engine="server", endpoint="127.0.0.1:9")


def test_a_server_that_cannot_constrain_is_refused_and_not_believed(world: Path) -> None:
    with CompletionServer(world / "model").running() as server, pytest.raises(InputError, match="--free"):
        served(world, server, constrained=None)


@pytest.mark.parametrize("told_by", ["usage", "logprobs"])
def test_a_response_cut_short_by_the_server_is_refused(world: Path, told_by: str) -> None:
    def cut(answer: dict[str, Any]) -> None:
        choice = answer["choices"][0]
        choice["finish_reason"] = "length"
        if told_by == "usage":
            answer["usage"]["completion_tokens"] = 1
        else:
            answer["usage"] = None
            choice["logprobs"] = {name: values[:1] for name, values in choice["logprobs"].items()}

    sentence = r"after 1 of 40 tokens; .*--generation-config vllm"
    with CompletionServer(world / "model", cut).running() as server, pytest.raises(InputError, match=sentence):
        served(world, server)


@pytest.mark.parametrize("usage", [True, False])
def test_tokens_without_text_and_a_text_of_fewer_tokens_are_not_taken_for_a_cut(world: Path, usage: bool) -> None:
    def half_letters(answer: dict[str, Any]) -> None:
        choice = answer["choices"][0]
        choice["logprobs"]["tokens"][:2] = ["", "é"]
        if not usage:
            answer["usage"] = None

    def silent(answer: dict[str, Any]) -> None:
        half_letters(answer)
        answer["choices"][0]["logprobs"] = None
        answer["choices"][0]["text"] = answer["choices"][0]["text"][:3]

    for change in (half_letters, silent):
        with CompletionServer(world / "model", change).running() as server:
            found = served(world, server, ranking="beam", max_tokens=3)
        assert len(found.rows) == USERS


def test_the_log_probability_of_a_token_without_text_is_that_of_the_letter_it_begins(world: Path) -> None:
    def half_letter(answer: dict[str, Any]) -> None:
        answer["choices"][0]["logprobs"] = {"tokens": ["", "x", "<|a_1|>"], "token_logprobs": [-1.0, -2.0, -4.0]}

    with CompletionServer(world / "model", half_letter).running() as server:
        sampler = ServerSampler(Connection(server.url), SamplingSettings(1, 1.0, 1.0, 3), tokenizer_of(world))
        [[response]] = sampler.sample([[5, 6]], [0])
        sampler.close()
    assert list(response.tokens) == tokenizer_of(world).encode("x<|a_1|>")
    assert list(response.logprobs) == [-3.0, -4.0]


def no_log_probabilities(answer: dict[str, Any]) -> None:
    answer["choices"][0]["logprobs"] = None


def those_of_a_chat(answer: dict[str, Any]) -> None:
    answer["choices"][0]["logprobs"] = {"content": [{"token": "x", "logprob": -1.0}]}


def one_is_missing(answer: dict[str, Any]) -> None:
    answer["choices"][0]["logprobs"]["token_logprobs"][-1] = None


@pytest.mark.parametrize("change", [no_log_probabilities, those_of_a_chat, one_is_missing])
def test_log_probabilities_are_needed_for_answers_only(world: Path, change: Change) -> None:
    expected = evaluate(world, engine="hf")
    with CompletionServer(world / "model", change).running() as server:
        with pytest.raises(InputError, match="--ranking beam"):
            served(world, server)
        found = served(world, server, ranking="beam")
    assert [row["recommended"] for row in found.rows] == [row["recommended"] for row in expected.rows]
    assert {chain["answer_score"] for row in found.rows for chain in row["chains"]} == {None}


def test_log_probabilities_that_belong_to_other_tokens_are_no_answer(world: Path) -> None:
    def differ(answer: dict[str, Any]) -> None:
        del answer["choices"][0]["logprobs"]["token_logprobs"][-1]

    with (
        CompletionServer(world / "model", differ).running() as server,
        pytest.raises(InputError, match=r"differ in length\) but b'\{\"id.{,80}; start the server"),
    ):
        served(world, server)


def test_a_file_is_not_gone_on_with_when_another_model_is_served(world: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "other", make_index(), seed=1)
    progress = tmp_path / "p.jsonl"
    rows = []
    with CompletionServer(world / "model").running() as server:
        for folder in (world / "model", tmp_path / "other"):
            server.model, _ = load_model(folder)  # at the same address, under the same name
            before = len(server.requests)
            rows.append(served(world, server, progress_file=progress, max_tokens=8).rows)
            assert len(server.requests) == before + USERS * CHAINS
            again = served(world, server, progress_file=progress, max_tokens=8)
            assert len(server.requests) == before + USERS * CHAINS
            assert again.rows == rows[-1]
            assert again.settings["users_from_progress"] == USERS
            assert again.settings["served_model"] == "tiny"
    assert rows[0] != rows[1]


def test_a_fingerprint_is_of_the_model_and_not_of_the_prompts_beginning(world: Path, tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "other", make_index(), seed=1)
    found = []
    for folder in (world / "model", world / "model", tmp_path / "other"):
        with CompletionServer(folder).running() as server:
            sampler = ServerSampler(Connection(server.url), SamplingSettings(1, 1.0, 1.0, 3), tokenizer_of(world))
            found.append([sampler.fingerprint([*start, *range(5, 25)]) for start in ([1], [2, 3])])
            sampler.close()
    assert len(found[0][0]["tokens"]) == len(found[0][0]["logprobs"]) > 0
    for same in [found[0][1], *found[1]]:
        assert {**same, "endpoint": ""} == {**found[0][0], "endpoint": ""}
    assert found[2][0]["tokens"] != found[0][0]["tokens"]
    assert found[0][0]["endpoint"] != found[1][0]["endpoint"]


@pytest.mark.parametrize(("concurrency", "batch_size", "expected"), [(9, 1, 9), (2, 64, 2)])
def test_as_many_requests_are_under_way_as_asked_for(
    world: Path, monkeypatch: pytest.MonkeyPatch, concurrency: int, batch_size: int, expected: int
) -> None:
    counts, ask = [0, 0], ServerSampler._ask

    async def counted(self: ServerSampler, request: dict[str, Any]) -> Any:
        counts[0] += 1
        counts[1] = max(counts)
        try:
            return await ask(self, request)
        finally:
            counts[0] -= 1

    monkeypatch.setattr(ServerSampler, "_ask", counted)
    with CompletionServer(world / "model").running() as server:
        served(world, server, concurrency=concurrency, batch_size=batch_size, beams=0, max_tokens=2)
    assert counts == [0, expected]


def test_a_server_with_another_tokenizer_is_told_of(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    def doubled(answer: dict[str, Any]) -> None:
        answer["usage"]["prompt_tokens"] += 1

    with CompletionServer(world / "model", doubled).running() as server, caplog.at_level(logging.WARNING):
        served(world, server, beams=0)
    assert "does it add a token of its own" in caplog.text
    assert len(caplog.records) == 1
