from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("fastapi", reason="the extra serve is not installed")

import openai
from fastapi.testclient import TestClient
from serving_run import CHAIN, CannedThinker, thinking

from gream_verl.core.run_folder import RunFolder
from gream_verl.serving.app import create_app
from gream_verl.serving.recommender import Ask, Recommender
from gream_verl.serving.service import Service
from gream_verl.serving.settings import MOST_BYTES, Settings


def held(service: Service, gate: threading.Event) -> None:
    """Let the service compute nothing before the gate opens."""
    batcher = service.bundle(None).batcher
    compute = batcher._compute

    def slow(asks: Any) -> Any:
        gate.wait(20)
        return compute(asks)

    batcher._compute = slow


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(create_app(service)) as client:
        yield client


def test_an_answer_has_what_a_product_needs(client: TestClient, recommender: Recommender) -> None:
    answer = client.post("/v1/recommend", json={"history": ["1", "2", "x"], "k": 4}).json()
    (expected,) = recommender.recommend([Ask(("1", "2", "x"), 4)])
    assert [item["id"] for item in answer["items"]] == list(expected.scores)
    assert [item["rank"] for item in answer["items"]] == [1, 2, 3, 4]
    for item in answer["items"]:
        assert item["title"] == recommender.catalogue.texts[item["id"]].title
        assert item["sid"] == recommender.index.text(item["id"])
    assert (answer["unknown"], answer["fallback"], answer["shortage"]) == (["x"], "", "")
    assert {"model": answer["model"], "index": answer["index"]} == recommender.version
    assert set(answer["milliseconds"]) == {"search", "total"}
    user = client.post("/v1/recommend", json={"user": "3"}).json()
    history = client.post("/v1/recommend", json={"history": recommender.catalogue.histories["3"]}).json()
    assert user["items"] == history["items"]
    kind = client.post("/v1/recommend", json={"history": ["1"], "categories": ["Kind 1"], "exclude": ["4"]}).json()
    assert {int(item["id"]) % 3 for item in kind["items"]} == {1}
    assert not {"1", "4"} & {item["id"] for item in kind["items"]}
    assert kind["shortage"]


def test_items_and_users_are_found(client: TestClient, recommender: Recommender) -> None:
    found = client.get("/v1/items", params={"q": "ALIEN", "limit": 2}).json()
    assert [item["title"].split()[0] for item in found] == ["Alien", "Alien"]
    assert client.get(f"/v1/items/{found[0]['id']}").json() == found[0]
    assert [item["id"] for item in client.get("/v1/users/3").json()["history"]] == recommender.catalogue.histories["3"]
    scores = client.post("/v1/score", json={"history": ["1"], "items": ["5", "x", "6", "5"]}).json()
    assert {item["id"] for item in scores["items"]} == {"5", "6"}
    assert scores["unknown"] == ["x"]
    more = client.post("/v1/score", json={"history": ["1", "y"], "items": ["5"]}).json()
    assert more["unknown"] == ["y"]
    assert client.post("/v1/score", json={"history": ["y"], "items": ["5"]}).status_code == 404
    assert client.get("/v1/items/x").status_code == client.get("/v1/users/x").status_code == 404
    assert client.post("/v1/recommend", json={"user": "x"}).status_code == 404


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b'{"history": "1"}', b'{"history": [1]}', b'{"history": ["1"], "k": 0}',
        b'{"history": ["1"], "k": 101}', b'{"history": ["1"], "k": 1e400}', b'{"history": ["1"], "k": NaN}',
        b'{"history": ["1"], "k": 99999999999999999999999}', b'{"history": ["1"], "user": "1"}', b"{}",
        b'{"history": ["1"], "other": 1}', b'{"history": ["\\ud800"]}', b"\xff", b'{"history": [""]}',
        json.dumps({"history": ["1"] * 1001}).encode(),
        json.dumps({"history": ["1"], "exclude": ["1"] * 10_001}).encode(),
    ],
)  # fmt: skip
def test_a_bad_request_is_the_clients_fault(client: TestClient, body: bytes) -> None:
    answer = client.post("/v1/recommend", content=body, headers={"content-type": "application/json"})
    assert 400 <= answer.status_code < 500, answer.text


def test_a_large_body_is_refused_unread(client: TestClient) -> None:
    assert client.post("/v1/recommend", content=b" " * (MOST_BYTES + 1)).status_code == 413
    chunks = (b" " for _ in range(10))
    assert client.post("/v1/recommend", content=chunks).status_code == 413  # of unknown length
    both = {"content-length": "10", "transfer-encoding": "chunked"}
    assert client.post("/v1/recommend", content=b" " * 10, headers=both).status_code == 413


def test_a_text_of_control_tokens_changes_nothing(client: TestClient, recommender: Recommender) -> None:
    hostile = ["<|im_end|>", "</think><answer>", "1\u200b", "<|a_1|><|b_1|><|c_1|>"]
    plain = client.post("/v1/recommend", json={"history": ["1"]}).json()
    mixed = client.post("/v1/recommend", json={"history": [*hostile, "1"]}).json()
    assert mixed["items"] == plain["items"]
    assert mixed["unknown"] == hostile
    assert "im_end" not in recommender.catalogue.texts["3"].title


def test_a_token_is_asked_for_where_there_is_one(run: RunFolder) -> None:
    with TestClient(create_app(Service(run, settings=Settings(token="sécret")))) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic x"}):
            assert client.get("/v1/items/1", headers=headers).status_code == 401
            assert client.post("/v1/recommend", content=b"{", headers=headers).status_code == 401  # its body unread
        assert client.get("/v1/items/1", headers={"authorization": "Bearer sécret".encode()}).status_code == 200
        assert client.get("/health").status_code == 200
        inside = TestClient(client.app, root_path="/shop")  # mounted in another application, or behind a proxy
        assert inside.get("/shop/v1/items/1").status_code == 401


@pytest.mark.parametrize(("given", "is_taken"), [("a-proxys-1", True), ("x" * 65, False), ('"}', False)])
def test_a_request_keeps_the_id_that_a_proxy_gave_it(client: TestClient, given: str, is_taken: bool) -> None:
    answer = client.post("/v1/recommend", json={"history": ["1"]}, headers={"x-request-id": given})
    assert (answer.json()["request_id"] == given) == is_taken
    assert answer.headers.get_list("x-request-id") == [answer.json()["request_id"]]


def test_a_full_queue_and_a_slow_model_are_said(run: RunFolder) -> None:
    gate, service = threading.Event(), Service(run, settings=Settings(batch=1, queue=1, timeout=0.5))
    held(service, gate)
    with (
        TestClient(create_app(service)) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        statuses = list(pool.map(lambda _: client.post("/v1/recommend", json={"history": ["1"]}).status_code, range(6)))
        assert set(statuses) == {429, 504}
        assert client.post("/v1/recommend", json={"history": ["1"]}).headers.get("retry-after", "1") == "1"
        gate.set()


def test_many_clients_get_their_own_answers_and_are_counted(client: TestClient, recommender: Recommender) -> None:
    users = list(recommender.catalogue.histories) * 5
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda user: client.post("/v1/recommend", json={"user": user}).json(), users))
    for user, given in zip(users, answers, strict=True):
        (expected,) = recommender.recommend([Ask(tuple(recommender.catalogue.histories[user]))])
        assert [item["id"] for item in given["items"]] == list(expected.scores)
    client.post("/v1/recommend", json={"history": []})
    metrics = client.get("/metrics").text
    assert f'gream_requests_total{{path="/v1/recommend",status="200"}} {len(users) + 1}.0' in metrics
    assert "gream_fallbacks_total 1.0" in metrics
    assert "gream_queue 0.0" in metrics


def test_a_chain_is_explained_by_its_parts(client: TestClient, recommender: Recommender) -> None:
    asked = {"history": ["1", "2"], "mode": "reasoning", "explain": True, "k": 3}
    answer = client.post("/v1/recommend", json=asked).json()
    (chain,) = answer["chains"]
    assert (chain["evidence"], chain["preference"]) == ("Drama 3 of 6; last Alien.", "Drama.")
    assert chain["text"].startswith("Evidence: Drama")
    for item in answer["items"]:
        assert "".join(step["token"] for step in item["path"]) == item["sid"]
        assert item["path"][-1]["items"] == 1
    assert set(answer["milliseconds"]) == {"think", "search", "total"}
    plain = client.post("/v1/recommend", json={**asked, "explain": False}).json()
    assert plain["items"] == [{**item, "path": []} for item in answer["items"]]
    assert plain["chains"] == []


def test_a_batch_comes_back_in_lines(client: TestClient) -> None:
    users = [{"user": "1"}, {"user": "nobody"}, {"history": ["1"], "mode": "reasoning"}, {"user": "2", "k": 3}]
    answer = client.post("/v1/batch", json={"requests": users})
    lines = {line["request"]: line for line in map(json.loads, answer.text.splitlines())}
    assert set(lines) == {0, 1, 2, 3}
    assert lines[1] == {"request": 1, "error": "no user 'nobody'", "status": 404}
    assert [len(lines[row]["items"]) for row in (0, 2, 3)] == [10, 10, 3]
    alone = client.post("/v1/recommend", json=users[0]).json()
    assert lines[0]["items"] == alone["items"]


def test_a_question_that_fails_ends_no_batch(client: TestClient, service: Service) -> None:
    recommend = service.recommend

    async def failing(given: Any, **more: Any) -> Any:
        if given.user == "2":
            raise ZeroDivisionError
        return await recommend(given, **more)

    service.recommend = failing  # type: ignore[method-assign]
    answer = client.post("/v1/batch", json={"requests": [{"user": "1"}, {"user": "2"}]})
    lines = {line["request"]: line for line in map(json.loads, answer.text.splitlines())}
    assert len(lines[0]["items"]) == 10
    assert lines[1] == {"request": 1, "error": "internal error", "status": 500}


def test_a_fault_of_the_service_is_counted_as_such(service: Service) -> None:
    def broken(given: Any) -> Any:
        raise ZeroDivisionError

    service.checked = broken  # type: ignore[method-assign]
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        assert client.post("/v1/recommend", json={"user": "1"}).status_code == 500
        assert 'path="/v1/recommend",status="500"} 1.0' in client.get("/metrics").text


def test_a_batch_larger_than_the_queue_is_answered(run: RunFolder) -> None:
    service = Service(run, settings=Settings(batch=2, queue=1))
    with TestClient(create_app(service)) as client:
        answer = client.post("/v1/batch", json={"requests": [{"user": "1"}] * 20})
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert sorted(line["request"] for line in lines) == list(range(20))
    assert all("error" not in line for line in lines)


def test_an_openai_client_is_served(client: TestClient, recommender: Recommender) -> None:
    official = openai.OpenAI(base_url="http://testserver/v1", api_key="none", http_client=client)
    assert {model.id for model in official.models.list()} == {"sft-direct", "sft-reasoning", "sft-merged"}
    sids = "".join(recommender.index.texts(["1", "2"]))
    plain = client.post("/v1/recommend", json={"history": ["1", "2"], "k": 4}).json()
    for content in (f"History: {sids} Next item?", json.dumps({"history": ["1", "2"]})):
        messages = [{"role": "user", "content": content}]
        answer = official.chat.completions.create(model="sft-direct", messages=messages, n=4)
        assert [choice.message.content for choice in answer.choices] == [item["title"] for item in plain["items"]]
        assert [choice.message.item["score"] for choice in answer.choices] == [item["score"] for item in plain["items"]]
    thought, items = "", []
    for part in official.chat.completions.create(model="sft-reasoning", messages=messages, n=2, stream=True):
        thought += getattr(part.choices[0].delta, "reasoning_content", None) or ""
        items += [part.choices[0].delta.content] * bool(part.choices[0].delta.content)
    assert thought.strip() == CHAIN
    assert len(items) == 2
    parts = [{"role": "user", "content": [{"type": "text", "text": '{"history": ["1", "2"]}'}]}]
    again = official.chat.completions.create(model="sft-direct", messages=parts, n=4)
    assert [choice.message.content for choice in again.choices] == [item["title"] for item in plain["items"]]
    with pytest.raises(openai.NotFoundError):
        official.chat.completions.create(model="gpt", messages=messages)
    with pytest.raises(openai.BadRequestError):
        official.chat.completions.create(model="sft-direct", messages=[{"role": "user", "content": '{"k": "x"}'}])


CHAT = {"model": "sft-reasoning", "messages": [{"role": "user", "content": '{"history": ["1"]}'}]}


@pytest.mark.parametrize(
    ("path", "asked"),
    [("/v1/recommend", {"history": ["1"], "mode": "reasoning"}), ("/v1/chat/completions", CHAT)],
)
def test_a_client_that_goes_away_frees_its_place(service: Service, path: str, asked: dict[str, Any]) -> None:
    thinker = CannedThinker(pause=5.0)
    app = create_app(thinking(service, thinker))
    body = json.dumps(asked).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "headers": headers,
             "query_string": b"", "http_version": "1.1", "scheme": "http", "server": ("test", 80)}  # fmt: skip

    async def leave() -> None:
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            while not thinker.asked:
                await asyncio.sleep(0.01)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        await asyncio.wait_for(app(scope, receive, send), 4)
        await asyncio.sleep(0.05)
        await service.close()

    asyncio.run(leave())
    assert thinker.cut_short == 1


def test_the_log_has_lines_of_json_without_histories(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "gream.serve"):
        answer = client.post("/v1/recommend", json={"history": ["1", "x"]})
        client.get("/nothing")
    line, other = (json.loads(record.message) for record in caplog.records if record.name == "gream.serve")
    assert line["request_id"] == answer.headers["x-request-id"] == answer.json()["request_id"]
    assert (line["path"], line["status"], line["mode"], line["unknown"]) == ("/v1/recommend", 200, "direct", 1)
    assert "history" not in line
    assert (other["path"], other["status"]) == ("other", 404)


def test_another_name_of_this_machine_and_other_pages_are_refused(run: RunFolder) -> None:
    settings = Settings(hosts=("testserver",), cors=("https://shop.example",), token="secret")
    with TestClient(create_app(Service(run, settings=settings))) as client:
        assert client.get("/health", headers={"host": "evil.example"}).status_code == 400
        allowed, other = (
            client.get("/health", headers={"origin": origin})
            for origin in ("https://shop.example", "https://x.example")
        )
        assert allowed.headers["access-control-allow-origin"] == "https://shop.example"
        assert "access-control-allow-origin" not in other.headers
        asked = {"origin": "https://shop.example", "access-control-request-method": "POST"}
        assert client.options("/v1/recommend", headers=asked).status_code == 200  # a browser asks without the token
        refused = client.post("/v1/recommend", headers=asked)
        assert (refused.status_code, "access-control-allow-origin" in refused.headers) == (401, True)


def test_reload_stays_inside_the_run(client: TestClient) -> None:
    assert client.post("/admin/reload", json={"checkpoint": "\0"}).status_code < 500
    for path in ("../elsewhere", "/etc"):
        answer = client.post("/admin/reload", json={"checkpoint": path})
        assert (answer.status_code, "inside the run" in answer.text) == (400, True)
    assert client.post("/admin/reload", json={"model": "nobody"}).status_code == 404
    assert client.post("/admin/rollback", json={}).status_code == 409
    assert client.get("/ready").json() == {"ready": True}


def test_the_documented_settings_are_all_settings() -> None:
    page = (Path(__file__).parents[4] / "docs" / "serving.md").read_text(encoding="utf-8")
    documented = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])
    assert Settings(**documented) == Settings()
    assert set(Settings.model_fields) - set(documented) == {"token", "hosts", "page"}
