"""The engine ``server`` with a server that is not vLLM's; with vLLM's: tests/integration/test_reasoning_vllm.py."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from completion_server import CompletionServer

from gream_verl.core.errors import InputError
from gream_verl.core.semantic_ids import ItemIndex
from gream_verl.evaluation.options import EvaluationOptions
from gream_verl.evaluation.prompts import read_prompts
from gream_verl.evaluation.reasoning import evaluate_reasoning
from gream_verl.evaluation.results import Evaluation
from gream_verl.evaluation.server import ServerSampler

CHAINS = 2


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client ask again at once."""
    import openai._base_client

    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.0)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.0)


@pytest.fixture(scope="module")
def running(taught: Path) -> Iterator[CompletionServer]:
    with CompletionServer(taught / "model").running() as server:
        yield server


@pytest.fixture
def server(running: CompletionServer) -> CompletionServer:
    """A server that has seen no request, has no faults and changes no answer."""
    running.requests, running.faults, running.models, running.change = [], [], ["tiny"], None
    return running


def evaluate(folder: Path, progress: Path | None = None, **options: Any) -> Evaluation:
    prompts, _ = read_prompts(folder / "tiny-test.parquet", "reasoning")
    sampled = {"chains": CHAINS, "max_tokens": 4, "temperature": 0.9, "top_p": 0.95, "batch_size": 2, "engine": "hf"}
    index = ItemIndex.load(folder / "tiny.index.json")
    chosen = EvaluationOptions(**(sampled | options))
    with tempfile.TemporaryDirectory() as temporary:
        file = progress or Path(temporary) / "progress.jsonl"
        return evaluate_reasoning(folder / "model", prompts, index, chosen, file)


def served(folder: Path, server: CompletionServer, progress: Path | None = None, **options: Any) -> Evaluation:
    return evaluate(folder, progress, **({"engine": "server", "endpoint": server.url, "beams": 0} | options))


def without_scores(rows: Sequence[Any]) -> list[Any]:
    return [
        [{name: value for name, value in chain.items() if not name.endswith("_score")} for chain in row["chains"]]
        for row in rows
    ]


def test_any_server_gives_what_the_model_gives_here(taught: Path, server: CompletionServer) -> None:
    expected, found = evaluate(taught), served(taught, server, beams=30)
    assert without_scores(found.rows) == without_scores(expected.rows)
    assert {chain["response_score"] for row in found.rows for chain in row["chains"]} == {None}
    for row, other in zip(found.rows, expected.rows, strict=True):
        assert row["recommended"] == other["recommended"]
        assert row["scores"] == pytest.approx(other["scores"], abs=1e-3)
    assert [row["greedy_rsvr"] for row in found.rows] == [row["greedy_rsvr"] for row in expected.rows]
    drawn = [request for request in server.requests if request["temperature"]]
    assert len({request["seed"] for request in drawn}) == len(drawn) == len(found.rows) * CHAINS
    assert len(server.requests) - len(drawn) == len(found.rows)  # the most likely response of each
    assert {request["prompt"].count("<|im_start|>") for request in server.requests} == {2}
    assert [row["chain_gain"] for row in found.rows] == pytest.approx(
        [row["chain_gain"] for row in expected.rows], abs=2e-3
    )
    everything = {"temperature": 0.9, "top_p": 0.95, "max_tokens": 4, "presence_penalty": 0.0, "model": "tiny"}
    everything |= {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "repeat_penalty": 1.0, "frequency_penalty": 0}
    for request in drawn:
        assert request.items() >= everything.items()
    assert "chain_gain" not in served(taught, server).metrics  # nothing is ranked: the model is not loaded
    with pytest.raises(InputError, match="no log-probabilities to rank by; set ranking: beam"):
        served(taught, server, ranking="reference", beams=30)


def test_faults_that_pass_change_nothing(taught: Path, server: CompletionServer) -> None:
    expected = evaluate(taught, beams=0)
    server.faults = [(500, b"oops"), (429, b"{}"), (503, b"")]
    found = served(taught, server, concurrency=1)
    assert len(server.requests) == len(found.rows) * (CHAINS + 1) + 3
    assert without_scores(found.rows) == without_scores(expected.rows)


def test_a_fault_that_stays_ends_the_run_and_another_goes_on_with_it(
    taught: Path, tmp_path: Path, server: CompletionServer
) -> None:
    progress = tmp_path / "progress.jsonl"
    complete = server.complete

    def dies(body: dict[str, Any]) -> bytes:
        if len(server.requests) > 5 * (CHAINS + 1):
            server.faults = [(400, b'{"message": "too long for me"}')] * 100
        return complete(body)

    server.complete = dies  # type: ignore[method-assign]
    with pytest.raises(InputError, match="too long for me"):
        served(taught, server, progress, concurrency=1)
    assert progress.read_bytes().count(b"\n") == 1 + 4  # a piece has four users
    server.complete, server.faults, asked = complete, [], len(server.requests)  # type: ignore[method-assign]
    resumed = served(taught, server, progress)
    assert len(server.requests) - asked == 3 * (CHAINS + 1)
    assert without_scores(resumed.rows) == without_scores(evaluate(taught, beams=0).rows)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ((400, b'{"message": "unknown field top_k"}'), "400 .*top_k.*call again"),
        ((401, b"{}"), "OPENAI_API_KEY"),
        ((404, b'{"message": "no such model"}'), "the name of the model"),
        ((200, b'{"choices": []}'), "sent no completion"),
        ((200, b'"<html>"'), "sent no completion"),
    ],
)
def test_a_fault_of_the_user_is_a_sentence(
    taught: Path, server: CompletionServer, fault: tuple[int, bytes], sentence: str
) -> None:
    server.faults = [fault]
    with pytest.raises(InputError, match=sentence):
        served(taught, server, concurrency=1)


def test_the_only_model_is_taken_and_others_must_be_named(taught: Path, server: CompletionServer) -> None:
    def model_of(name: str | None = None) -> str:
        return ServerSampler(EvaluationOptions(endpoint=server.url, served_model=name), server.tokenizer).model

    assert model_of() == "tiny"
    server.models = ["tiny", "large"]
    with pytest.raises(InputError, match="large, tiny; set served_model to one"):
        model_of()
    with pytest.raises(InputError, match="no model 'small'"):
        model_of("small")
    assert model_of("large") == "large"
    server.models = None  # a server without a list
    assert model_of("other") == "other"
    with pytest.raises(InputError, match="the name of the model"):
        model_of()


def test_a_server_that_cannot_be_used_is_refused(taught: Path, server: CompletionServer) -> None:
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9"):
        evaluate(taught, engine="server", endpoint="http://127.0.0.1:9/v1")
    with pytest.raises(InputError, match="expected a URL"):
        evaluate(taught, engine="server", endpoint="127.0.0.1:9")
    with pytest.raises(InputError, match="leave them free"):
        served(taught, server, constrained=True)


def test_a_response_cut_short_by_the_server_is_refused(taught: Path, server: CompletionServer) -> None:
    def cut(answer: dict[str, Any]) -> None:
        answer["choices"][0]["finish_reason"] = "length"
        answer["usage"]["completion_tokens"] = 1

    server.change = cut
    with pytest.raises(InputError, match=r"after 1 of 4 tokens; .*--generation-config vllm"):
        served(taught, server)


def test_a_server_with_another_tokenizer_is_warned_of(taught: Path, server: CompletionServer) -> None:
    def one_more(answer: dict[str, Any]) -> None:
        answer["usage"]["prompt_tokens"] += 1

    server.change = one_more
    with pytest.warns(UserWarning, match="check its tokenizer"):
        served(taught, server, max_tokens=2, chains=1)
