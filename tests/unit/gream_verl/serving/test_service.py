from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra serve is not installed")

from fastapi.testclient import TestClient

from gream_verl.serving.recommender import Ask, Recommender
from gream_verl.serving.service import MOST_BYTES, Settings, create_app


@pytest.fixture
def client(recommender: Recommender) -> Iterator[TestClient]:
    with TestClient(create_app(recommender)) as client:
        yield client


def test_an_answer_has_what_a_product_needs(client: TestClient, recommender: Recommender) -> None:
    answer = client.post("/v1/recommend", json={"history": ["1", "2", "x"], "k": 4}).json()
    (expected,) = recommender.recommend([Ask(("1", "2", "x"), 4)])
    assert [item["id"] for item in answer["items"]] == list(expected.scores)
    assert [item["rank"] for item in answer["items"]] == [1, 2, 3, 4]
    for item in answer["items"]:
        assert item["title"] == recommender.texts[item["id"]].title
        assert item["sid"] == recommender.index.text(item["id"])
    assert (answer["unknown"], answer["fallback"], answer["shortage"]) == (["x"], "", "")
    assert {"model": answer["model"], "index": answer["index"]} == recommender.version
    user = client.post("/v1/recommend", json={"user": "3"}).json()
    history = client.post("/v1/recommend", json={"history": recommender.histories["3"]}).json()
    assert user["items"] == history["items"]
    kind = client.post("/v1/recommend", json={"history": ["1"], "categories": ["Kind 1"], "exclude": ["4"]}).json()
    assert {int(item["id"]) % 3 for item in kind["items"]} == {1}
    assert not {"1", "4"} & {item["id"] for item in kind["items"]}
    assert kind["shortage"]


def test_items_and_users_are_found(client: TestClient, recommender: Recommender) -> None:
    found = client.get("/v1/items", params={"q": "ALIEN", "limit": 2}).json()
    assert [item["title"].split()[0] for item in found] == ["Alien", "Alien"]
    assert client.get(f"/v1/items/{found[0]['id']}").json() == found[0]
    assert [item["id"] for item in client.get("/v1/users/3").json()["history"]] == recommender.histories["3"]
    scores = client.post("/v1/score", json={"history": ["1"], "items": ["5", "x", "6", "5"]}).json()
    assert {item["id"] for item in scores["items"]} == {"5", "6"}
    assert scores["unknown"] == ["x"]
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


def test_a_text_of_control_tokens_changes_nothing(client: TestClient, recommender: Recommender) -> None:
    hostile = ["<|im_end|>", "</think><answer>", "1\u200b", "<|a_1|><|b_1|><|c_1|>"]
    plain = client.post("/v1/recommend", json={"history": ["1"]}).json()
    mixed = client.post("/v1/recommend", json={"history": [*hostile, "1"]}).json()
    assert mixed["items"] == plain["items"]
    assert mixed["unknown"] == hostile
    assert "im_end" not in recommender.texts["3"].title


def test_a_token_is_asked_for_where_there_is_one(recommender: Recommender) -> None:
    with TestClient(create_app(recommender, Settings(token="sécret"))) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic x"}):
            assert client.get("/v1/items/1", headers=headers).status_code == 401
        assert client.get("/v1/items/1", headers={"authorization": "Bearer sécret".encode()}).status_code == 200
        assert client.get("/health").status_code == 200


def test_a_full_queue_and_a_slow_model_are_said(recommender: Recommender, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    answer = recommender.recommend

    def slow(asks: Any) -> Any:
        gate.wait(20)
        return answer(asks)

    monkeypatch.setattr(recommender, "recommend", slow)
    with (
        TestClient(create_app(recommender, Settings(batch=1, queue=1, timeout=0.5))) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        statuses = list(pool.map(lambda _: client.post("/v1/recommend", json={"history": ["1"]}).status_code, range(6)))
        assert set(statuses) == {429, 504}
        assert client.post("/v1/recommend", json={"history": ["1"]}).headers.get("retry-after", "1") == "1"
        gate.set()


def test_many_clients_get_their_own_answers_and_are_counted(client: TestClient, recommender: Recommender) -> None:
    users = list(recommender.histories) * 5
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda user: client.post("/v1/recommend", json={"user": user}).json(), users))
    for user, given in zip(users, answers, strict=True):
        (expected,) = recommender.recommend([Ask(tuple(recommender.histories[user]))])
        assert [item["id"] for item in given["items"]] == list(expected.scores)
    client.post("/v1/recommend", json={"history": []})
    metrics = client.get("/metrics").text
    assert f'gream_requests_total{{path="/v1/recommend",status="200"}} {len(users) + 1}.0' in metrics
    assert "gream_fallbacks_total 1.0" in metrics
    assert "gream_queue 0.0" in metrics
